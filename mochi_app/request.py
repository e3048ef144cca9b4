"""What a caller may ask for: each parameter, its limits, and the refusal of anything else."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mochi_app.model_defaults import ModelDefaults

MAX_PROMPT_CHARS = 2000
MAX_REQUEST_ID_CHARS = 200
MIN_STEPS, MAX_STEPS = 2, 512
MAX_SEED = 2**32 - 1
MAX_GUIDANCE_SCALE = 20.0
MAX_LORA_SCALE = 2.0
# Steps that each schedule can be walked in: beyond them its noise would not fall with every step.
SCHEDULE_STEPS: Mapping[str, tuple[int, int]] = {
    "linear_quadratic": (MIN_STEPS, MAX_STEPS),
    "fast": (7, 114),
}
DEFAULT_SCHEDULE = "linear_quadratic"
MIN_SIDE, SIDE_MULTIPLE = 64, 16


class RequestError(ValueError):
    """A request is refused. The message names the field, the value given and what is accepted."""


class NotFound(RequestError):
    """No job has this id."""


class NotYours(RequestError):
    """The job is another caller's."""


class Conflict(RequestError):
    """The request is well formed, but the job's state does not allow it."""


def safe_repr(value: Any, limit: int = 60) -> str:
    """`repr` of a caller's value, cut to `limit` characters and safe to print anywhere."""
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!a}… ({len(value)} characters)"
    try:
        whole_text = ascii(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a {type(value).__name__} too long to show"
    return whole_text if len(whole_text) <= limit else whole_text[:limit] + "…"


def refuse(name: str, value: Any, expected: str) -> RequestError:
    """The one form of a refusal: field, value, what is accepted."""
    return RequestError(f"{name}: got {safe_repr(value)}, expected {expected}")


def check_text(name: str, value: Any, *, least: int, most: int) -> str:
    """`value` trimmed, `least` to `most` characters, free of NUL and lone surrogates.

    Raises:
        RequestError: it is not such a text.
    """
    expected = f"a text of {least} to {most} characters"
    if not isinstance(value, str):
        raise refuse(name, value, expected)
    trimmed = value.strip()
    if not least <= len(trimmed) <= most:
        raise refuse(name, value, f"{expected} after trimming")
    if "\0" in trimmed:
        raise refuse(name, value, f"{expected} without NUL characters")
    if any("\ud800" <= char <= "\udfff" for char in trimmed):
        raise refuse(name, value, f"{expected} in valid Unicode, without lone surrogates")
    return trimmed


def check_number(name: str, value: Any, *, least: float, most: float) -> float:
    """`value` as a finite float from `least` to `most`.

    Raises:
        RequestError: it is not such a number.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # false for NaN, too
        raise refuse(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def check_integer(
    name: str, value: Any, *, least: int, most: int, multiple: int = 1, offset: int = 0
) -> int:
    """`value` as an int from `least` to `most` of the form `multiple`·k + `offset`.

    An integral float (a slider's 8.0) is taken; a bool or a text is not.

    Raises:
        RequestError: it is not such a number.
    """
    expected = f"a whole number from {least} to {most}"
    if multiple > 1:
        expected += (
            f" of the form {multiple}k+{offset}" if offset else f", a multiple of {multiple}"
        )
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most or value % 1 or value % multiple != offset:
        raise refuse(name, value, expected)
    return int(value)


def check_schedule(schedule: Any, steps: int) -> str:
    """`schedule` if it is one that can be walked in so many steps.

    Raises:
        RequestError: there is no such schedule, or not with this number of steps.
    """
    if not isinstance(schedule, str) or schedule not in SCHEDULE_STEPS:
        raise refuse("schedule", schedule, " or ".join(SCHEDULE_STEPS))
    least, most = SCHEDULE_STEPS[schedule]
    if not least <= steps <= most:
        raise refuse(
            "num_inference_steps", steps, f"{least} to {most} with the schedule {schedule}"
        )
    return schedule


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request. `height` and `width` in pixels; `seed` is always set."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    fps: int
    schedule: str = DEFAULT_SCHEDULE
    lora: str | None = None
    lora_scale: float = 1.0
    request_id: str | None = None

    @classmethod
    def validate(
        cls,
        defaults: ModelDefaults,
        *,
        prompt: Any,
        negative_prompt: Any = None,
        seed: Any = None,
        num_inference_steps: Any = None,
        guidance_scale: Any = None,
        height: Any = None,
        width: Any = None,
        num_frames: Any = None,
        schedule: Any = None,
        lora: Any = None,
        lora_scale: Any = None,
        request_id: Any = None,
        preview_steps: int = 8,
        loras: Collection[str] = (),
    ) -> GenerationRequest:
        """Check every field; None takes the default. A missing seed is drawn here, 32 bits.

        `loras` are the names that can be asked for; an empty name asks for none.

        Raises:
            RequestError: naming the field, the value given and what is accepted.
        """

        def default(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        def side(name: str, value: Any) -> int:
            most = getattr(defaults, f"max_{name}")
            chosen = default(value, getattr(defaults, name))
            return check_integer(name, chosen, least=MIN_SIDE, most=most, multiple=SIDE_MULTIPLE)

        steps = check_integer(
            "num_inference_steps",
            default(num_inference_steps, preview_steps),
            least=MIN_STEPS,
            most=MAX_STEPS,
        )
        chosen = None if lora == "" else lora
        scale = check_number("lora_scale", default(lora_scale, 1.0), least=0, most=MAX_LORA_SCALE)
        if chosen is not None and chosen not in loras:
            known = ", ".join(sorted(loras)) or "nothing, this server has none"
            raise refuse("lora", chosen, known)
        return cls(
            prompt=check_text("prompt", prompt, least=1, most=MAX_PROMPT_CHARS),
            negative_prompt=check_text(
                "negative_prompt", default(negative_prompt, ""), least=0, most=MAX_PROMPT_CHARS
            ),
            seed=check_integer("seed", default(seed, secrets.randbits(32)), least=0, most=MAX_SEED),
            num_inference_steps=steps,
            guidance_scale=check_number(
                "guidance_scale",
                default(guidance_scale, defaults.guidance_scale),
                least=0,
                most=MAX_GUIDANCE_SCALE,
            ),
            height=side("height", height),
            width=side("width", width),
            num_frames=check_integer(
                "num_frames",
                default(num_frames, defaults.num_frames),
                least=7,
                most=defaults.max_num_frames,
                multiple=6,
                offset=1,
            ),
            fps=defaults.fps,
            schedule=check_schedule(default(schedule, DEFAULT_SCHEDULE), steps),
            lora=chosen,
            lora_scale=1.0 if chosen is None else scale,
            request_id=None
            if request_id is None
            else check_text("request_id", request_id, least=1, most=MAX_REQUEST_ID_CHARS),
        )

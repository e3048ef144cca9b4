"""What is asked for and what becomes of it: `GenerationRequest`, `Job`, `JobStatus`.

Plain data and its rules, below every other module: validation of a request (once, whatever door it
came through), the life of a status, ids. Nothing here reads files, the clock apart, or the network.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from mochi_app.settings import ModelDefaults

SCHEMA = 1
MAX_PROMPT_CHARS = 2000
MAX_REQUEST_ID_CHARS = 200
MAX_NOTE_CHARS = 2000
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
JOB_ID = re.compile(r"[0-9a-f]{14}-[0-9a-f]{16}")


class RequestError(ValueError):
    """A request is refused. The message names the field, the value given and what is accepted."""


class NotFound(RequestError):
    """No job has this id."""


class NotYours(RequestError):
    """The job is another caller's."""


class Conflict(RequestError):
    """The request is well formed, but the job's state does not allow it."""


class JobStatus(StrEnum):
    """Life of a job. A terminal status never changes."""

    CREATED = "CREATED"
    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def terminal(self) -> bool:
        """Whether the job has come to its end."""
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


NEXT: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.CREATED: frozenset({JobStatus.PENDING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PENDING: frozenset({JobStatus.PROCESSING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PROCESSING: frozenset(
        {JobStatus.PENDING, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


def shown(value: Any, limit: int = 60) -> str:
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
    return RequestError(f"{name}: got {shown(value)}, expected {expected}")


def text(name: str, value: Any, *, least: int, most: int) -> str:
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


def number(name: str, value: Any, *, least: float, most: float) -> float:
    """`value` as a finite float from `least` to `most`.

    Raises:
        RequestError: it is not such a number.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # false for NaN, too
        raise refuse(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def whole(
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


def walkable(schedule: Any, steps: int) -> str:
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
            return whole(name, chosen, least=MIN_SIDE, most=most, multiple=SIDE_MULTIPLE)

        steps = whole(
            "num_inference_steps",
            default(num_inference_steps, preview_steps),
            least=MIN_STEPS,
            most=MAX_STEPS,
        )
        chosen = None if lora == "" else lora
        scale = number("lora_scale", default(lora_scale, 1.0), least=0, most=MAX_LORA_SCALE)
        if chosen is not None and chosen not in loras:
            known = ", ".join(sorted(loras)) or "nothing, this server has none"
            raise refuse("lora", chosen, known)
        return cls(
            prompt=text("prompt", prompt, least=1, most=MAX_PROMPT_CHARS),
            negative_prompt=text(
                "negative_prompt", default(negative_prompt, ""), least=0, most=MAX_PROMPT_CHARS
            ),
            seed=whole("seed", default(seed, secrets.randbits(32)), least=0, most=MAX_SEED),
            num_inference_steps=steps,
            guidance_scale=number(
                "guidance_scale",
                default(guidance_scale, defaults.guidance_scale),
                least=0,
                most=MAX_GUIDANCE_SCALE,
            ),
            height=side("height", height),
            width=side("width", width),
            num_frames=whole(
                "num_frames",
                default(num_frames, defaults.num_frames),
                least=7,
                most=defaults.max_num_frames,
                multiple=6,
                offset=1,
            ),
            fps=defaults.fps,
            schedule=walkable(default(schedule, DEFAULT_SCHEDULE), steps),
            lora=chosen,
            lora_scale=1.0 if chosen is None else scale,
            request_id=None
            if request_id is None
            else text("request_id", request_id, least=1, most=MAX_REQUEST_ID_CHARS),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it is kept. Times are Unix seconds; `seconds` are durations by stage; `hashes`
    are SHA-256 of the first latents and of the raw frames.

    `video` and `poster` are file names inside their folders, set once the file is in place.
    `deaths` says how slots died of the job with no new checkpoint in between, and `checkpoint_at`
    is the time of the checkpoint that there was at the last of them, 0 for none. `server_deaths`
    counts those of the server likewise; a `suspect` runs alone since the first; `held` says why a
    PENDING job waits for a person and takes no turn (`suspects.py`). `deleted_uptime` is the
    history's uptime at the delete: `deleted_at` is for people, as their clock may have been wrong.
    `resumed_step` is the step after which the run went on that made the video. `cancel_requested`
    says that somebody wants an end of it: whoever finds it not running cancels it.
    """

    id: str
    kind: str
    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    fps: int
    submitted_at: float
    schema: int = SCHEMA
    request_id: str | None = None
    batch_id: str | None = None
    parent_id: str | None = None
    schedule: str = DEFAULT_SCHEDULE
    lora: str | None = None
    lora_scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    status: JobStatus = JobStatus.CREATED
    started_processing_at: float | None = None
    completed_processing_at: float | None = None
    attempts: int = 0
    error: str | None = None
    starred: bool = False
    note: str = ""
    safety: str | None = None
    deleted_at: float | None = None
    deleted_uptime: float | None = None
    evicted_at: float | None = None
    model: str = ""
    slot: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    video: str | None = None
    poster: str | None = None
    deaths: Sequence[str] = field(default_factory=list)
    checkpoint_at: float = 0.0
    server_deaths: int = 0
    suspect: bool = False
    held: str | None = None
    resumed_step: int = 0
    cancel_requested: bool = False

    @classmethod
    def from_request(cls, request: GenerationRequest, *, id: str, kind: str, **extra: Any) -> Job:
        """A CREATED job for a validated request."""
        asked = {item.name: getattr(request, item.name) for item in fields(request)}
        return cls(**(asked | {"id": id, "kind": kind, "submitted_at": time.time()} | extra))

    @property
    def enhanced(self) -> bool:
        """Whether this is the many-step version of a preview."""
        return self.kind == "enhance"

    @property
    def cost(self) -> int:
        """Work in steps × pixels × frames: what scheduling and speed measurements count."""
        return self.num_inference_steps * self.height * self.width * self.num_frames

    def moved(self, status: JobStatus, **changes: Any) -> Job:
        """This job in `status`, with `changes`. Nothing holds one that ends, and nothing counts
        against one that is made.

        Raises:
            Conflict: the life of a job has no such move.
        """
        if status not in NEXT[self.status]:
            raise Conflict(f"job {self.id} is {self.status}: it cannot become {status}")
        kept: dict[str, Any] = {"held": None} if status.terminal else {}
        if status is JobStatus.COMPLETED:
            kept |= {"server_deaths": 0, "suspect": False}
        return replace(self, status=status, **(kept | changes))

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready dict of every field."""
        return {name: getattr(self, name) for name in JOB_FIELDS}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Job:
        """Read a record of this schema or an earlier one; fields it lacks take their defaults.

        Raises:
            ValueError: the record is of a later schema, or lacks a field that has no default.
        """
        if (record.get("schema") or 0) > SCHEMA:
            raise ValueError(
                f"job record of schema {record['schema']}: this version reads up to {SCHEMA}"
            )
        known = {name: record[name] for name in JOB_FIELDS if name in record}
        try:
            return cls(**(known | {"status": JobStatus(record["status"]), "schema": SCHEMA}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"job record {shown(record.get('id'))}: {error}") from error


JOB_FIELDS: tuple[str, ...] = tuple(item.name for item in fields(Job))

# What makes two submits with one request_id the same request.
REQUEST_FIELDS: tuple[str, ...] = tuple(
    item.name for item in fields(GenerationRequest) if item.name not in ("request_id", "fps")
)


class JobIds:
    """Draws job ids: 14 hex digits of microseconds, never going back, and 64 random bits."""

    def __init__(self, last: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._last = int(last[:14], 16) if last else 0
        self._clock = clock

    def draw(self) -> str:
        """A new id, greater than every earlier one of this instance and than `last`."""
        self._last = max(int(self._clock() * 1e6), self._last + 1)
        return f"{self._last:014x}-{secrets.token_hex(8)}"


def parse_job_id(value: Any) -> str:
    """`value` if it has the form of a job id.

    Raises:
        RequestError: it has not; nothing was looked up.
    """
    if not isinstance(value, str) or not JOB_ID.fullmatch(value):
        raise refuse("job_id", value, "the id that submit_job returned")
    return value

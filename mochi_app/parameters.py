"""The parameters of a request, each declared once: type, limits, default, help, place on the page.

`Parameters` has what a video depends on. Jobs, requests and the message to a rank inherit its
fields; validation, the API's signature and documentation, the page's form, an MP4's metadata and
the table in docs/api.md are made from the declarations. To add a parameter, declare it here and use
its value where it matters.
"""

# No `from __future__ import annotations`: the declarations in the annotations are objects.
import secrets
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Self, get_args, get_type_hints

from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameter_types import (
    Choice,
    Integer,
    LoraName,
    Number,
    Offer,
    Parameter,
    Text,
)
from mochi_app.request import refuse

MAX_PROMPT_CHARS = 2000
MIN_STEPS, MAX_STEPS = 2, 512
MIN_SIDE = 64
# Steps that each schedule can be walked in: beyond them its noise would not fall with every step.
SCHEDULE_STEPS: Mapping[str, tuple[int, int]] = {
    "linear_quadratic": (MIN_STEPS, MAX_STEPS),
    "fast": (7, 114),
}
DEFAULT_SCHEDULE = "linear_quadratic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a video is made from, in the order of the page's form. `height` and `width` in pixels.

    A field without a declared `position` is the model's own and cannot be asked for.
    """

    prompt: Annotated[
        str,
        Text(
            help=f"What to show, 1 to {MAX_PROMPT_CHARS} characters.",
            position=1,
            label="Prompt",
            least=1,
            most=MAX_PROMPT_CHARS,
        ),
    ]
    seed: Annotated[
        int,
        Integer(
            help=f"0 to {2**32 - 1}; drawn and recorded when omitted.",
            omitted=lambda _: secrets.randbits(32),
            position=3,
            label="Seed",
            detail="always",
            least=0,
            most=lambda _: 2**32 - 1,
            widest=(0, 2**32 - 1),
        ),
    ]
    negative_prompt: Annotated[
        str,
        Text(
            help="What to avoid.",
            omitted=lambda _: "",
            position=2,
            label="Negative prompt",
            detail="changed",
            most=MAX_PROMPT_CHARS,
        ),
    ] = ""
    num_inference_steps: Annotated[
        int,
        Integer(
            help=f"{MIN_STEPS} to {MAX_STEPS}; a preview's when omitted.",
            omitted=lambda offer: offer.preview_steps,
            position=4,
            label="Steps",
            detail="always",
            least=MIN_STEPS,
            most=lambda _: MAX_STEPS,
            widest=(MIN_STEPS, MAX_STEPS),
        ),
    ]
    guidance_scale: Annotated[
        float,
        Number(
            help="0 to 20; at most 1 means no guidance.",
            omitted=lambda offer: offer.defaults.guidance_scale,
            position=5,
            label="Guidance",
            detail="always",
            least=0,
            most=20,
            step=0.1,
        ),
    ]
    width: Annotated[
        int,
        Integer(
            help="Pixels, a multiple of 16, from 64 to the model's limit.",
            omitted=lambda offer: offer.defaults.width,
            position=7,
            label="Width",
            row="size",
            least=MIN_SIDE,
            most=lambda offer: offer.defaults.max_width,
            widest=(MIN_SIDE, 8192),
            multiple=16,
        ),
    ]
    height: Annotated[
        int,
        Integer(
            help="Pixels, a multiple of 16, from 64 to the model's limit.",
            omitted=lambda offer: offer.defaults.height,
            position=6,
            label="Height",
            row="size",
            least=MIN_SIDE,
            most=lambda offer: offer.defaults.max_height,
            widest=(MIN_SIDE, 8192),
            multiple=16,
        ),
    ]
    num_frames: Annotated[
        int,
        Integer(
            help="6k+1 frames.",
            omitted=lambda offer: offer.defaults.num_frames,
            position=8,
            label="Frames",
            info=lambda offer: f"{offer.defaults.fps} a second",
            least=7,
            most=lambda offer: offer.defaults.max_num_frames,
            widest=(1, 10_000),
            multiple=6,
            offset=1,
        ),
    ]
    fps: Annotated[
        int,
        Integer(
            help="Frames a second.",
            omitted=lambda offer: offer.defaults.fps,
            least=1,
            most=lambda offer: offer.defaults.fps,
            widest=(1, 240),
        ),
    ]
    schedule: Annotated[
        str,
        Choice(
            help="linear_quadratic, Mochi's own, or fast: made for 8 steps at a guidance_scale of"
            " 1.5, and for 7 to 114 steps.",
            omitted=lambda _: DEFAULT_SCHEDULE,
            position=10,
            label="Schedule",
            detail="changed",
            options={
                "linear_quadratic": "Standard",
                "fast": "Fast, for 8 steps at guidance 1.5",
            },
        ),
    ] = DEFAULT_SCHEDULE
    lora: Annotated[
        str | None,
        LoraName(
            help="Name of a LoRA of this server; none when omitted.",
            omitted=lambda _: None,
            position=11,
            label="LoRA",
            row="lora",
        ),
    ] = None
    lora_scale: Annotated[
        float,
        Number(
            help="0 to 2; 1 when omitted.",
            omitted=lambda _: 1.0,
            position=12,
            label="LoRA scale",
            row="lora",
            least=0,
            most=2,
            step=0.05,
        ),
    ] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(Parameters):
    """A validated request. `request_id` is the caller's own name for it."""

    request_id: Annotated[
        str | None,
        Text(
            help="Your own name for this request, so that it can be sent twice safely.",
            omitted=lambda _: None,
            position=9,
            least=1,
            most=200,
        ),
    ] = None

    @classmethod
    def validate(
        cls,
        defaults: ModelDefaults,
        *,
        preview_steps: int = 8,
        loras: Collection[str] = (),
        **given: Any,
    ) -> Self:
        """Check every parameter; None takes the default. A missing seed is drawn here.

        `loras` are the names that can be asked for.

        Raises:
            RequestError: naming the field, the value given and what is accepted.
        """
        offer = Offer(defaults, preview_steps, loras)
        unknown = given.keys() - ASKED.keys()
        if unknown:
            raise TypeError(f"no such parameters: {', '.join(sorted(unknown))}")
        values = {
            name: checked(name, declared, given.get(name), offer)
            for name, declared in DECLARED.items()
        }
        check_schedule(values["schedule"], values["num_inference_steps"])
        if values["lora"] is None:
            values["lora_scale"] = 1.0
        return cls(**values)


def checked(name: str, declared: Parameter, value: Any, offer: Offer) -> Any:
    """`value` of a parameter as a request has it, or what it takes when it is omitted."""
    if value is None and declared.omitted is not None:
        value = declared.omitted(offer)
        if value is None:
            return None
    return declared.check(name, value, offer)


def check_schedule(schedule: str, steps: int) -> None:
    """Refuse a number of steps in which the schedule cannot be walked. Raises RequestError."""
    least, most = SCHEDULE_STEPS[schedule]
    if not least <= steps <= most:
        raise refuse(
            "num_inference_steps", steps, f"{least} to {most} with the schedule {schedule}"
        )


def read_parameters(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a video's metadata. A video that is older than a parameter may lack it.

    Raises:
        RequestError: one is missing, or is what no server of this app writes.
    """
    values = {}
    for item in fields(Parameters):
        if item.name in metadata or item.default is MISSING:
            values[item.name] = PARAMETERS[item.name].read(item.name, metadata.get(item.name))
    check_schedule(values.get("schedule", DEFAULT_SCHEDULE), values["num_inference_steps"])
    return values


def declarations(kind: type) -> Mapping[str, Parameter]:
    """The declared parameters of a dataclass by name, in the order of their fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: item
        for name, hint in hints.items()
        for item in get_args(hint)
        if isinstance(item, Parameter)
    }


PARAMETERS: Mapping[str, Parameter] = declarations(Parameters)
DECLARED: Mapping[str, Parameter] = declarations(GenerationRequest)
# What can be asked for, in the order of the API.
ASKED: Mapping[str, Parameter] = {
    name: DECLARED[name]
    for _, name in sorted((item.position, name) for name, item in DECLARED.items() if item.position)
}
# What a video is asked for with; of a request only its name is not among them.
REQUEST_FIELDS: tuple[str, ...] = tuple(name for name in ASKED if name in PARAMETERS)

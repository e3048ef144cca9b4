"""Requests as a caller makes them, of the full-size model."""

from __future__ import annotations

from typing import Any

from mochi_app.model_defaults import ModelDefaults
from mochi_app.parameters import GenerationRequest

DEFAULTS = ModelDefaults(
    height=480,
    width=848,
    num_frames=163,
    fps=30,
    guidance_scale=4.5,
    max_height=480,
    max_width=848,
    max_num_frames=163,
)


def validate(**given: Any) -> GenerationRequest:
    return GenerationRequest.validate(DEFAULTS, **({"prompt": "a red circle"} | given))

"""What tests ask a server with the embedded model for: parameters of `submit_job`."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 7}
QUICK: dict[str, Any] = SMALL | {"num_inference_steps": 2}
LONG: dict[str, Any] = SMALL | {"num_inference_steps": 512}

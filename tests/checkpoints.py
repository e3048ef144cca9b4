"""Checkpoints of no run, as the engine writes them."""

from __future__ import annotations

import numpy as np

from mochi_app.engine import checkpoint
from mochi_app.messages import Configure
from tests.places import TINY

CONFIG = Configure(
    slot=0, rank=0, world_size=1, model=str(TINY), device="cpu", dtype="float32", scratch=""
)
SHAPE = (1, 12, 2, 8, 10)
STAMP = {"job_id": "j", "num_inference_steps": 8, "scale": 0.1}


def latents(value: float = 1.5) -> checkpoint.Latents:
    return np.full(SHAPE, value, np.float32)

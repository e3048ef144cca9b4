"""Harms to the rank processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.serving import Served


def test_a_rank_killed_in_mid_step_costs_one_retry(serve: Callable[..., Served]) -> None:
    """A rank is killed (SIGKILL) in mid-step: its job is made all the same, by one retry."""
    served = serve("ok").ready()
    job = served.call("submit_job", prompt="slow", num_inference_steps=20)
    served.running(job["id"])
    os.kill(served.pids()[0], signal.SIGKILL)
    ended = served.ended(job["id"])
    assert (ended["status"], ended["attempts"]) == ("COMPLETED", 2)

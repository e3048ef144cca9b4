"""Metrics say what happened: counted once, in seconds, by kind."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from mochi_app.engine import rank
from mochi_app.studio.studio import Studio
from tests.conftest import eventually
from tests.studios import samples


async def test_a_job_is_counted_and_timed(
    make_studio: Callable[..., Awaitable[Studio]], monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = await make_studio()
    before = samples(studio)
    assert before["mochi_jobs{status=completed}"] == 0
    job = await studio.submit(prompt="p", num_inference_steps=3)
    await eventually(lambda: studio.find(job.id).status == "COMPLETED")
    await eventually(lambda: studio.pool.slots[0].ready)
    told = samples(studio)
    assert told["mochi_jobs{status=completed}"] == 1
    assert told["mochi_queue_length{}"] == 0
    assert told["mochi_job_wait_seconds_count{kind=preview}"] == 1
    assert told["mochi_job_run_seconds_count{kind=preview}"] == 1
    assert told["mochi_job_run_seconds_sum{kind=preview}"] > 0
    assert told["mochi_step_seconds_count{}"] == 3
    assert told["mochi_slot_up{slot=0,state=ready}"] == 1
    assert told["mochi_slot_restarts_total{slot=0}"] == 0
    assert told["mochi_disk_free_bytes{}"] > 0
    assert not any(name.startswith("mochi_gpu_memory_bytes") for name in told)
    monkeypatch.setattr(type(studio.pool.slots[0].slot), "gpu_bytes", property(lambda slot: [7]))
    assert samples(studio)["mochi_gpu_memory_bytes{rank=0,slot=0}"] == 7


async def test_a_retry_is_not_a_second_wait(
    make_studio: Callable[..., Awaitable[Studio]], tmp_path: object
) -> None:
    studio = await make_studio()
    job = await studio.submit(prompt=f"kill once {tmp_path}/flag", num_inference_steps=3)
    await eventually(lambda: studio.find(job.id).status == "COMPLETED")
    told = samples(studio)
    assert told["mochi_job_wait_seconds_count{kind=preview}"] == 1
    assert told["mochi_slot_restarts_total{slot=0}"] == 1


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (None, None),
        (SimpleNamespace(is_initialized=lambda: False), None),
        (SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda: 5), 5),
    ],
)
def test_a_rank_tells_its_gpu_memory_if_it_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: object, expected: int | None
) -> None:
    torch = SimpleNamespace(cuda=cuda) if cuda else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert rank.gpu_bytes() == expected

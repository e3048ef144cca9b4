"""Several real rank processes for a test: `run_ranks(n, work, folder)`."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mochi_app.engine.group import Ranks

Work = Callable[[Ranks], Any]
JOIN_SECONDS = 240.0
# What every rank imports, once for all of a test run: seconds of work for each that need not be.
PRELOADED = ["mochi_app.engine.loading", "mochi_app.engine.pipeline", "mochi_app.engine.speed"]


def run_ranks(
    size: int, work: Work, folder: Path, device: str = "cpu", limit: float = JOIN_SECONDS
) -> list[Any]:
    """What `work` returns in each of `size` processes joined by `Ranks`; an error in any is raised.

    `work` must pickle: a module-level function, or a partial of one. Results travel through files,
    so tensors are welcome; they arrive on the CPU. With `device` "cuda" each rank has one GPU, the
    first rank the first of those that this process sees. `limit` is in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = context_for(device)
    processes = [
        context.Process(target=one_rank, args=(rank, size, work, folder, device))
        for rank in range(size)
    ]
    for rank, process in enumerate(processes):
        with seeing(rank, device):
            process.start()
    for process in processes:
        process.join(limit)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    errors = "".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert not errors, errors
    assert not stuck, f"{len(stuck)} of {size} ranks did not end"
    results = [folder / f"result-{rank}" for rank in range(size)]
    return [torch.load(path, weights_only=False, map_location="cpu") for path in results]


def context_for(device: str) -> SpawnContext | ForkServerContext:
    """How ranks are started: on a CPU forked from a process that has only imported things; with
    CUDA as new ones, each of which reads which GPU is its own."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def seeing(number: int, device: str) -> Iterator[None]:
    """A process started meanwhile sees one of this one's GPUs, that of this number; none on "cpu".

    CUDA reads the variable once, so it must be there before anything in the process asks for a GPU.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(number)] if names is None else names.split(",")[number : number + 1]
    visible = "".join(gpus) if device == "cuda" else ""
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible}):
        yield


def one_rank(rank: int, size: int, work: Work, folder: Path, device: str) -> None:
    """The process: join, work, leave the result."""
    torch.set_num_threads(1)
    try:
        ranks = Ranks.join(rank, size, str(folder / "rendezvous"), torch.device(device))
        torch.save(work(ranks), folder / f"result-{rank}")
    except Exception:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    if size > 1 and device == "cuda":
        dist.destroy_process_group()  # NCCL wants to be told

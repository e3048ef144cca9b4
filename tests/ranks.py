"""Several real rank processes for a test: `run_ranks(n, work, folder)`."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from mochi_app.engine.group import Ranks

Work = Callable[[Ranks], Any]
JOIN_SECONDS = 240.0


def run_ranks(size: int, work: Work, folder: Path) -> list[Any]:
    """What `work` returns in each of `size` processes joined over gloo; an error in any is raised.

    `work` must be a module-level function; results travel through files, so tensors are welcome.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=one_rank, args=(rank, size, work, folder)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(JOIN_SECONDS)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    errors = "".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert not errors, errors
    assert not stuck, f"{len(stuck)} of {size} ranks did not end"
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def one_rank(rank: int, size: int, work: Work, folder: Path) -> None:
    """The process: join, work, leave the result."""
    torch.set_num_threads(1)
    try:
        ranks = Ranks.join(rank, size, str(folder / "rendezvous"), torch.device("cpu"))
        torch.save(work(ranks), folder / f"result-{rank}")
    except Exception:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise

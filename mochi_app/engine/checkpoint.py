"""The state of a run that is under way, on disk: latents after some step, and what they belong to.

A run that ends early goes on from there, on any slot of the same kind, to the same frames. So a
checkpoint is bound by its *stamp* to its job and to everything that the latents depend on; one that
is torn, foreign or of another stamp is removed, and the run begins at its first step. The file is
safetensors, whose header has the stamp as JSON: reading it executes nothing. Imports no torch.

It does not own when a checkpoint is due (`pipeline.py`) or when it is of no use any more
(`studio/runs.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from mochi_app import __version__
from mochi_app.files import fsync, sync
from mochi_app.messages import Configure, Run
from mochi_app.parameters import REQUEST_FIELDS

logger = logging.getLogger(__name__)

FORMAT = 1
TENSOR = "latents"
# A disk that hangs must not hold a job for long: the slot would be killed for it.
WRITE_SECONDS = 10.0
# What the latents depend on: of a request, whatever was asked for
REQUESTED = ("job_id", *REQUEST_FIELDS)
# ... and of a rank's configuration, beside its model and types
CONFIGURED = ("attention", "cache_threshold", "compile", "quantization", "offload", "world_size")

Latents = npt.NDArray[np.float32]
Stamp = Mapping[str, Any]


class Unusable(ValueError):
    """A checkpoint that cannot be gone on from. The message says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`latents`, float32 of shape (1, 12, T, h, w), as they are after `step` steps."""

    step: int
    latents: Latents


def of_request(request: Run) -> dict[str, Any]:
    """The request's part of a stamp."""
    return {name: getattr(request, name) for name in REQUESTED}


def of_configuration(config: Configure) -> dict[str, Any]:
    """The part of a stamp that holds for the life of a rank: its options, the files it loads."""
    facts = {name: getattr(config, name) for name in CONFIGURED}
    return facts | {"app": __version__, "model": fingerprint(Path(config.model).expanduser())}


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes and times of the files below `folder`, links followed, without
    hidden ones."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).parts for path in files]
    known = [
        (parts, stat.st_size, stat.st_mtime_ns)
        for parts, stat in zip(names, (path.stat() for path in files), strict=True)
        if not any(part.startswith(".") for part in parts)
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def write(path: Path, checkpoint: Checkpoint, stamp: Stamp) -> None:
    """Leave a checkpoint at `path`, in place of an older one; durable on return. Its folder is made
    if there is none.

    Raises:
        OSError: the disk refuses; the older one is still there.
    """
    metadata = {
        "format": str(FORMAT),
        "step": str(checkpoint.step),
        "stamp": json.dumps(stamp),
        "sha256": digest(checkpoint.latents),
    }
    content = safetensors.numpy.save({TENSOR: checkpoint.latents}, metadata)
    folder, unfinished = path.parent, path.with_suffix(".tmp")
    if not folder.is_dir():
        folder.mkdir()
        fsync(folder.parent)
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    fsync(folder)


def read(path: Path, stamp: Stamp, shape: tuple[int, ...]) -> Checkpoint | None:
    """The checkpoint at `path` for a run of this stamp, whose latents have this shape.

    None if there is none, or none that can be gone on from: that one is removed with its folder,
    and the log says why.
    """
    try:
        return parse(path, stamp, shape)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("job %s: its checkpoint is not used: %s", path.parent.name, reason(error))
        shutil.rmtree(path.parent, ignore_errors=True)
        return None


def parse(path: Path, stamp: Stamp, shape: tuple[int, ...]) -> Checkpoint:
    """The checkpoint in a file.

    Raises:
        Unusable: it is not one for this stamp and shape.
        OSError, SafetensorError, ValueError, KeyError, TypeError: it is none at all, or torn.
    """
    path.stat()  # the library's own error for a missing file has no errno
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata["format"] != str(FORMAT):
            raise Unusable(f"format {metadata['format']}, expected {FORMAT}")
        written: dict[str, Any] = json.loads(metadata["stamp"])
        mine: dict[str, Any] = json.loads(json.dumps(stamp))
        if written != mine:
            names = sorted(written.keys() | mine.keys())
            other = [name for name in names if written.get(name) != mine.get(name)]
            raise Unusable("of another " + ", ".join(other))
        latents = np.array(file.get_tensor(TENSOR))
    step = int(metadata["step"])
    if not 0 < step < mine["num_inference_steps"]:
        raise Unusable(f"after step {step} of {mine['num_inference_steps']}")
    if latents.dtype != np.float32 or latents.shape != shape:
        raise Unusable(f"latents of {latents.dtype} {latents.shape}, expected float32 {shape}")
    if digest(latents) != metadata["sha256"]:
        raise Unusable("its numbers are not those that were written")
    return Checkpoint(step, latents)


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its path."""
    if isinstance(error, Unusable):
        return str(error)
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def digest(latents: Latents) -> str:
    """SHA-256 of the numbers."""
    return hashlib.sha256(np.ascontiguousarray(latents).data).hexdigest()


class CheckpointWriter:
    """The checkpoints of one run: one every `every` steps, written while the next step computes.

    Nothing that the disk does fails the run.
    """

    def __init__(self, path: Path, every: int, stamp: Stamp) -> None:
        self._path = path
        self._every = every
        self._stamp = stamp
        self._writing: threading.Thread | None = None
        self._allowed_seconds = WRITE_SECONDS

    def resume(self, shape: tuple[int, ...]) -> Checkpoint | None:
        """Where an earlier attempt at this run came to; see `read`."""
        return read(self._path, self._stamp, shape)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be left after `step`, which is not the last one."""
        return step % self._every == 0

    def keep(self, step: int, latents: Latents) -> None:
        """Begin to write a checkpoint; `latents` must not be changed any more."""
        self.settle()
        if self._writing is None:  # else the disk hangs on an earlier one
            checkpoint = Checkpoint(step, latents)
            self._writing = threading.Thread(target=self._write, args=(checkpoint,), daemon=True)
            self._writing.start()

    def settle(self) -> None:
        """Wait for the write that is under way, though not for ever.

        Before a step is told, so that whoever heard of it knows what is on the disk.
        """
        if self._writing is not None:
            self._writing.join(self._allowed_seconds)
            self._allowed_seconds = 0.0  # of a write that hangs, the run waits once
            if not self._writing.is_alive():
                self._writing, self._allowed_seconds = None, WRITE_SECONDS

    def _write(self, checkpoint: Checkpoint) -> None:
        where = f"job {self._path.parent.name}, step {checkpoint.step}"
        if not np.isfinite(checkpoint.latents).all():
            logger.warning("%s: no checkpoint of numbers that are not finite", where)
            return
        try:
            write(self._path, checkpoint, self._stamp)
        except OSError as error:
            logger.warning("%s: no checkpoint was left: %s", where, error.strerror or error)

"""A history of generated jobs, written straight into the store: 100k of them in seconds.

Prompts are sentences of common words, with a few words out of 20,000 that follow Zipf's law, as
the words of people do. Most jobs are COMPLETED; some failed, were cancelled, starred or deleted,
and the newest wait. The same count gives the same jobs, but for the random tails of their ids.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.store.checks import JOB
from mochi_app.store.database import RecordStore

YEAR = 365 * 86400.0
BATCH = 5000  # rows in one transaction
MOST_PENDING = 500
RARE_WORDS = 20_000

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "orange", "white", "black", "grey", "pink",
)  # fmt: skip
THINGS = (
    "circle", "ring", "ball", "triangle", "square", "star", "cat", "dog", "boat", "train", "robot",
)  # fmt: skip
MOVES = ("rolls", "jumps", "turns", "grows", "shrinks", "rises", "falls", "flickers", "waits")
SCENES = ("at night", "in the rain", "under water", "from above", "in slow motion", "on a beach")


def fill(data_dir: Path, count: int) -> float:
    """Write `count` jobs into the empty data folder; the seconds it took."""
    started = time.perf_counter()
    data_dir.mkdir(parents=True, exist_ok=True)
    store = RecordStore(data_dir)
    store.open()
    jobs = generated(count)
    while batch := list(islice(jobs, BATCH)):
        store.write({JOB + job.id: job.to_record() for job in batch})
    store.close(count)
    return time.perf_counter() - started


def queue_up(data_dir: Path, count: int, prompt: str, **shape: Any) -> list[str]:
    """Write `count` jobs that wait, of the smallest size, into an empty data folder; their ids."""
    data_dir.mkdir(parents=True, exist_ok=True)
    small = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 64}
    shape = parameters(random.Random(0)) | {"kind": "preview"} | small | shape
    ids, now = JobIds(), time.time()
    jobs = [
        Job(id=ids.draw(), prompt=prompt, submitted_at=now, **shape, **waiting())
        for _ in range(count)
    ]
    store = RecordStore(data_dir)
    store.open()
    store.write({JOB + job.id: job.to_record() for job in jobs})
    store.close(count)
    return [job.id for job in jobs]


def generated(count: int, seed: int = 0) -> Iterator[Job]:
    """`count` jobs of the past year, oldest first."""
    draw = random.Random(seed)
    now = time.time()
    times = sorted(now - draw.random() * YEAR for _ in range(count))
    clock = iter(times)
    ids = JobIds(clock=lambda: next(clock))
    vocabulary = [rare_word(draw) for _ in range(RARE_WORDS)]
    zipf = list(accumulate(1 / rank for rank in range(1, RARE_WORDS + 1)))
    pending = min(MOST_PENDING, count // 100)
    for index, submitted_at in enumerate(times):
        rare = draw.choices(vocabulary, cum_weights=zipf, k=4)
        waits = index >= count - pending
        yield Job(
            id=ids.draw(),
            prompt=sentence(draw, rare),
            submitted_at=submitted_at,
            **parameters(draw),
            **(waiting() if waits else ended(draw, submitted_at, now)),
        )


def rare_word(draw: random.Random) -> str:
    """A word of two to four syllables."""
    return "".join(
        draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(2, 4))
    )


def sentence(draw: random.Random, rare: list[str]) -> str:
    """A prompt such as people write, of 12 words or so."""
    subject = f"a {draw.choice(COLOURS)} {draw.choice(THINGS)} {draw.choice(MOVES)}"
    return f"{subject} {draw.choice(SCENES)}, {' '.join(rare)}, {draw.choice(COLOURS)} light"


def parameters(draw: random.Random) -> dict[str, Any]:
    """What is asked for, but for the prompt: one in five is an enhance."""
    enhance = draw.random() < 0.2
    return {
        "kind": "enhance" if enhance else "preview",
        "negative_prompt": "",
        "seed": draw.getrandbits(32),
        "num_inference_steps": 64 if enhance else 8,
        "guidance_scale": 3.0,
        "height": 96,
        "width": 96,
        "num_frames": 31,
        "fps": 12,
        "model": "tiny-mochi",
    }


def waiting() -> dict[str, Any]:
    """The state of a job that has not begun."""
    return {"status": JobStatus.PENDING}


def ended(draw: random.Random, submitted_at: float, now: float) -> dict[str, Any]:
    """The state of a job that is over: 90 % COMPLETED, 3 % starred, 1 % in the trash since now."""
    status = draw.choices(
        (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED), weights=(90, 4, 6)
    )[0]
    done = status is JobStatus.COMPLETED
    return {
        "status": status,
        "started_processing_at": submitted_at + 1,
        "completed_processing_at": submitted_at + 1 + draw.random() * 60,
        "attempts": 1,
        "slot": 0,
        "error": "the engine died" if status is JobStatus.FAILED else None,
        "starred": draw.random() < 0.03,
        "deleted_at": now if draw.random() < 0.01 else None,
        "seconds": {"text": 0.02, "denoise": 2.1, "decode": 0.6, "encode": 0.3} if done else {},
        "hashes": {"frames": f"{draw.getrandbits(256):064x}"} if done else {},
        "video": "video.mp4" if done else None,
        "poster": "poster.webp" if done else None,
    }

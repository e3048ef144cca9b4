"""The in-memory index beside a plain list of the same jobs, whatever is done to both."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from mochi_app.jobs import Job, JobStatus
from mochi_app.store.job_index import JobIndex, JobQuery

SHAPES = ("circle", "square", "triangle", "ring")


def drawn(chance: random.Random, number: int) -> Job:
    return Job(
        id=f"{number:014x}-{'0' * 16}",
        kind=chance.choice(["preview", "enhance"]),
        prompt=f"a {chance.choice(SHAPES)} of number {number % 7}",
        negative_prompt="",
        seed=number,
        num_inference_steps=8,
        guidance_scale=4.5,
        height=64,
        width=64,
        num_frames=7,
        fps=12,
        submitted_at=float(number),
        status=chance.choice(list(JobStatus)),
        starred=chance.random() < 0.2,
        deleted_at=1.0 if chance.random() < 0.2 else None,
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_answers_as_a_plain_list_does(seed: int) -> None:
    chance = random.Random(seed)
    index, plain = JobIndex(), dict[str, Job]()
    numbers = [chance.randrange(10_000) for _ in range(200)]  # out of order, some twice
    for number in numbers:
        job = drawn(chance, number)
        if (known := plain.get(job.id)) is not None:
            job = replace(job, prompt=known.prompt)
        index.put(job)
        plain[job.id] = job
        if chance.random() < 0.2:
            gone = chance.choice(list(plain))
            index.remove(gone)
            del plain[gone]
    shown = [job for job in plain.values() if job.deleted_at is None]
    counted = Counter(job.status for job in shown)
    assert index.counts() == {status: counted[status] for status in JobStatus}
    for status in JobStatus:
        query = JobQuery(status=frozenset({status}), text="ring num", page_size=100)
        expected = [
            job.id for job in shown if job.status is status and "ring" in job.prompt.split()
        ]
        assert [job.id for job in index.page(query).jobs] == sorted(expected, reverse=True)


def test_it_counts_what_moves_the_listings() -> None:
    index, job = JobIndex(), replace(drawn(random.Random(0), 1), deleted_at=None, starred=False)
    counted = []

    def after(change: Callable[[], None]) -> None:
        change()
        counted.append((index.revisions.listed, index.revisions.marked))

    after(lambda: index.put(job))
    after(lambda: index.put(replace(job, starred=True)))
    after(lambda: index.put(replace(job, starred=True, note="seen")))
    after(lambda: index.put(replace(job, deleted_at=1.0)))
    after(lambda: index.put(job))
    after(lambda: index.put(replace(job, status=JobStatus.CANCELLED)))
    after(lambda: index.remove(job.id))
    after(lambda: index.remove(job.id))
    assert counted == [(1, 0), (1, 1), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2), (4, 2)]

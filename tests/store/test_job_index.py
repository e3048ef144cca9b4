"""The in-memory index beside a plain list of the same jobs, whatever is done to both."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mochi_app.jobs import Job, JobStatus
from mochi_app.request import RequestError
from mochi_app.store.history import History
from mochi_app.store.job_index import JobIndex, JobPage, JobQuery, words
from tests.histories import Open, completed, ids, job_id, make

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


class TestListing:
    @pytest.fixture
    async def listed(self, opened: Open) -> History:
        history = await opened()
        await asyncio.gather(
            history.add(make(1, "A small RED circle")),
            history.add(completed(2, prompt="a redwood forest, Straße im Café", starred=True)),
            history.add(completed(3, prompt="red sun", kind="enhance", parent_id=job_id(2))),
            history.add(make(4, "blue circle, circling", status=JobStatus.FAILED)),
            history.add(completed(5, prompt="赤い丸 red")),
        )
        return history

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("", [5, 4, 3, 2, 1]),
            ("  ", [5, 4, 3, 2, 1]),
            ("red", [5, 3, 2, 1]),
            ("red s", [3, 1]),
            ("circle red", [1]),
            ("red circle", [1]),
            ("circ", [4, 1]),
            ("circ blue", []),
            ("STRASSE", [2]),
            ("cafe\u0301", [2]),
            ("丸", [5]),
            ("赤丸", [5]),
            ("zebra", []),
            ("!?", []),
            ("% _ * '", []),
        ],
    )
    async def test_text(self, listed: History, text: str, found: list[int]) -> None:
        page = listed.list(JobQuery(text=text))
        assert (ids(page.jobs), page.total) == (found, len(found))

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            (JobQuery(status=frozenset({JobStatus.COMPLETED})), [5, 3, 2]),
            (JobQuery(status=frozenset({JobStatus.PENDING, JobStatus.FAILED})), [4, 1]),
            (JobQuery(status=frozenset()), []),
            (JobQuery(status=frozenset({JobStatus.COMPLETED}), text="red s"), [3]),
            (JobQuery(starred=True), [2]),
            (JobQuery(starred=False), [5, 4, 3, 1]),
            (JobQuery(kind="enhance"), [3]),
            (JobQuery(kind="preview", text="red"), [5, 2, 1]),
            (JobQuery(deleted=True), []),
        ],
    )
    async def test_filters(self, listed: History, query: JobQuery, found: list[int]) -> None:
        assert ids(listed.list(query).jobs) == found

    async def test_lookups(self, listed: History) -> None:
        assert ids(listed.with_status(JobStatus.PENDING, JobStatus.FAILED)) == [1, 4]
        assert ids(listed.children(job_id(2))) == [3]
        assert ids(listed.evictable()) == [3, 5]
        assert ids(listed.evictable(1)) == [3]
        assert listed.count(JobStatus.COMPLETED) == 3
        assert listed.counts() == {
            JobStatus.CREATED: 0,
            JobStatus.PENDING: 1,
            JobStatus.PROCESSING: 0,
            JobStatus.COMPLETED: 3,
            JobStatus.FAILED: 1,
            JobStatus.CANCELLED: 0,
        }

    async def test_trash_and_restore(self, listed: History, opened: Open) -> None:
        await listed.update(job_id(3), lambda job: replace(job, deleted_at=1.0))
        for history in (listed, await opened()):
            assert ids(history.list(JobQuery()).jobs) == [5, 4, 2, 1]
            assert ids(history.list(JobQuery(text="red s", deleted=True)).jobs) == [3]
            assert ids(history.trashed()) == [3]
            assert ids(history.evictable()) == [5]
            assert history.children(job_id(2)) == []
            assert history.count(JobStatus.COMPLETED) == 2
            assert history.get(job_id(3)) is not None
            assert len(history) == 5
        await history.update(job_id(3), lambda job: replace(job, deleted_at=None))
        assert ids(history.list(JobQuery()).jobs) == [5, 4, 3, 2, 1]
        assert history.trashed() == []

    async def test_evicted_and_starred_videos_are_not_evictable(self, listed: History) -> None:
        await listed.update(job_id(3), lambda job: replace(job, evicted_at=1.0))
        await listed.update(job_id(5), lambda job: replace(job, starred=True))
        await listed.update(job_id(2), lambda job: replace(job, starred=False))
        assert ids(listed.evictable()) == [2]

    async def test_pages(self, history: History) -> None:
        await asyncio.gather(*(history.add(make(number)) for number in range(1, 1002)))
        seen: list[int] = []
        for page in range(1, 43):
            seen += ids(history.list(JobQuery(page=page)).jobs)
        assert seen == list(range(1001, 0, -1))
        deepest = history.list(JobQuery(text="red", page=42))
        assert (ids(deepest.jobs), deepest.total) == (list(range(17, 0, -1)), 1001)
        beyond = history.list(JobQuery(page=10**9, page_size=100))
        assert beyond == JobPage(jobs=(), total=1001, page=10**9, page_size=100)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"page": 0}, "page: got 0, expected a whole number from 1"),
            ({"page": -1}, "page: got -1"),
            ({"page": 1.5}, "page: got 1.5"),
            ({"page": float("nan")}, "page: got nan"),
            ({"page": "1"}, "page: got '1'"),
            ({"page_size": 0}, "page_size: got 0"),
            ({"page_size": 101}, "page_size: got 101, expected a whole number from 1 to 100"),
            ({"text": "x" * 501}, "query: got"),
            ({"text": None}, "query: got None"),
            ({"kind": "video"}, "kind: got 'video', expected preview or enhance"),
        ],
    )
    def test_bad_queries_are_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            JobQuery(**fields)

    async def test_an_integral_float_pages_like_an_int(self, listed: History) -> None:
        assert ids(listed.list(JobQuery(page=2.0, page_size=2.0)).jobs) == [3, 2]  # type: ignore[arg-type]

    async def test_an_empty_history_answers(self, history: History) -> None:
        assert history.list(JobQuery(text="red")).total == 0
        assert history.with_status(JobStatus.PENDING) == history.trashed() == []
        assert set(history.counts().values()) == {0}

    async def test_against_a_plain_search(self, opened: Open) -> None:
        """Random adds (out of order), changes and removes; every answer as a walk gives it."""
        rng = random.Random(3)
        vocabulary = ["red", "reed", "blue", "blur", "circle", "circus", "sun", "sunny"]
        history, model = await opened(), dict[str, Job]()
        for number in rng.sample(range(1, 400), 200):
            prompt = " ".join(rng.choices(vocabulary, k=3))
            job = make(number, prompt, status=rng.choice(list(JobStatus)))
            model[job.id] = await history.add(job)
        for key in rng.sample(sorted(model), 120):
            if rng.random() < 0.4:
                await history.remove(key)
                del model[key]
            else:
                changes = {"starred": rng.random() < 0.5, "deleted_at": rng.choice([None, 1.0])}
                model[key] = await history.update(key, lambda job, c=changes: replace(job, **c))  # type: ignore[misc]
        unused = sorted({*range(1, 420)} - {int(key[:14], 16) for key in model})
        for number in rng.sample(unused, 60):  # between and in place of removed ones
            model[job_id(number)] = await history.add(make(number, rng.choice(vocabulary)))
        for current in (history, await opened()):
            for _ in range(100):
                query = JobQuery(
                    status=rng.choice([None, frozenset(rng.sample(list(JobStatus), 2))]),
                    text=rng.choice(["", "re", "red", "sun", "blue ci", "circle red s"]),
                    starred=rng.choice([None, True, False]),
                    deleted=rng.random() < 0.3,
                    page=rng.randint(1, 3),
                )
                assert current.list(query) == plain_search(model, query)


def plain_search(model: dict[str, Job], query: JobQuery) -> JobPage:
    *whole, last = words(query.text) or [""]

    def fits(job: Job) -> bool:
        used = words(job.prompt)
        return (
            (query.status is None or job.status in query.status)
            and (query.starred is None or job.starred == query.starred)
            and (job.deleted_at is not None) == query.deleted
            and all(word in used for word in whole)
            and any(word.startswith(last) for word in used)
        )

    found = [model[key] for key in sorted(model, reverse=True) if fits(model[key])]
    start = (query.page - 1) * query.page_size
    jobs = tuple(found[start : start + query.page_size])
    return JobPage(jobs=jobs, total=len(found), page=query.page, page_size=query.page_size)

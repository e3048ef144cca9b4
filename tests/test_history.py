"""The history on a real disk: what is kept, what is refused, what is found again."""

# ruff: noqa: ASYNC220, ASYNC240 - a test may hold up its own loop

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.request import Conflict, NotFound, RequestError
from mochi_app.store import checks
from mochi_app.store import database as record_store
from mochi_app.store import history as history_module
from mochi_app.store.checks import RecordDisk
from mochi_app.store.history import History
from mochi_app.store.job_index import JobPage, JobQuery, words
from mochi_app.store.lock import HistoryLocked
from tests.conftest import eventually

ROOT = Path(__file__).resolve().parent.parent
Open = Callable[[], Awaitable[History]]


def job_id(number: int) -> str:
    return f"{number:014x}-{number:016x}"


def make(number: int, prompt: str = "a small red circle", **fields: Any) -> Job:
    values: dict[str, Any] = {
        "id": job_id(number),
        "kind": "preview",
        "prompt": prompt,
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 8,
        "guidance_scale": 4.5,
        "height": 64,
        "width": 64,
        "num_frames": 7,
        "fps": 30,
        "submitted_at": 1.7e9 + number,
        "status": JobStatus.PENDING,
    }
    return Job(**(values | fields))


def completed(number: int, **fields: Any) -> Job:
    return make(number, status=JobStatus.COMPLETED, video=f"{job_id(number)}.mp4", **fields)


def ids(jobs: Any) -> list[int]:
    return [int(job.id[:14], 16) for job in jobs]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the history of this test, closing the one before."""
    stack = contextlib.AsyncExitStack()

    async def reopen() -> History:
        await stack.aclose()
        history = await History.open(tmp_path / "data")
        stack.push_async_callback(history.close)
        return history

    yield reopen
    await stack.aclose()


@pytest.fixture
async def history(opened: Open) -> History:
    return await opened()


def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history" / "cache.db"


@contextlib.contextmanager
def by_hand(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), connection:
        yield connection


class TestKeeping:
    async def test_a_job_survives_a_restart_field_by_field(self, opened: Open) -> None:
        job = make(
            1,
            "Ein Fisch mit 火 and \u202etext\nover lines",
            request_id="r",
            owner="o",
            options={"a": [1, {"b": None}]},
            seconds={"load": 1.5},
            note="n" * 40_000,
            starred=True,
        )
        history = await opened()
        assert await history.add(job) == job
        history = await opened()
        assert history.get(job.id) == job
        assert history.find_request("o", "r") == job
        assert history.find_request("p", "r") is None

    async def test_update_replaces_the_newest_state(self, opened: Open) -> None:
        history = await opened()
        await history.add(make(1))

        def attempt(job: Job) -> Job:
            return replace(job, attempts=job.attempts + 1)

        await asyncio.gather(*(history.update(job_id(1), attempt) for _ in range(250)))
        assert history.get(job_id(1)).attempts == 250  # type: ignore[union-attr]
        history = await opened()
        assert history.get(job_id(1)).attempts == 250  # type: ignore[union-attr]

    async def test_update_of_an_absent_job(self, history: History) -> None:
        with pytest.raises(NotFound, match="no such job"):
            await history.update("../etc", lambda job: job)
        with pytest.raises(NotFound, match="no such job"):
            await history.remove(job_id(9))

    async def test_a_change_that_raises_writes_nothing(self, opened: Open) -> None:
        history = await opened()
        await history.add(make(1))

        def refuse(job: Job) -> Job:
            raise LookupError("not this one")

        outcomes = await asyncio.gather(
            history.update(job_id(1), lambda job: replace(job, note="before")),
            history.update(job_id(1), refuse),
            history.update(job_id(1), lambda job: replace(job, note=job.note + " and after")),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], LookupError)
        assert outcomes[2].note == "before and after"  # type: ignore[union-attr]
        history = await opened()
        assert history.get(job_id(1)).note == "before and after"  # type: ignore[union-attr]

    async def test_what_cannot_be_written_spoils_no_other_write(self, history: History) -> None:
        outcomes = await asyncio.gather(
            history.add(make(1, options={"bad": object()})),
            history.add(make(2, prompt="lone \ud800 surrogate")),
            history.add(make(3)),
            return_exceptions=True,
        )
        assert [type(outcome) is Job for outcome in outcomes] == [False, False, True]
        assert len(history) == 1

    async def test_a_terminal_status_and_the_request_are_for_ever(self, history: History) -> None:
        await history.add(completed(1))
        with pytest.raises(Conflict, match="is COMPLETED: it cannot become PENDING"):
            await history.update(job_id(1), lambda job: replace(job, status=JobStatus.PENDING))
        with pytest.raises(ValueError, match="prompt cannot change"):
            await history.update(job_id(1), lambda job: replace(job, prompt="other"))

    async def test_the_index_shares_nothing_with_the_caller(self, history: History) -> None:
        seconds = {"load": 1.0}
        await history.add(make(1, seconds=seconds))
        seconds["load"] = 2.0
        assert history.get(job_id(1)).seconds == {"load": 1.0}  # type: ignore[union-attr]

    async def test_last_id_outlives_its_job(self, opened: Open) -> None:
        history = await opened()
        assert history.last_id is None
        for number in (5, 9, 7):
            await history.add(make(number))
        await history.remove(job_id(9))
        history = await opened()
        assert history.last_id == job_id(9)
        assert JobIds(history.last_id, clock=lambda: 0.0).draw() > job_id(9)

    async def test_remove_takes_the_request_id_with_it(self, opened: Open, tmp_path: Path) -> None:
        history = await opened()
        await history.add(make(1, request_id="r", owner='o"'))
        with by_hand(database(tmp_path)) as rows:
            keys = [key for (key,) in rows.execute("SELECT key FROM Cache ORDER BY key")]
        assert keys == [f"job:{job_id(1)}", "meta", r'request:["o\"","r"]']
        await history.remove(job_id(1))
        assert history.find_request('o"', "r") is None
        await history.add(make(2, request_id="r", seed=8))
        await history.remove(job_id(2))
        history = await opened()
        assert len(history) == 0
        await history.close()
        with by_hand(database(tmp_path)) as rows:
            assert rows.execute("SELECT key FROM Cache").fetchall() == [("meta",)]


class TestRequestIds:
    async def test_same_request_twice_is_one_job(self, opened: Open) -> None:
        history = await opened()
        first = await history.add(make(1, request_id="r"))
        assert await history.add(make(2, request_id="r")) == first
        history = await opened()
        assert await history.add(make(3, request_id="r")) == first
        assert len(history) == 1

    async def test_another_request_names_the_fields(self, history: History) -> None:
        await history.add(make(1, request_id="r"))
        with pytest.raises(Conflict, match=r"'r' made job .* with another prompt, seed,"):
            await history.add(make(2, "other", request_id="r", seed=1))

    async def test_drawn_fields_do_not_count(self, history: History) -> None:
        first = await history.add(make(1, request_id="r", seed=1), drawn=frozenset({"seed"}))
        again = make(2, request_id="r", seed=2)
        assert await history.add(again, drawn=frozenset({"seed"})) == first
        with pytest.raises(Conflict, match="another seed,"):
            await history.add(again)

    async def test_owners_do_not_share_request_ids(self, history: History) -> None:
        await history.add(make(1, request_id="r", owner="a"))
        await history.add(make(2, request_id="r", owner="b", seed=1))
        await history.add(make(3))
        await history.add(make(4))
        assert len(history) == 4

    async def test_concurrent_adds_make_one_job(self, opened: Open) -> None:
        history = await opened()
        jobs = await asyncio.gather(
            *(history.add(make(number, request_id="r", owner="o")) for number in range(1, 151))
        )
        assert {job.id for job in jobs} == {job_id(1)}
        history = await opened()
        assert len(history) == 1

    async def test_an_id_is_never_given_twice(self, history: History) -> None:
        await history.add(make(1))
        with pytest.raises(Conflict, match="exists already"):
            await history.add(make(1, "other"))


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


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["BOMB"]),)


class TestRecordDisk:
    async def test_a_pickled_row_is_refused_and_not_run(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bomb = tmp_path / "exploded"
        monkeypatch.setenv("BOMB", str(bomb))
        history = await opened()
        await history.add(make(1))
        await history.close()
        with by_hand(database(tmp_path)) as rows:
            rows.execute("UPDATE Cache SET mode=4, value=? WHERE key=?", (
                pickle.dumps(Bomb()), f"job:{job_id(1)}",
            ))  # fmt: skip
        with pytest.raises(HistoryError, match="mode 4 was not written by this app"):
            await opened()
        assert not bomb.exists()

    @pytest.mark.parametrize(
        ("mode", "filename", "value"),
        [(4, None, b"x"), (2, "a.val", None), (3, "a.val", None), (1, None, b"{}"), (1, None, 5)],
    )
    def test_only_its_own_rows_are_read(
        self, tmp_path: Path, mode: int, filename: str | None, value: Any
    ) -> None:
        disk = RecordDisk(str(tmp_path))
        with pytest.raises(HistoryError, match="was not"):
            disk.fetch(mode, filename, value, False)
        with pytest.raises(HistoryError, match="no JSON"):
            disk.fetch(1, None, "{", False)
        with pytest.raises(HistoryError, match="no text key"):
            disk.get(pickle.dumps("key"), 0)
        with pytest.raises(TypeError, match="texts"):
            disk.put(("a", 1))

    async def test_large_records_stay_in_the_database(
        self, history: History, tmp_path: Path
    ) -> None:
        long = "x" * 200_000
        assert RecordDisk(str(tmp_path), min_file_size=1).store(long, False)[2] is None
        await history.add(make(1, options={"long": long}))
        names = {path.name for path in (tmp_path / "data" / "history").rglob("*")}
        assert names <= {"cache.db", "cache.db-wal", "cache.db-shm", "store.json"}

    async def test_nothing_is_evicted_and_commits_are_full(
        self, history: History, tmp_path: Path
    ) -> None:
        await history.close()
        with by_hand(database(tmp_path)) as rows:
            settings = dict(rows.execute("SELECT key, value FROM Settings").fetchall())
        assert settings["eviction_policy"] == "none"
        assert settings["cull_limit"] == 0
        assert settings["size_limit"] >= 2**60
        assert settings["sqlite_synchronous"] == 2
        assert settings["statistics"] == 0


async def refused(opened: Open, message: str) -> None:
    with pytest.raises(HistoryError, match=message):
        await opened()


class TestDamage:
    @pytest.fixture
    async def full(self, opened: Open, tmp_path: Path) -> Path:
        """The database of a history of 300 jobs, closed."""
        history = await opened()
        await asyncio.gather(*(history.add(make(number)) for number in range(1, 301)))
        await history.close()
        return database(tmp_path)

    async def test_a_zero_byte_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(b"")
        await refused(opened, r"missing, empty, or not the history .* \(of 300 jobs\): restore")
        assert full.stat().st_size == 0  # left as it was found

    async def test_a_missing_database(self, opened: Open, full: Path) -> None:
        full.unlink()
        await refused(opened, "missing, empty, or not the history")
        assert not full.exists()

    async def test_a_swapped_database(self, opened: Open, full: Path, tmp_path: Path) -> None:
        other = await History.open(tmp_path / "other")
        await other.close()
        full.write_bytes((tmp_path / "other" / "history" / "cache.db").read_bytes())
        await refused(opened, "not the history that was here")

    async def test_garbage_for_a_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(b"garbage!" * 4096)
        await refused(opened, "not a database; restore a backup")

    async def test_garbage_in_the_middle(self, opened: Open, full: Path) -> None:
        content = bytearray(full.read_bytes())
        middle = len(content) // 2 // 4096 * 4096
        content[middle : middle + 8192] = os.urandom(8192)
        full.write_bytes(content)
        await refused(opened, "restore a backup")

    async def test_damage_where_no_record_is_read(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            find = "SELECT rootpage FROM sqlite_master WHERE name = 'Cache_expire_time'"
            ((page,),) = rows.execute(find).fetchall()
            ((size,),) = rows.execute("PRAGMA page_size").fetchall()
        content = bytearray(full.read_bytes())
        content[(page - 1) * size : page * size] = os.urandom(size)
        full.write_bytes(content)
        await refused(opened, "is damaged .* restore a backup")

    async def test_another_letter_in_one_record(self, opened: Open, full: Path) -> None:
        content = full.read_bytes()
        full.write_bytes(content.replace(b"red circle", b"rad circle", 1))
        await refused(opened, "history row 'job:.* was changed on the disk: restore a backup")

    async def test_a_row_that_has_gone_missing(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute("DROP TRIGGER Settings_count_delete")
            rows.execute("DELETE FROM Cache WHERE key = ?", (f"job:{job_id(7)}",))
        await refused(opened, r"is damaged \(300 rows and 300 in its index, 301 were written\)")

    async def test_a_truncated_database(self, opened: Open, full: Path) -> None:
        full.write_bytes(full.read_bytes()[: full.stat().st_size // 2])
        await refused(opened, "restore a backup")

    async def test_a_record_that_cannot_be_read(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL, value='{\"schema\":99}' WHERE key LIKE 'job:%'"
            )
        await refused(opened, "cannot be read: it is no record of that job")

    async def test_a_record_of_a_later_version(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL, value=json_set(value, '$.schema', 99)"
                " WHERE key LIKE 'job:%'"
            )
        await refused(opened, "schema 99")

    async def test_a_record_of_an_earlier_version(self, opened: Open, full: Path) -> None:
        with by_hand(full) as rows:
            rows.execute(
                "UPDATE Cache SET tag=NULL,"
                " value=json_remove(value, '$.schema', '$.note', '$.options')"
                " WHERE key LIKE 'job:%'"
            )
        history = await opened()
        assert history.get(job_id(1)) == make(1)

    async def test_a_damaged_sentinel_beside_a_sound_database(
        self, opened: Open, full: Path
    ) -> None:
        (full.parent / "store.json").write_bytes(b"\x00\x00")
        assert len(await opened()) == 300
        (full.parent / "store.json").unlink()
        assert len(await opened()) == 300

    async def test_a_first_start_cut_short_is_begun_again(
        self, opened: Open, tmp_path: Path
    ) -> None:
        database(tmp_path).parent.mkdir(parents=True)
        database(tmp_path).write_bytes(b"")
        assert len(await opened()) == 0

    async def test_a_data_folder_that_is_a_file(self, opened: Open, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("not a folder")
        await refused(opened, "cannot open the history in .*data/history: .*directory")

    async def test_a_refused_open_leaves_the_folder_free(self, opened: Open, full: Path) -> None:
        content = full.read_bytes()
        full.write_bytes(b"")
        await refused(opened, "missing, empty")
        full.write_bytes(content)
        assert len(await opened()) == 300


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the kernel's own write error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestWriteErrors:
    async def test_a_disk_that_takes_no_more(self, opened: Open, tmp_path: Path) -> None:
        history = await opened()
        await history.add(make(1))
        size = database(tmp_path).with_name("cache.db-wal").stat().st_size
        with file_size_limit(max(size, 40_960)):
            for _ in range(2):
                with pytest.raises(HistoryError, match="cannot write to the history"):
                    await history.add(make(2, options={"long": "x" * 100_000}))
                assert ids(history.list(JobQuery()).jobs) == [1]
            with pytest.raises(HistoryError, match="cannot write to the history"):
                await history.update(job_id(1), lambda job: replace(job, note="y" * 100_000))
            assert history.get(job_id(1)) == make(1)
        await history.add(make(3))
        assert ids((await opened()).list(JobQuery()).jobs) == [3, 1]

    async def test_locked_by_another_program(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record_store, "BUSY_SECONDS", 0.1)
        history = await opened()
        await history.add(make(1))
        other = sqlite3.connect(database(tmp_path), isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(HistoryError, match="locked; close the other program"):
                await history.add(make(2))
            assert ids(history.list(JobQuery()).jobs) == [1]
            await refused(opened, "cannot open the history .* locked; close the other program")
        assert ids((await opened()).list(JobQuery()).jobs) == [1]

    async def test_what_ails_is_told_until_it_heals_by_itself(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record_store, "BUSY_SECONDS", 0.05)
        monkeypatch.setattr(history_module, "HEAL_SECONDS", 0.01)
        history = await opened()
        other = sqlite3.connect(database(tmp_path), isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(HistoryError, match="locked"):
                await history.add(make(1))
            assert history.problem == (
                "cannot write to the history: database is locked; close the other program that has"
                " the database open"
            )
        await eventually(lambda: history.problem is None)
        assert history.get(job_id(1)) is None

    async def test_a_transaction_left_open(self, history: History) -> None:
        """As a failed commit may leave it: the next write fails, the one after it does not."""
        await history._run(lambda: history._store._cache._sql("BEGIN"))
        with pytest.raises(HistoryError, match="cannot write to the history"):
            await history.add(make(1))
        assert await history.add(make(2))
        assert ids(history.list(JobQuery()).jobs) == [2]

    async def test_the_first_error_is_the_one_told(self, history: History) -> None:
        """The rollback after it fails as well, and says less."""
        spoil = (
            "CREATE TRIGGER spoil BEFORE INSERT ON Cache BEGIN "
            "SELECT RAISE(ROLLBACK, 'database or disk is full'); END"
        )
        await history._run(lambda: history._store._cache._sql(spoil))
        with pytest.raises(HistoryError, match="disk is full; free some disk space"):
            await history.add(make(1))
        await history._run(lambda: history._store._cache._sql("DROP TRIGGER spoil"))
        assert await history.add(make(1))

    async def test_a_write_that_failed_after_it_was_made(
        self, history: History, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = record_store.RecordStore.write

        def made_and_failed(store: record_store.RecordStore, rows: checks.Rows) -> None:
            write(store, rows)
            raise HistoryError("the disk did not say so")

        with monkeypatch.context() as patch:
            patch.setattr(record_store.RecordStore, "write", made_and_failed)
            with pytest.raises(HistoryError, match="did not say so"):
                await history.add(make(1, request_id="r"))
        assert history.get(job_id(1)) == make(1, request_id="r")
        assert (await history.add(make(2, request_id="r"))).id == job_id(1)

    async def test_a_read_only_database(self) -> None:
        """In a child without root's rights, since root may write anywhere."""
        program = """
            import asyncio, os, sys
            from pathlib import Path
            from mochi_app.history import History, HistoryError

            if os.getuid() == 0:
                os.setgid(65534), os.setuid(65534)

            async def main():
                try:
                    await History.open(Path(sys.argv[1]))
                except HistoryError as error:
                    print(error)

            asyncio.run(main())
        """
        with tempfile.TemporaryDirectory() as name:  # tmp_path is for this user only
            data = Path(name) / "data"
            history = await History.open(data)
            await history.close()
            for path, mode in ((data.parent, 0o755), (data, 0o777), (data / "history", 0o777)):
                path.chmod(mode)
            (data / "server.lock").chmod(0o666)
            (data / "history" / "cache.db").chmod(0o444)
            said, _ = run_child(program, data).communicate(timeout=20)
        assert "attempt to write a readonly database; make the folder" in said, said

    async def test_writes_after_close(self, opened: Open) -> None:
        history = await opened()
        await history.add(make(1))
        await history.close()
        await history.close()
        with pytest.raises(HistoryError, match="closed"):
            await history.add(make(2))

    async def test_close_finishes_what_waits(self, opened: Open) -> None:
        history = await opened()
        adding = [asyncio.ensure_future(history.add(make(number))) for number in range(1, 251)]
        await asyncio.sleep(0)
        await history.close()
        assert all(task.done() for task in adding)
        assert len(await opened()) == 250


@contextlib.contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every commit back until the event is set."""
    go, write = threading.Event(), record_store.RecordStore.write

    def held(store: record_store.RecordStore, rows: checks.Rows) -> None:
        assert go.wait(10)
        write(store, rows)

    with monkeypatch.context() as patch:
        patch.setattr(record_store.RecordStore, "write", held)
        yield go
        go.set()


class TestOrderOfThings:
    async def test_nothing_is_seen_before_it_is_on_the_disk(
        self, history: History, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with slow_disk(monkeypatch) as go:
            adding = asyncio.create_task(history.add(make(1, request_id="r")))
            await asyncio.sleep(0.05)  # the loop is free meanwhile
            assert not adding.done()
            assert history.get(job_id(1)) is None
            assert history.find_request("", "r") is None
            again = asyncio.create_task(history.add(make(2, request_id="r")))
            go.set()
            assert await adding == await again

    @pytest.mark.parametrize("action", ["add", "update", "remove"])
    async def test_a_caller_cancelled_in_mid_write(
        self, action: str, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        history = await opened()
        await history.add(make(1))
        with slow_disk(monkeypatch) as go:
            calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "add": lambda: history.add(make(2)),
                "update": lambda: history.update(job_id(1), lambda job: replace(job, note="n")),
                "remove": lambda: history.remove(job_id(1)),
            }
            caller = asyncio.create_task(calls[action]())
            await asyncio.sleep(0.05)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            go.set()
            await history.add(make(3))
        in_memory = history.list(JobQuery())
        assert (await opened()).list(JobQuery()) == in_memory
        assert ids(in_memory.jobs) == {"add": [3, 2, 1], "update": [3, 1], "remove": [3]}[action]
        assert in_memory.jobs[-1].note == ("n" if action == "update" else "")

    async def test_an_open_cancelled_in_the_middle_gives_the_folder_back(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with slow_disk(monkeypatch) as go:
            opening = asyncio.create_task(History.open(tmp_path / "data"))
            await asyncio.sleep(0.1)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            go.set()
        deadline = asyncio.get_running_loop().time() + 5
        while True:
            with contextlib.suppress(HistoryLocked):
                assert len(await opened()) == 0
                break
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)


def run_child(program: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


WRITER = """
    import asyncio, sys
    from pathlib import Path
    from tests.test_history import History, make, replace, job_id

    async def keep_writing(history, first):
        for number in range(first, 10**6, 4):
            await history.add(make(number, request_id=str(number)))
            await history.update(job_id(number), lambda job: replace(job, note="updated"))
            print(number, flush=True)

    async def main():
        history = await History.open(Path(sys.argv[1]))
        print("open", flush=True)
        await asyncio.gather(*(keep_writing(history, first) for first in range(1, 5)))

    asyncio.run(main())
"""


class TestProcesses:
    async def test_kill_9_loses_no_acknowledged_write(self, opened: Open, tmp_path: Path) -> None:
        acknowledged: set[int] = set()
        for kill_after in (1, 23, 60):
            first = f"range({kill_after}000, {kill_after}004)"
            child = run_child(WRITER.replace("range(1, 5)", first), tmp_path / "data")
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            lines = [child.stdout.readline() for _ in range(kill_after)]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
            assert child.wait() == -signal.SIGKILL
            acknowledged |= {int(line) for line in lines if line.endswith("\n")}
            history = await opened()
            for number in acknowledged:
                job = history.get(job_id(number))
                assert job is not None
                assert job.note == "updated"
                assert history.find_request("", str(number)) == job
            await history.close()

    async def test_a_second_server_is_refused_with_the_pid_of_the_first(
        self, opened: Open, tmp_path: Path
    ) -> None:
        child = run_child(WRITER, tmp_path / "data")
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        try:
            with pytest.raises(HistoryLocked, match=f"in use by process {child.pid}:") as caught:
                await opened()
            assert caught.value.pid == child.pid
        finally:
            child.kill()
            child.communicate()
        assert len(await opened()) >= 0  # the lock died with its process

    async def test_a_second_open_in_one_process_is_refused(
        self, history: History, tmp_path: Path
    ) -> None:
        with pytest.raises(HistoryLocked, match=f"in use by process {os.getpid()}"):
            await History.open(tmp_path / "data")

    async def test_no_child_inherits_the_lock(self, opened: Open) -> None:
        history = await opened()
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
        try:
            await history.close()
            await opened()
        finally:
            child.kill()
            child.wait()


async def test_two_who_look_at_once_and_a_disk_that_hangs(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = await opened()
    for _ in range(20):
        await asyncio.gather(*(history.check() for _ in range(5)))
    assert history.problem is None
    monkeypatch.setattr(history_module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(history_module, "HEAL_SECONDS", 0.05)
    hanging = threading.Event()
    history._thread.submit(hanging.wait)
    with pytest.raises(HistoryError, match=r"has not answered for 0\.05 seconds"):
        await history.check()
    assert history.problem is not None
    hanging.set()
    await eventually(lambda: history.problem is None)

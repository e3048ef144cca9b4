"""The history on a real disk: what is kept, what is refused, what is found again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.request import Conflict, NotFound
from mochi_app.store import checks
from mochi_app.store import database as record_store
from mochi_app.store import history as history_module
from mochi_app.store import writer as writer_module
from mochi_app.store.history import History
from mochi_app.store.job_index import JobQuery
from mochi_app.store.lock import HistoryLocked
from tests.conftest import eventually
from tests.histories import (
    WRITER,
    Open,
    by_hand,
    completed,
    database,
    ids,
    job_id,
    make,
    run_child,
)


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


async def test_two_who_look_at_once_and_a_disk_that_hangs(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = await opened()
    for _ in range(20):
        await asyncio.gather(*(history.check() for _ in range(5)))
    assert history.problem is None
    monkeypatch.setattr(history_module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(writer_module, "HEAL_SECONDS", 0.05)
    hanging = threading.Event()
    history._thread.submit(hanging.wait)
    with pytest.raises(HistoryError, match=r"has not answered for 0\.05 seconds"):
        await history.check()
    assert history.problem is not None
    hanging.set()
    await eventually(lambda: history.problem is None)

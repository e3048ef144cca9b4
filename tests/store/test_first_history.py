"""A data folder that the first version left, as today's opens it; and one of a later version."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mochi_app import jobs
from mochi_app.errors import HistoryError
from mochi_app.jobs import Job, JobIds, JobStatus
from mochi_app.request import Conflict
from mochi_app.store import checks
from mochi_app.store.__main__ import main
from mochi_app.store.backups import make_backup
from mochi_app.store.history import History
from mochi_app.store.job_index import JobQuery
from mochi_app.store.media import MediaStore
from mochi_app.store.metadata import read_metadata
from tests.histories import by_hand, keep, make, open_history
from tests.places import ROOT
from tests.test_startup import run

FIRST = ROOT / "tests" / "fixtures" / "first_history"
SAID: dict[str, Any] = json.loads((FIRST / "jobs.json").read_text(encoding="utf-8"))
RECORDS: dict[str, dict[str, Any]] = {record["id"]: record for record in SAID["jobs"]}
SINCE: dict[
    str, Any
] = {  # what a job has today and had not then, with what it is for a job of then
    "lora_scale": 1.0,
    "deleted_uptime": None,
    "deaths": [],
    "checkpoint_at": 0.0,
    "server_deaths": 0,
    "suspect": False,
    "held": None,
    "resumed_step": 0,
    "cancel_requested": False,
}


@pytest.fixture
def first(data: Path) -> Path:
    """A copy of the first version's data folder."""
    shutil.copytree(FIRST / "data", data)
    return data


def by_prompt(number: int) -> str:
    """The id of a job by its number in the program that wrote the folder."""
    return SAID["jobs"][number - 1]["id"]  # type: ignore[no-any-return]


def as_json(job: Job | None) -> dict[str, Any]:
    """A job as the disk has it."""
    assert job is not None
    record: dict[str, Any] = json.loads(json.dumps(job.to_record()))
    return record


def rows(data: Path) -> dict[str, tuple[dict[str, Any], int | None]]:
    """Records and checksums of all rows of jobs, past today's code."""
    with by_hand(data / "history" / "cache.db") as database:
        found = database.execute("SELECT key, value, tag FROM Cache WHERE key LIKE 'job:%'")
        return {key.removeprefix("job:"): (json.loads(value), tag) for key, value, tag in found}


class TestTheFirstVersion:
    async def test_nothing_is_lost(self, first: Path) -> None:
        for _ in ("the upgrade", "and once more"):
            async with open_history(first) as history:
                found = {job_id: as_json(history.get(job_id)) for job_id in RECORDS}
                assert found == {job_id: record | SINCE for job_id, record in RECORDS.items()}
                assert len(history) == len(RECORDS)
                assert history.last_id == SAID["last_id"] > max(RECORDS)
                assert JobIds(history.last_id, clock=lambda: 0.0).draw() > SAID["last_id"]

    async def test_it_is_found_as_before(self, first: Path) -> None:
        """The index of the old records: by status, parent, request, star, trash and prompt."""
        statuses = {JobStatus(record["status"]) for record in RECORDS.values()}
        assert statuses == set(JobStatus)
        async with open_history(first) as history:
            for status in JobStatus:
                assert {job.id for job in history.with_status(status)} == {
                    job_id
                    for job_id, record in RECORDS.items()
                    if (record["status"], record["deleted_at"]) == (status, None)
                }
            trash = {job_id for job_id, record in RECORDS.items() if record["deleted_at"]}
            assert {job.id for job in history.trashed()} == trash
            assert [job.id for job in history.children(by_prompt(1))] == [by_prompt(2)]
            for record in RECORDS.values():
                if record["request_id"] is not None:
                    asked = history.find_request(record["owner"], record["request_id"])
                    assert asked == history.get(record["id"])
                if record["deleted_at"] is None:
                    page = history.list(JobQuery(text=record["prompt"]))
                    assert record["id"] in [job.id for job in page.jobs]
            starred = history.list(JobQuery(starred=True)).jobs
            assert [job.id for job in starred] == [by_prompt(1)]

    async def test_a_request_sent_again_after_the_upgrade(self, first: Path) -> None:
        async with open_history(first) as history:
            waiting = history.get(by_prompt(7))
            assert waiting is not None
            again = replace(waiting, id=JobIds(history.last_id).draw())
            assert await history.add(again) == waiting
            with pytest.raises(Conflict, match="with another seed"):
                await history.add(replace(again, seed=1))

    async def test_a_change_writes_a_record_of_today(self, first: Path) -> None:
        before = rows(first)
        assert {tag for _, tag in before.values()} == {None}, "the first version had no checksums"
        changed = by_prompt(6)
        async with open_history(first) as history:
            await history.update(changed, lambda job: replace(job, note="seen"))
        after = rows(first)
        assert after.pop(changed)[0] == RECORDS[changed] | SINCE | {"note": "seen"}
        assert after == {key: row for key, row in before.items() if key != changed}
        with by_hand(first / "history" / "cache.db") as database:
            spoil = "UPDATE Cache SET value = replace(value, 'seen', 'sown') WHERE key = ?"
            database.execute(spoil, (f"job:{changed}",))
        with pytest.raises(HistoryError, match="was changed on the disk"):
            await History.open(first)

    async def test_its_videos_are_those_of_its_jobs(self, first: Path) -> None:
        media = MediaStore(first)
        for record in RECORDS.values():
            there = record["video"] is not None and not record["evicted_at"]
            served = there and record["deleted_at"] is None
            video = media.video_path(record["id"])
            assert (video is not None) == served
            assert (media.poster_path(record["id"]) is not None) == (record["poster"] is not None)
            assert (first / "withheld" / f"{record['id']}.mp4").exists() == (there and not served)
            assert video is None or read_metadata(video)["prompt"] == record["prompt"]

    async def test_the_check_is_content(
        self, first: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in ("before it was opened", "after"):
            assert main(["check", "--data-dir", str(first)]) == 0
            said = capsys.readouterr().out
            assert f"history: sound, {len(RECORDS)} jobs (1 CREATED, 2 PENDING" in said
            async with open_history(first) as history:
                await history.add(make(1))
                await history.remove(make(1).id)
        make_backup(first)
        assert main(["check", "--data-dir", str(first)]) == 0
        assert "sound" in capsys.readouterr().out.split("backup history-")[1]


LATER_HISTORY = (
    "UPDATE Cache SET tag=NULL, value=json_set(value, '$.schema', 7) WHERE key = 'meta'",
    f"history of schema 7: this version reads up to {checks.SCHEMA}; use the version that wrote"
    " it, or restore a backup",
)
LATER_JOB = (
    "UPDATE Cache SET tag=NULL, value=json_set(value, '$.schema', 7) WHERE key LIKE 'job:%'",
    f"job record of schema 7: this version reads up to {jobs.SCHEMA}; use the version that wrote"
    " it, or restore a backup",
)


async def later(data: Path, change: str) -> None:
    """Leave a history with one job, as a later version would have left it."""
    await keep(data, make(1))
    with by_hand(data / "history" / "cache.db") as database:
        assert database.execute(change).rowcount == 1


@pytest.mark.parametrize(("change", "message"), [LATER_HISTORY, LATER_JOB], ids=["history", "job"])
async def test_a_later_version_is_refused_and_left_alone(
    data: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await later(data, change)
    before = (data / "history" / "cache.db").read_bytes()
    with pytest.raises(HistoryError, match=message):
        await History.open(data)
    assert main(["check", "--data-dir", str(data)]) == 1
    assert message in capsys.readouterr().out
    assert (data / "history" / "cache.db").read_bytes() == before


async def test_the_server_refuses_a_later_version_in_one_line(data: Path) -> None:
    change, message = LATER_HISTORY
    await later(data, change)
    status, said = run("app.py", MOCHI_DATA_DIR=str(data), GRADIO_SERVER_NAME="127.0.0.1")
    assert status == 2
    assert "Traceback" not in said
    (refusal,) = [line for line in said.splitlines() if "cannot start" in line]
    assert message in refusal
    assert refusal == said.splitlines()[-1]

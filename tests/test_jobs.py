"""Requests, statuses, records and ids: what is accepted, what is refused and how it says so."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from mochi_app.jobs import (
    JOB_FIELDS,
    NEXT,
    SCHEMA,
    Job,
    JobIds,
    JobStatus,
    parse_job_id,
)
from mochi_app.parameters import REQUEST_FIELDS
from mochi_app.request import (
    Conflict,
    NotFound,
    RequestError,
)
from tests.clocks import DAY, Clock
from tests.plain_requests import validate

MOVES = {
    (JobStatus(before), JobStatus(after))
    for before, afters in {
        "CREATED": "PENDING FAILED CANCELLED",
        "PENDING": "PROCESSING FAILED CANCELLED",
        "PROCESSING": "PENDING COMPLETED FAILED CANCELLED",
    }.items()
    for after in afters.split()
}
NO_MOVES = {(before, after) for before in JobStatus for after in JobStatus} - MOVES


class TestStatus:
    @pytest.mark.parametrize(("before", "after"), sorted(MOVES))
    def test_moves(self, before: JobStatus, after: JobStatus) -> None:
        job = replace(some_job(), status=before)
        assert job.moved(after, error="e") == replace(job, status=after, error="e")

    @pytest.mark.parametrize(("before", "after"), sorted(NO_MOVES))
    def test_what_is_no_move(self, before: JobStatus, after: JobStatus) -> None:
        with pytest.raises(Conflict, match=f"is {before}: it cannot become {after}"):
            replace(some_job(), status=before).moved(after)

    def test_terminal_states_are_left_by_no_move(self) -> None:
        left = {before for before, _ in MOVES}
        assert {status for status in JobStatus if status.terminal} == set(JobStatus) - left

    def test_a_running_job_may_go_back_to_the_queue(self) -> None:
        assert JobStatus.PENDING in NEXT[JobStatus.PROCESSING]

    def test_a_cancel_may_not_undo_a_completion(self) -> None:
        job = replace(some_job(), status=JobStatus.PROCESSING).moved(JobStatus.COMPLETED)
        with pytest.raises(Conflict):
            job.moved(JobStatus.CANCELLED)

    def test_errors_are_refusals(self) -> None:
        assert issubclass(Conflict, RequestError)
        assert issubclass(NotFound, RequestError)


def some_job(**extra: Any) -> Job:
    return Job.from_request(
        validate(seed=9, request_id="r"), id=JobIds().draw(), kind="preview", **extra
    )


class TestRecords:
    def test_from_request(self) -> None:
        request = validate(seed=9, request_id="r")
        job = Job.from_request(request, id="i", kind="enhance", parent_id="p", owner="o")
        assert {item.name: getattr(job, item.name) for item in fields(request)} == {
            item.name: getattr(request, item.name) for item in fields(request)
        }
        assert (job.id, job.parent_id, job.owner, job.status) == ("i", "p", "o", JobStatus.CREATED)
        assert job.enhanced
        assert not some_job().enhanced
        assert job.cost == 8 * 480 * 848 * 163

    def test_round_trip_through_json(self) -> None:
        job = some_job(
            options={"cache": "first-block", "list": [1, None]},
            seconds={"load": 0.0, "denoise": 1.25},
            status=JobStatus.PROCESSING,
            note="über 火",
            slot=0,
        )
        record = json.loads(json.dumps(job.to_record()))
        assert Job.from_record(record) == job
        assert set(record) == set(JOB_FIELDS)
        assert type(Job.from_record(record).status) is JobStatus

    def test_a_record_has_every_field_from_the_start(self) -> None:
        promised = """
            schema id request_id batch_id kind parent_id prompt negative_prompt seed
            num_inference_steps guidance_scale height width num_frames fps schedule lora options
            owner status submitted_at started_processing_at completed_processing_at attempts error
            starred note safety deleted_at evicted_at model slot seconds video poster
        """
        assert set(promised.split()) <= set(JOB_FIELDS)

    def test_an_earlier_record_takes_the_defaults(self) -> None:
        job = some_job()
        record = job.to_record()
        for name in ("schema", "note", "safety", "options", "seconds", "evicted_at"):
            del record[name]
        assert Job.from_record(record) == job

    def test_a_field_of_another_branch_is_passed_over(self) -> None:
        assert Job.from_record(some_job().to_record() | {"colour": "red"}).id

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": SCHEMA + 1}, f"schema {SCHEMA + 1}: this version reads up to {SCHEMA}"),
            ({"status": "DONE"}, "DONE"),
            ({"status": None}, "None"),
        ],
    )
    def test_records_that_cannot_be_read(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Job.from_record(some_job().to_record() | change)

    @pytest.mark.parametrize("name", ["id", "prompt", "seed", "status"])
    def test_a_record_without_a_necessary_field(self, name: str) -> None:
        record = some_job().to_record()
        del record[name]
        with pytest.raises(ValueError, match=name):
            Job.from_record(record)

    def test_what_makes_two_requests_the_same(self) -> None:
        assert set(REQUEST_FIELDS) == {
            "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
            "height", "width", "num_frames", "schedule", "lora", "lora_scale",
        }  # fmt: skip


class TestJobIds:
    def test_ids_grow_whatever_the_clock_does(self) -> None:
        times = iter([5.0, 5.0, 3.0, 6.0, 0.0])
        ids = JobIds(clock=lambda: next(times))
        drawn = [ids.draw() for _ in range(5)]
        assert drawn == sorted(set(drawn))
        assert all(parse_job_id(value) == value for value in drawn)

    def test_ids_begin_after_the_last_one(self) -> None:
        last = JobIds(clock=lambda: 4e9).draw()
        assert JobIds(last, clock=lambda: 1.0).draw() > last

    def test_the_tail_cannot_be_guessed(self) -> None:
        tails = {JobIds(clock=lambda: 1.0).draw()[15:] for _ in range(100)}
        assert len(tails) == 100

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "../",
            "../../etc/passwd",
            "https://example.org/a.mp4",
            "%2e%2e%2f",
            "0" * 10**6,
            "0" * 14 + "-" + "0" * 15,
            "0" * 14 + "-" + "0" * 17,
            "0" * 14 + "-" + "A" * 16,
            "0" * 14 + "-" + "0" * 16 + "\n",
            " " + "0" * 14 + "-" + "0" * 16,
            "٠" * 14 + "-" + "٠" * 16,
            None,
            5,
            b"0" * 14 + b"-" + b"0" * 16,
            ["0"],
        ],
    )
    def test_malformed_ids_are_refused(self, value: Any) -> None:
        with pytest.raises(RequestError, match=r"job_id: got .*, expected the id that") as caught:
            parse_job_id(value)
        assert len(str(caught.value)) < 250


def test_ids_grow_while_the_clock_goes_forward_and_back(clock: Clock) -> None:
    ids, drawn = JobIds(), []
    for ahead in (0, DAY, 0, -DAY, 0):
        clock.ahead = ahead
        drawn.append(ids.draw())
    assert drawn == sorted(drawn)

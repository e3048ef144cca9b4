"""Who is next and when: pure functions, so plain data in and out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mochi_app.jobs import Job
from mochi_app.setting_types import Timeouts
from mochi_app.studio.scheduling import RUN_TIMES, Speeds, next_job, places, timeouts_for
from tests.plain_jobs import job, one_second_a_step


def unknown(job: Job) -> None:
    return None


def order(jobs: list[Job]) -> list[str]:
    names = []
    while jobs:
        chosen = next_job(jobs, one_second_a_step)
        assert chosen is not None
        names.append(chosen.id)
        jobs = [other for other in jobs if other is not chosen]
    return names


def test_equal_jobs_run_in_the_order_of_their_submits() -> None:
    jobs = [job("b", at=2), job("c", at=3), job("a", at=1)]
    assert order(jobs) == ["a", "b", "c"]


def test_a_preview_passes_a_long_job_that_came_before() -> None:
    assert order([job("long", at=0, steps=64), job("short", at=10)]) == ["short", "long"]


def test_a_long_job_is_not_passed_for_ever() -> None:
    late = RUN_TIMES * (64 - 8) + 1
    assert order([job("long", at=0, steps=64), job("short", at=late)]) == ["long", "short"]


def test_an_interrupted_job_goes_first() -> None:
    interrupted = replace(job("long", at=5, steps=64), started_processing_at=6.0)
    assert order([job("old", at=1), job("short", at=10), interrupted]) == ["long", "old", "short"]


def test_without_measurements_the_oldest_is_next() -> None:
    jobs = [job("b", at=2, steps=2), job("a", at=1, steps=64)]
    chosen = next_job(jobs, unknown)
    assert chosen is not None
    assert chosen.id == "a"
    assert next_job([], unknown) is None


def test_etas_count_what_runs_and_what_is_before() -> None:
    jobs = [job("a", at=1), job("b", at=2), job("c", at=3)]
    found = places(jobs, [4.0, 0.0], one_second_a_step)
    assert [found[name].position for name in "abc"] == [1, 2, 3]
    assert [found[name].eta_seconds for name in "abc"] == [8.0, 12.0, 16.0]


@pytest.mark.parametrize("busy", [[], [None], [0.0, None]])
def test_no_eta_is_claimed_when_a_slot_is_not_known(busy: list[float | None]) -> None:
    place = places([job("a")], busy, one_second_a_step)["a"]
    assert place.position == 1
    assert place.eta_seconds is None


def test_no_eta_is_claimed_before_anything_was_measured() -> None:
    assert places([job("a")], [0.0], unknown)["a"].eta_seconds is None


def measured(steps: int, guidance_scale: float, seconds: dict[str, float]) -> Job:
    return replace(job("m", steps=steps, guidance_scale=guidance_scale), seconds=seconds)


def test_speeds_scale_with_steps_and_guidance() -> None:
    speeds = Speeds()
    assert speeds.run_seconds(job("a")) is None
    speeds.observe(measured(8, 4.5, {"text": 1, "denoise": 16, "decode": 2, "encode": 1}))
    assert speeds.run_seconds(job("a", steps=8)) == pytest.approx(20)
    assert speeds.run_seconds(job("a", steps=64)) == pytest.approx(128 + 4)
    assert speeds.run_seconds(job("a", steps=64, guidance_scale=1.0)) == pytest.approx(64 + 4)
    assert speeds.run_seconds(job("a", steps=8), steps_done=6) == pytest.approx(4 + 4)


def test_a_resumed_job_teaches_the_speed_of_the_steps_that_it_did() -> None:
    speeds = Speeds()
    whole = measured(64, 4.5, {"text": 1, "denoise": 16, "decode": 2, "encode": 1})
    speeds.observe(replace(whole, resumed_step=56))
    assert speeds.run_seconds(job("a", steps=8)) == pytest.approx(20)
    speeds = Speeds()
    speeds.observe(replace(whole, resumed_step=64))
    assert speeds.denoise is None


def test_a_job_without_measurements_teaches_nothing() -> None:
    speeds = Speeds()
    speeds.observe(job("adopted"))
    assert speeds.denoise is None


def test_deadlines_grow_with_the_video_until_something_is_measured() -> None:
    timeouts, usual = Timeouts(step=300, cancel=30), 64 * 64 * 7
    assert timeouts_for(job("usual"), Speeds(), timeouts, usual) == timeouts
    small = replace(job("small"), num_frames=1)
    assert timeouts_for(small, Speeds(), timeouts, usual) == timeouts
    large = replace(job("large"), height=128, width=192)
    assert timeouts_for(large, Speeds(), timeouts, usual) == Timeouts(1800, 180)


def test_deadlines_follow_what_was_measured() -> None:
    timeouts, usual = Timeouts(step=300, cancel=30), 64 * 64 * 7
    slow, fast = Speeds(), Speeds()
    slow.observe(measured(8, 4.5, {"denoise": 8 * 60, "decode": 20}))
    fast.observe(measured(8, 4.5, {"denoise": 8 * 0.01, "decode": 0.5}))
    assert timeouts_for(job("a"), fast, timeouts, usual) == Timeouts(100, 30)
    found = timeouts_for(job("a"), slow, timeouts, usual)
    assert (found.step, found.cancel) == pytest.approx((600, 180))
    decoding = Speeds()
    decoding.observe(measured(8, 4.5, {"denoise": 8, "decode": 90}))
    assert timeouts_for(job("a"), decoding, timeouts, usual).step == pytest.approx(900)
    without_pair = timeouts_for(job("a", guidance_scale=1.0), slow, timeouts, usual)
    assert without_pair.step == pytest.approx(300)

"""Plans of a run: the schedule that the library fixes, genmo's fast one, and starting half-way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule, retrieve_timesteps

from mochi_app.engine.schedule import DEFAULT, SCHEDULES, MochiScheduler, Schedule
from tests.places import TINY


class Interrupted(Exception):
    """Ends a run early."""


@pytest.fixture
def stock() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(TINY, subfolder="scheduler")


@pytest.fixture
def scheduler(stock: FlowMatchEulerDiscreteScheduler) -> MochiScheduler:
    scheduler: MochiScheduler = MochiScheduler.from_config(stock.config)
    return scheduler


@pytest.fixture(scope="module")
def stock_pipe() -> Iterator[MochiPipeline]:
    """The library's own pipeline, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = MochiPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe(stock_pipe: MochiPipeline) -> MochiPipeline:
    """The same model under our scheduler."""
    scheduler = MochiScheduler.from_config(stock_pipe.scheduler.config)
    pipe = MochiPipeline(**(stock_pipe.components | {"scheduler": scheduler}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def text(pipe: MochiPipeline) -> dict[str, torch.Tensor]:
    """Both prompts, encoded once."""
    names = [
        "prompt_embeds", "prompt_attention_mask",
        "negative_prompt_embeds", "negative_prompt_attention_mask",
    ]  # fmt: skip
    with torch.no_grad():
        tensors = pipe.encode_prompt("a red ball rolls right", "", True)
    return dict(zip(names, tensors, strict=True))


def make(pipe: MochiPipeline, text: dict[str, torch.Tensor], steps: int, **more: Any) -> Any:
    """Latents after the last step, unless `more` asks for something else."""
    arguments = {
        "height": 64, "width": 64, "num_frames": 7, "guidance_scale": 3.0,
        "num_inference_steps": steps, "output_type": "latent",
        "generator": torch.Generator("cpu").manual_seed(3),
    }  # fmt: skip
    return pipe(**(arguments | text | more), return_dict=False)[0]


def latents_after_each_step(
    pipe: MochiPipeline, text: dict[str, torch.Tensor], steps: int
) -> list[torch.Tensor]:
    """Of a whole run: entry k is what a resume at step k starts from, the last is the result."""
    kept = [torch.randn((1, 12, 2, 8, 8), generator=torch.Generator("cpu").manual_seed(3))]

    def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return tensors

    last = make(pipe, text, steps, latents=kept[0], callback_on_step_end=keep)
    assert len(kept) == steps + 1
    assert torch.equal(last, kept[-1])
    return kept


def set_as_the_pipeline_does(scheduler: Any, steps: int) -> int:
    """`MochiPipeline.__call__`'s own two lines; the number of steps that it will run."""
    sigmas = np.array(linear_quadratic_schedule(steps, 0.025))
    timesteps, number = retrieve_timesteps(scheduler, steps, "cpu", None, sigmas)
    scheduler.set_begin_index(0)
    assert torch.equal(timesteps, scheduler.timesteps)
    assert number == len(timesteps) == len(scheduler.sigmas) - 1
    return int(number)


def genmo_sigmas(steps: int, threshold: float, linear: int) -> list[float]:
    """The schedule from its definition: two pieces that meet with equal value and slope.

    A line from (0, 0) to (linear, threshold), then the parabola that leaves it smoothly and
    reaches 1 at `steps`; noise is what is missing to 1.
    """
    slope = threshold / linear
    rest = steps - linear
    bend = (1 - threshold - slope * rest) / rest**2
    line = [slope * step for step in range(linear)]
    parabola = [threshold + slope * step + bend * step**2 for step in range(rest)]
    return [1 - value for value in line + parabola]


# the default


@pytest.mark.parametrize("plan", [False, True], ids=["idle", "planned"])
def test_by_default_it_is_the_stock_scheduler(
    stock: FlowMatchEulerDiscreteScheduler, scheduler: MochiScheduler, plan: bool
) -> None:
    for steps in [*range(2, 130), 200, 500, 1000]:
        set_as_the_pipeline_does(stock, steps)
        if plan:
            with scheduler.planned(SCHEDULES["linear_quadratic"]):
                assert set_as_the_pipeline_does(scheduler, steps) == steps
        else:
            set_as_the_pipeline_does(scheduler, steps)
        assert torch.equal(scheduler.sigmas, stock.sigmas)
        assert torch.equal(scheduler.timesteps, stock.timesteps)
        assert DEFAULT.sigmas(steps) == linear_quadratic_schedule(steps, 0.025)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 10},
        {"timesteps": [900.0, 500.0, 100.0]},
        {"sigmas": [0.9, 0.5], "timesteps": [900.0, 500.0]},
    ],
    ids=str,
)
def test_other_ways_to_set_steps_are_the_stock_ones(
    stock: FlowMatchEulerDiscreteScheduler, scheduler: MochiScheduler, arguments: dict[str, Any]
) -> None:
    for each in (stock, scheduler):
        each.set_timesteps(**arguments)
    assert torch.equal(scheduler.sigmas, stock.sigmas)
    assert torch.equal(scheduler.timesteps, stock.timesteps)


def test_default_frames_are_those_of_the_stock_pipeline(
    stock_pipe: MochiPipeline, pipe: MochiPipeline, text: dict[str, torch.Tensor]
) -> None:
    stock = make(stock_pipe, text, 4, output_type="pt")
    with pipe.scheduler.planned():
        assert torch.equal(make(pipe, text, 4, output_type="pt"), stock)
    with pipe.scheduler.planned(Schedule(threshold_noise=0.1)):
        assert not torch.equal(make(pipe, text, 4, output_type="pt"), stock)


def test_its_config_is_saved_and_read_as_a_stock_one(
    stock: FlowMatchEulerDiscreteScheduler, scheduler: MochiScheduler, tmp_path: Path
) -> None:
    with scheduler.planned(SCHEDULES["fast"]):
        scheduler.save_pretrained(tmp_path)
    assert {key: value for key, value in scheduler.config.items() if key[0] != "_"} == {
        key: value for key, value in stock.config.items() if key[0] != "_"
    }
    for kind in (FlowMatchEulerDiscreteScheduler, MochiScheduler):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is kind
        set_as_the_pipeline_does(stock, 6)
        set_as_the_pipeline_does(loaded, 6)
        assert torch.equal(loaded.sigmas, stock.sigmas)
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert type(back) is FlowMatchEulerDiscreteScheduler


# schedules


def test_a_short_schedule_is_every_nth_level_of_a_long_one(scheduler: MochiScheduler) -> None:
    def levels(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        set_as_the_pipeline_does(scheduler, steps)
        return scheduler.sigmas, scheduler.timesteps

    assert DEFAULT.sigmas(8) == DEFAULT.sigmas(64)[::8]
    for long in range(4, 129):
        sigmas, timesteps = levels(long)
        for short in range(2, long, 2):
            if long % short == 0:
                few_sigmas, few_timesteps = levels(short)
                assert torch.equal(few_sigmas, sigmas[:: long // short]), (short, long)
                assert torch.equal(few_timesteps, timesteps[:: long // short]), (short, long)


def test_a_schedule_of_an_odd_length_is_of_its_own() -> None:
    assert DEFAULT.sigmas(3)[1:] != pytest.approx(DEFAULT.sigmas(24)[8::8], abs=0.1)


@pytest.mark.parametrize("steps", [7, 8, 12, 64])
def test_the_fast_schedule_is_genmos(scheduler: MochiScheduler, steps: int) -> None:
    expected = genmo_sigmas(steps, threshold=0.1, linear=6)
    assert SCHEDULES["fast"].sigmas(steps) == pytest.approx(expected, abs=1e-12)
    with scheduler.planned(SCHEDULES["fast"]):
        assert set_as_the_pipeline_does(scheduler, steps) == steps
    # Mochi counts noise down, its model and this scheduler count up
    up = torch.tensor([1 - value for value in expected] + [1.0])
    assert torch.allclose(scheduler.sigmas, up, rtol=0, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * up[:-1], rtol=0, atol=1e-3)


def test_the_fast_schedule_in_its_eight_steps() -> None:
    """By hand: six steps of 1/60 each, then two along the parabola."""
    expected = [1.0, 59 / 60, 58 / 60, 57 / 60, 56 / 60, 55 / 60, 0.9, 0.9 - 1 / 60 - 13 / 60]
    assert SCHEDULES["fast"].sigmas(8) == pytest.approx(expected, abs=1e-12)


def test_linear_steps_are_half_unless_given() -> None:
    for steps in (2, 3, 7, 50):
        assert Schedule(0.1).sigmas(steps) == Schedule(0.1, linear_steps=steps // 2).sigmas(steps)
    assert Schedule(0.1).sigmas(50) != Schedule(0.1, linear_steps=24).sigmas(50)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_threshold_lies_between_0_and_1(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold_noise {threshold}: expected between 0 and 1"):
        Schedule(threshold_noise=threshold)


@pytest.mark.parametrize("linear", [0, -3])
def test_at_least_one_step_is_linear(linear: int) -> None:
    with pytest.raises(ValueError, match=f"linear_steps {linear}: expected 1 or more"):
        Schedule(linear_steps=linear)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 0, -1])
def test_a_schedule_has_at_least_two_steps(schedule: Schedule, steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps {steps}: expected 2 or more"):
        schedule.sigmas(steps)


@pytest.mark.parametrize("steps", [6, 2])
def test_some_step_must_be_quadratic(
    pipe: MochiPipeline, text: dict[str, torch.Tensor], steps: int
) -> None:
    message = f"num_inference_steps {steps}: expected more than the 6 linear steps"
    with pipe.scheduler.planned(SCHEDULES["fast"]), pytest.raises(ValueError, match=message):
        make(pipe, text, steps)


def test_a_schedule_that_would_overshoot_is_refused() -> None:
    with pytest.raises(ValueError, match="expected noise that falls with every step"):
        Schedule(threshold_noise=0.9, linear_steps=1).sigmas(8)
    falls = Schedule(threshold_noise=0.9, linear_steps=7).sigmas(8)
    assert falls == sorted(falls, reverse=True)


# resuming


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_from_step_k_is_the_rest_of_the_whole(scheduler: MochiScheduler, name: str) -> None:
    set_as_the_pipeline_does(scheduler, 16)
    with scheduler.planned(SCHEDULES[name]):
        set_as_the_pipeline_does(scheduler, 16)
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    for k in range(16):
        with scheduler.planned(SCHEDULES[name], first_step=k):
            assert set_as_the_pipeline_does(scheduler, 16) == 16 - k
        assert torch.equal(scheduler.sigmas, sigmas[k:])
        assert torch.equal(scheduler.timesteps, timesteps[k:])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_ends_with_the_same_frames(
    pipe: MochiPipeline, text: dict[str, torch.Tensor], name: str
) -> None:
    schedule = SCHEDULES[name]
    with pipe.scheduler.planned(schedule):
        after = latents_after_each_step(pipe, text, 16)
    with pipe.scheduler.planned(schedule, first_step=15):
        frames = make(pipe, text, 16, latents=after[15], output_type="pt")
    for k in (0, 1, 5, 8, 14):
        with pipe.scheduler.planned(schedule, first_step=k):
            resumed = make(pipe, text, 16, latents=after[k])
        assert torch.equal(resumed, after[16]), k
    with pipe.scheduler.planned(schedule):
        whole = make(pipe, text, 16, output_type="pt")
    assert torch.equal(frames, whole)


def test_a_resume_at_any_step_takes_that_step(
    pipe: MochiPipeline, text: dict[str, torch.Tensor]
) -> None:
    """One step from each k on: with that, every resumed run follows the whole one to its end."""
    after = latents_after_each_step(pipe, text, 64)
    indices = []

    def stop(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        indices.append(index)
        assert torch.equal(tensors["latents"], after[k + 1]), k
        raise Interrupted

    for k in range(64):
        with pytest.raises(Interrupted), pipe.scheduler.planned(first_step=k):
            make(pipe, text, 64, latents=after[k], callback_on_step_end=stop)
    assert indices == [0] * 64


@pytest.mark.slow
def test_a_resume_at_any_step_ends_like_the_whole_run(
    pipe: MochiPipeline, text: dict[str, torch.Tensor]
) -> None:
    after = latents_after_each_step(pipe, text, 64)
    for k in range(1, 64):
        with pipe.scheduler.planned(first_step=k):
            assert torch.equal(make(pipe, text, 64, latents=after[k]), after[64]), k


@pytest.mark.parametrize("k", [4, 5, 100])
def test_a_resume_beyond_the_last_step_is_refused(
    pipe: MochiPipeline, text: dict[str, torch.Tensor], k: int
) -> None:
    message = f"first_step {k}: expected 0 to 3"
    with pipe.scheduler.planned(first_step=k), pytest.raises(ValueError, match=message):
        make(pipe, text, 4)
    assert (pipe.scheduler.schedule, pipe.scheduler.first_step) == (DEFAULT, 0)


def test_a_resume_before_the_first_step_is_refused(scheduler: MochiScheduler) -> None:
    message = "first_step -1: expected 0 or more"
    with pytest.raises(ValueError, match=message), scheduler.planned(first_step=-1):
        pass
    assert scheduler.first_step == 0


# state


def test_no_plan_outlives_its_run(pipe: MochiPipeline, text: dict[str, torch.Tensor]) -> None:
    def stop(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise Interrupted

    before = make(pipe, text, 8)
    with pytest.raises(Interrupted), pipe.scheduler.planned(SCHEDULES["fast"], first_step=3):
        make(pipe, text, 8, callback_on_step_end=stop)
    assert torch.equal(make(pipe, text, 8), before)
    with pipe.scheduler.planned(SCHEDULES["fast"], first_step=3):
        assert not torch.equal(make(pipe, text, 8), before)
    assert torch.equal(make(pipe, text, 8), before)


def test_one_plan_at_a_time(scheduler: MochiScheduler) -> None:
    with scheduler.planned(SCHEDULES["fast"]):
        with pytest.raises(RuntimeError, match="is under way"), scheduler.planned(first_step=1):
            pass
        assert scheduler.schedule == SCHEDULES["fast"]
    assert scheduler.schedule == DEFAULT


def test_plans_of_two_schedulers_are_apart(
    stock: FlowMatchEulerDiscreteScheduler, scheduler: MochiScheduler
) -> None:
    other = MochiScheduler.from_config(stock.config)
    with scheduler.planned(SCHEDULES["fast"], first_step=2):
        assert (other.schedule, other.first_step) == (DEFAULT, 0)

"""Requests: what is accepted, what is refused and how it says so."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest

from mochi_app.engine.schedule import SCHEDULES
from mochi_app.jobs import (
    Job,
)
from mochi_app.parameters import (
    MAX_STEPS,
    MIN_STEPS,
    SCHEDULE_STEPS,
    GenerationRequest,
)
from mochi_app.request import RequestError
from tests.plain_requests import validate


def refusal(**given: Any) -> str:
    with pytest.raises(RequestError) as caught:
        validate(**given)
    return str(caught.value)


class TestGenerationRequest:
    def test_what_is_left_out_takes_the_models_defaults(self) -> None:
        request = validate(prompt="  a red circle\n", seed=5, preview_steps=6)
        assert request == GenerationRequest(
            prompt="a red circle",
            negative_prompt="",
            seed=5,
            num_inference_steps=6,
            guidance_scale=4.5,
            height=480,
            width=848,
            num_frames=163,
            fps=30,
        )

    def test_a_missing_seed_is_drawn_from_32_bits(self) -> None:
        seeds = {validate().seed for _ in range(64)}
        assert len(seeds) == 64
        assert all(0 <= seed < 2**32 for seed in seeds)
        assert max(seeds) > 2**16

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("prompt", "x" * 2000),
            ("prompt", " " + "x" * 2000 + " "),
            ("prompt", "<b>&amp; \x1b[31m \u202e 火 👩‍👩‍👧"),
            ("negative_prompt", ""),
            ("negative_prompt", "x" * 2000),
            ("seed", 0),
            ("seed", 2**32 - 1),
            ("seed", 7.0),
            ("num_inference_steps", 2),
            ("num_inference_steps", 512),
            ("num_inference_steps", 8.0),
            ("guidance_scale", 0),
            ("guidance_scale", 20),
            ("height", 64),
            ("height", 480),
            ("width", 848),
            ("num_frames", 7),
            ("num_frames", 163),
            ("request_id", "x" * 200),
        ],
    )
    def test_the_edges_are_accepted(self, field: str, value: Any) -> None:
        expected = value.strip() if isinstance(value, str) else value
        result = getattr(validate(**{field: value}), field)
        assert result == expected
        assert not isinstance(result, float) or field == "guidance_scale"

    @pytest.mark.parametrize("field", ["prompt", "negative_prompt", "request_id"])
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("x" * 2001, "2001 characters"),
            ("a\0b", "without NUL"),
            ("a\ud800b", "lone surrogates"),
            ("\udfff", "lone surrogates"),
            (5, "got 5"),
            (b"bytes", "got b'bytes'"),
            (["a"], r"got ['a']"),
            ({"a": 1}, "got {'a': 1}"),
        ],
    )
    def test_bad_texts(self, field: str, value: Any, expected: str) -> None:
        message = refusal(**{field: value})
        assert message.startswith(f"{field}: got ")
        assert expected in message
        assert "expected a text of" in message

    @pytest.mark.parametrize("field", ["prompt", "request_id"])
    @pytest.mark.parametrize("value", ["", " ", "\n\t\u00a0\u3000"])
    def test_blank_texts(self, field: str, value: str) -> None:
        assert "expected a text of 1 to" in refusal(**{field: value})

    def test_a_missing_prompt(self) -> None:
        assert refusal(prompt=None) == "prompt: got None, expected a text of 1 to 2000 characters"

    @pytest.mark.parametrize(
        "field", ["seed", "num_inference_steps", "guidance_scale", "height", "width", "num_frames"]
    )
    @pytest.mark.parametrize(
        "value",
        [
            -1,
            10**9 * 10,
            10**400,
            -(10**400),
            1e300,
            math.nan,
            math.inf,
            -math.inf,
            True,
            "8",
            "",
            [8],
            {},
            b"8",
            8j,
        ],
    )
    def test_bad_numbers(self, field: str, value: Any) -> None:
        message = refusal(**{field: value})
        assert message.startswith(f"{field}: got ")
        assert "number from" in message
        assert len(message) < 250

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("seed", 2**32, "from 0 to 4294967295"),
            ("seed", 1.5, "from 0 to 4294967295"),
            ("num_inference_steps", 0, "from 2 to 512"),
            ("num_inference_steps", 1, "from 2 to 512"),
            ("num_inference_steps", 513, "from 2 to 512"),
            ("num_inference_steps", 10**9, "from 2 to 512"),
            ("num_inference_steps", 8.5, "from 2 to 512"),
            ("guidance_scale", 20.1, "from 0 to 20"),
            ("height", 48, "from 64 to 480, a multiple of 16"),
            ("height", 72, "from 64 to 480, a multiple of 16"),
            ("height", 496, "from 64 to 480, a multiple of 16"),
            ("width", 856, "from 64 to 848, a multiple of 16"),
            ("width", 864, "from 64 to 848, a multiple of 16"),
            ("width", 64.5, "from 64 to 848, a multiple of 16"),
            ("num_frames", 1, "from 7 to 163 of the form 6k+1"),
            ("num_frames", 8, "from 7 to 163 of the form 6k+1"),
            ("num_frames", 162, "from 7 to 163 of the form 6k+1"),
            ("num_frames", 169, "from 7 to 163 of the form 6k+1"),
        ],
    )
    def test_numbers_out_of_range(self, field: str, value: Any, expected: str) -> None:
        message = refusal(**{field: value})
        assert message == f"{field}: got {value!r}, expected a whole number {expected}".replace(
            "whole number" if field == "guidance_scale" else "\0", "number"
        )

    @pytest.mark.parametrize("value", ["x" * 10**6, "\x1b[31m" * 10**5, ["x" * 10**6], 10**4000])
    def test_a_refusal_is_short_and_printable(self, value: Any) -> None:
        message = refusal(prompt=value)
        assert len(message) < 250
        assert "\x1b" not in message


class TestSchedulesAndLoras:
    def test_the_steps_of_each_schedule_are_those_that_it_can_be_walked_in(self) -> None:
        assert set(SCHEDULE_STEPS) == set(SCHEDULES)
        for name, schedule in SCHEDULES.items():
            walked = []
            for steps in range(MIN_STEPS, MAX_STEPS + 1):
                with contextlib.suppress(ValueError):
                    schedule.sigmas(steps)
                    walked.append(steps)
            least, most = SCHEDULE_STEPS[name]
            assert walked == list(range(least, most + 1))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"schedule": "slow"}, "schedule: got 'slow', expected linear_quadratic or fast"),
            ({"schedule": 3}, "schedule: got 3"),
            (
                {"schedule": "fast", "num_inference_steps": 4},
                "num_inference_steps: got 4, expected 7 to 114 with the schedule fast",
            ),
            ({"lora": "van-gogh"}, "lora: got 'van-gogh', expected noir, retro"),
            ({"lora": 0}, "lora: got 0, expected noir, retro"),
            ({"lora_scale": "much"}, "lora_scale: got 'much', expected a number from 0 to 2"),
            ({"lora": "noir", "lora_scale": 3}, "lora_scale: got 3, expected a number from 0 to 2"),
        ],
    )
    def test_what_there_is_not_is_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            validate(**given, loras=("retro", "noir"))

    def test_without_any_lora_that_is_said(self) -> None:
        with pytest.raises(RequestError, match="this server has none"):
            validate(lora="noir")

    def test_no_name_is_no_lora_and_its_scale_means_nothing(self) -> None:
        request = validate(lora="", lora_scale=0.3)
        assert request.lora is None
        assert request.lora_scale == 1.0

    def test_what_is_asked_is_kept(self) -> None:
        request = validate(schedule="fast", lora="noir", lora_scale=0.5, loras=["noir"])
        job = Job.from_request(request, id="i", kind="preview")
        assert (job.schedule, job.lora, job.lora_scale) == ("fast", "noir", 0.5)

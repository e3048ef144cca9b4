"""The judge, against rendered truth and against videos that are wrong on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mochi_app.tiny import judge, words, world
from mochi_app.tiny.words import Attributes


@pytest.fixture(scope="module")
def truth() -> list[Attributes]:
    random = np.random.default_rng(11)
    return [words.random_attributes(random) for _ in range(200)]


def test_reads_rendered_truth(truth: list[Attributes]) -> None:
    seen = [judge.read_video(world.render_attributes(item, i)) for i, item in enumerate(truth)]
    figures = judge.accuracies(truth, seen)
    for name in judge.ATTRIBUTES:
        assert figures[name] >= 0.995, (name, figures)


def test_reads_through_noise_and_other_sizes(truth: list[Attributes]) -> None:
    random = np.random.default_rng(12)
    seen = []
    for index, item in enumerate(truth[:60]):
        video = world.render_attributes(item, index, height=128, width=128, num_frames=19)
        noise = random.normal(0.0, 6.0, video.shape)
        seen.append(judge.read_video(np.clip(video + noise, 0, 255).astype(np.uint8)))
    figures = judge.accuracies(truth[:60], seen)
    assert figures["all four"] >= 0.95, figures


def test_noise_is_no_better_than_guessing(truth: list[Attributes]) -> None:
    random = np.random.default_rng(13)
    seen = [
        judge.read_video(random.integers(0, 256, (13, 96, 96, 3), dtype=np.uint8))
        for _ in range(30)
    ]
    assert judge.accuracies(truth[:30], seen)["all four"] <= 0.1


def test_a_swap_of_the_colours_is_seen() -> None:
    item = Attributes(color=0, background=2, shape=1, motion=6)
    swapped = replace(item, color=2, background=0)
    assert judge.read_video(world.render_attributes(swapped, 1)) == swapped


def test_accuracies_count_attributes_alone_and_together() -> None:
    item = Attributes(0, 1, 2, 3, 1)
    figures = judge.accuracies([item, item], [item, replace(item, shape=0)])
    assert figures["shape"] == 0.5
    assert figures["background+color+motion"] == 1.0
    assert figures["all four"] == 0.5


def test_psnr() -> None:
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert judge.psnr(black, black + 255) == pytest.approx(0.0, abs=1e-6)
    assert judge.psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_contact_sheet_has_a_row_for_each_prompt() -> None:
    video = world.render("a red circle growing on a blue background", 1)
    sheet = judge.contact_sheet([(video, video)] * 3, (0, 15, 30))
    assert sheet.size == (2 * 3 * 96 + 4, 3 * 96 + 2 * 4)


def test_sheet_prompts_are_held_out() -> None:
    prompts = list(judge.sheet_prompts())
    assert len(set(prompts)) == 16
    assert all(words.is_held_out(words.parse_caption(prompt)) for prompt in prompts)

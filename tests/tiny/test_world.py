"""The embedded model's world: captions, rendering, and what training may never see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mochi_app.tiny import build, data, words, world
from mochi_app.tiny.words import Attributes


def some_attributes(count: int, seed: int = 0) -> list[Attributes]:
    random = np.random.default_rng(seed)
    return [words.random_attributes(random) for _ in range(count)]


def test_canonical_captions_are_the_grammar() -> None:
    item = Attributes(color=0, background=2, shape=3, motion=4, size=0)
    assert words.caption_of(item) == "a small red ring growing on a blue background"
    assert words.caption_of(replace(item, size=1)) == "a red ring growing on a blue background"


def test_every_way_of_saying_it_parses_back_and_uses_known_words() -> None:
    random = np.random.default_rng(1)
    tokenizer = build.build_tokenizer()
    for item in some_attributes(500):
        caption = words.random_caption(item, random)
        assert words.parse_caption(caption) == item, caption
        assert tokenizer.unk_token_id not in tokenizer(caption).input_ids, caption


@pytest.mark.parametrize(
    ("caption", "missing"),
    [
        ("a red circle moving left", "background"),
        ("a circle growing on a red background", "colour"),
        ("a red zebra growing on a blue background", "shape"),
        ("a red circle on a blue background", "motion"),
    ],
)
def test_incomplete_captions_say_what_is_missing(caption: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"no {missing}"):
        words.parse_caption(caption)


def test_colour_and_background_always_differ() -> None:
    assert all(item.color != item.background for item in some_attributes(2000))


def test_held_out_triples_never_reach_training() -> None:
    random = np.random.default_rng(2)
    chosen = [words.training_attributes(random) for _ in range(4000)]
    assert not any((a.color + a.background + a.shape) % 5 == 0 for a in chosen)
    assert all(words.is_held_out(words.held_out_attributes(random)) for _ in range(200))
    assert len({(a.color, a.background, a.shape) for a in chosen}) > 150


class Lowest(np.random.Generator):
    """Draws the lowest of a great many whole numbers."""

    def integers(self, low: Any, high: Any = None, **more: Any) -> Any:  # type: ignore[override]
        return 0 if low >= 2**31 else super().integers(low, high, **more)


def test_training_geometry_never_shares_a_seed_with_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation counts its seeds from 0, in tens of thousands."""
    seeds: list[int] = []
    plan = world.plan

    def note(item: Attributes, seed: int, num_frames: int) -> world.Plan:
        seeds.append(seed)
        return plan(item, seed, num_frames)

    monkeypatch.setattr(world, "plan", note)
    monkeypatch.setattr(world, "coverage", lambda *_: np.zeros((31, 96, 96), np.float32))
    monkeypatch.setattr(world, "paint", lambda *_: np.zeros((7, 96, 96, 3), np.uint8))
    data.clips(Lowest(np.random.PCG64(0)), 4, 7)
    data.geometry_bank(tmp_path / "bank", 1)
    assert len(seeds) == 4 + 4 * 7 * 3
    assert min(seeds) > 100_000


def test_rendering_repeats_and_depends_on_the_seed() -> None:
    caption = "a red circle moving right on a blue background"
    first, again, other = (world.render(caption, seed) for seed in (3, 3, 4))
    assert first.shape == (31, 96, 96, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_synonyms_show_the_same_video() -> None:
    plain = world.render("a red circle moving right on a blue background", 3)
    assert np.array_equal(plain, world.render("On the blue background, a red ball moves right.", 3))


def test_movement_growth_and_view_are_within_the_rules() -> None:
    for seed, item in enumerate(some_attributes(400, seed=5)):
        path = world.plan(item, seed, 31)
        travel = np.abs(path.centers[-1] - path.centers[0]).max()
        growth = path.widths.max() / path.widths.min()
        motion = words.MOTIONS[item.motion]
        assert (0.4 <= travel <= 0.6) == motion.startswith("moving")
        assert (1.6 <= growth <= 4.0) == (motion in ("growing", "shrinking"))
        inside = np.abs(path.centers - 0.5) + path.widths[:, None] / 2 <= 0.52
        assert inside.all(axis=1).mean() > 0.5
        middle = np.exp(np.log(path.widths).mean())
        assert middle == pytest.approx(world.WIDTHS[item.size], rel=0.06)


def test_no_frame_is_ever_flat() -> None:
    for seed, item in enumerate(some_attributes(50, seed=6)):
        video = world.render_attributes(item, seed).astype(float)
        assert (video.reshape(31, -1, 3).std(axis=1).max(axis=1) > 2).all()


def test_light_falls_from_above() -> None:
    """Seen beside a small shape that stands still, which covers neither edge."""
    still = words.MOTIONS.index("standing still")
    for seed, item in enumerate(some_attributes(8, seed=6)):
        video = world.render_attributes(replace(item, motion=still, size=0), seed).astype(float)
        assert (video[:, 0].mean(axis=1) > video[:, -1].mean(axis=1)).all()


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again, other = (
        data.clips(data.step_random(0, "decoder", step), 1, 7) for step in (4, 4, 5)
    )
    assert first.equal(again)
    assert not first.equal(other)

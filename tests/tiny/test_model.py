"""The embedded model's folder, its latents, and that training stops and goes on without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MochiPipeline
from torch import nn

from mochi_app.tiny import (
    attention,
    build,
    curve,
    data,
    judge,
    latents,
    train,
    train_decoder,
    train_text,
    train_transformer,
    words,
    world,
)
from mochi_app.tiny.checkpoints import Training
from tests.places import TINY as ASSETS


@pytest.fixture(scope="module")
def shipped() -> MochiPipeline:
    pipeline = MochiPipeline.from_pretrained(ASSETS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def untrained() -> MochiPipeline:
    return build.build_pipeline(0)


def video_of(pipeline: MochiPipeline, prompt: str, seed: int = 0, **options: object) -> np.ndarray:
    settings = {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 2} | options
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(prompt, generator=generator, output_type="np", **settings).frames[0]
    assert np.isfinite(frames).all()
    return np.asarray(frames)


def test_the_folder_is_small_and_says_how_to_use_it() -> None:
    assert build.folder_mebibytes(ASSETS) <= 30
    defaults = json.loads((ASSETS / "mochi_defaults.json").read_text(encoding="utf-8"))
    assert set(defaults) == set(build.model_defaults(None))
    assert defaults["height"] % 16 == defaults["width"] % 16 == 0
    assert defaults["num_frames"] % 6 == 1
    for example in defaults["examples"]:
        words.parse_caption(example)


def test_the_folder_holds_the_architecture_that_build_makes(
    shipped: MochiPipeline, untrained: MochiPipeline
) -> None:
    for name in ("vae", "transformer", "text_encoder"):
        ours, theirs = getattr(shipped, name), getattr(untrained, name)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert shipped.tokenizer.get_vocab() == untrained.tokenizer.get_vocab()
    assert tuple(shipped.vae.config.latents_std) == latents.LATENTS_STD
    assert shipped.transformer.config.num_attention_heads == 12


def test_the_same_seed_gives_the_same_video(shipped: MochiPipeline) -> None:
    prompt = "a red circle growing on a blue background"
    first, again, other = (video_of(shipped, prompt, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unknown_words_negative_prompts_and_no_guidance_work(shipped: MochiPipeline) -> None:
    prompt = "Ein grüner zebra 🦓 dances; on a red background!"
    plain = video_of(shipped, prompt, guidance_scale=3.0)
    negative = video_of(shipped, prompt, guidance_scale=3.0, negative_prompt="a red square")
    unguided = video_of(shipped, prompt, guidance_scale=1.0)
    assert not np.array_equal(plain, negative)
    assert not np.array_equal(plain, unguided)


def test_building_is_deterministic(untrained: MochiPipeline) -> None:
    again = build.build_pipeline(0)
    for name in ("vae", "transformer", "text_encoder"):
        ours, theirs = getattr(untrained, name).state_dict(), getattr(again, name).state_dict()
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_the_encoder_gives_the_analytic_latents(shipped: MochiPipeline) -> None:
    video = world.render("a big white ring moving up on a black background", 5)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        encoded = shipped.vae.encode(pixels).latent_dist
    exact = latents.analytic_latents(pixels)
    assert encoded.mean.shape == exact.shape == (1, 12, 6, 12, 12)
    assert (encoded.mean - exact).abs().max() < 2e-3
    assert encoded.std.max() < 1e-2


def test_latent_colour_map_gives_the_mean_colour() -> None:
    video = world.render("a red square standing still on a green background", 5)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mapping = json.loads((ASSETS / "latent_rgb.json").read_text(encoding="utf-8"))
    normalised = latents.normalise(latents.analytic_latents(pixels))[0, :, 1]
    factors, bias = torch.tensor(mapping["factors"]), torch.tensor(mapping["bias"])
    rgb = torch.einsum("rc,chw->rhw", factors, normalised) + bias[:, None, None]
    blocks = torch.from_numpy(video[1:7]).float().div(255).reshape(6, 12, 8, 12, 8, 3)
    assert torch.allclose(rgb, blocks.mean(dim=(0, 2, 4)).permute(2, 0, 1), atol=1e-4)


def test_mixed_latents_are_those_of_the_rendered_video(tmp_path: Path) -> None:
    source = data.LatentSource(data.geometry_bank(tmp_path / "bank.safetensors", 1))
    item = words.Attributes(color=3, background=4, shape=2, motion=1, size=2)
    class_number = (item.shape * 7 + item.motion) * 3 + item.size
    video = world.render_attributes(item, data.TRAINING_SEEDS + class_number)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    moments = source.bank[item.shape, item.motion, item.size, 0].float()[None]
    mixed = source.colour(moments, [item])
    exact = latents.normalise(latents.analytic_latents(pixels))
    assert (mixed - exact).abs().max() < 0.05  # eight-bit pixels, sixteen-bit moments
    batch = source.batch(data.step_random(0, "transformer", 0), 8)
    assert batch.latents.shape == (8, 12, 6, 12, 12)
    assert batch.weights.shape == (8,)


def test_the_loss_is_least_at_the_mean_of_what_could_be_there() -> None:
    """Two clean samples for one noisy one: weights must not pull the best answer from between."""
    source = data.LatentSource(torch.zeros((4, 7, 3, 1, 4, 6, 12, 12), dtype=torch.float16))
    source.bank[..., :2, :2] = 1.0
    batch = source.batch(data.step_random(0, "transformer", 0), 2)
    there, gone = batch.latents[:1], torch.zeros_like(batch.latents[:1])
    both = data.LatentBatch(torch.cat([there, gone]), [batch.captions[0]] * 2, torch.ones(2))

    def loss(guess: torch.Tensor) -> float:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(both.latents.shape, generator=generator)
        answer = (guess - noise,)
        embedded = (torch.empty(0), torch.empty(0))
        generator = torch.Generator().manual_seed(3)
        return float(
            train_transformer.loss_of(lambda **_: answer, both, embedded, generator).mean()
        )

    mean = (there + gone) / 2
    assert loss(mean) < min(loss(0.9 * mean), loss(1.1 * mean), loss(1.6 * mean))


def test_small_shapes_and_close_colours_weigh_more_by_what_the_caption_says() -> None:
    source = data.LatentSource(torch.zeros((4, 7, 3, 1, 4, 6, 12, 12), dtype=torch.float16))

    def weight(caption: str) -> float:
        return source.weight(words.parse_caption(caption), caption)

    clear = weight("a big white circle moving left on a black background")
    small = weight("a small red circle moving left on a purple background")
    faint = weight("a small orange circle moving left on a yellow background")
    ring = weight("a small red ring moving left on a purple background")
    assert clear < small < faint <= data.MAX_WEIGHT
    assert small < ring
    said = words.parse_caption("a small orange circle moving left on a yellow background")
    assert source.weight(said, "") == source.weight(said, "a circle") == 1.0


def test_batched_attention_equals_the_stock_processor() -> None:
    torch.manual_seed(1)
    transformer = build.build_transformer(0).eval()
    inputs = {
        "hidden_states": torch.randn(2, 12, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 9, 128),
        "timestep": torch.tensor([20.0, 700.0]),
        "encoder_attention_mask": torch.arange(9)[None] < torch.tensor([[4], [9]]),
    }
    with torch.no_grad():
        stock = transformer(**inputs, return_dict=False)[0]
        attention.use_batched_attention(transformer)
        batched = transformer(**inputs, return_dict=False)[0]
    assert torch.allclose(stock, batched, atol=1e-5)


def trained_weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.averaged.parameters()]


def start_decoder(work: Path) -> Training:
    torch.manual_seed(0)
    return train_decoder.start(build.build_vae(), work)


def start_text(work: Path) -> Training:
    torch.manual_seed(0)
    return train_text.start(build.build_text_encoder(80), work)


@pytest.mark.parametrize("stage", ["decoder", "text"])
def test_training_that_stops_goes_on_as_if_it_had_not(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_decoder, "CLIP_FRAMES", 7)
    tokenizer = build.build_tokenizer()
    start: Callable[[Path], Training] = start_decoder if stage == "decoder" else start_text

    def run(training: Training, until: int) -> None:
        while training.step < until:  # the schedule looks at the whole length: always of 4 steps
            if stage == "decoder":
                train_decoder.one_step(training, seed=0, steps=4)
            else:
                train_text.one_step(training, tokenizer, seed=0, steps=4)

    whole = start(tmp_path)
    run(whole, 2)
    stopped = start(tmp_path)
    run(stopped, 1)
    stopped.save()
    resumed = start(tmp_path)
    assert resumed.resume()
    assert resumed.step == 1
    run(resumed, 2)
    for ours, theirs in zip(trained_weights(whole), trained_weights(resumed), strict=True):
        assert torch.equal(ours, theirs)


def test_transformer_training_lowers_its_loss(tmp_path: Path, untrained: MochiPipeline) -> None:
    source = data.LatentSource(torch.zeros((4, 7, 3, 1, 4, 6, 12, 12), dtype=torch.float16))
    torch.manual_seed(0)
    training = train_transformer.start(build.build_transformer(0), tmp_path)
    captions = train_transformer.Captions(untrained.tokenizer, untrained.text_encoder)
    batch = source.batch(data.step_random(0, "transformer", 0), 2)
    losses = []
    for _ in range(3):
        generator = torch.Generator().manual_seed(7)
        embedded = captions(batch.captions)
        loss = train_transformer.loss_of(training.model, batch, embedded, generator).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in training.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_sampling_times_cover_the_range() -> None:
    times = train_transformer.draw_times(512, torch.Generator().manual_seed(0))
    assert 0 <= times.min() < 0.01
    assert 0.97 < times.max() <= 1
    assert (times < 0.25).float().mean() > 0.4


def test_export_writes_averaged_weights_and_curves(tmp_path: Path) -> None:
    options = train.parse_arguments(
        ["--output", str(tmp_path / "out"), "--work", str(tmp_path), "--notice", "half trained"]
    )
    training = start_decoder(tmp_path)
    first = next(training.averaged.parameters())
    nn.init.constant_(first, 0.25)
    training.losses = [(1, 2.0), (2, 1.0)]
    training.save()
    train.export(options)
    exported = MochiPipeline.from_pretrained(tmp_path / "out")
    assert torch.all(next(exported.vae.decoder.parameters()) == 0.25)
    defaults = json.loads((tmp_path / "out" / "mochi_defaults.json").read_text(encoding="utf-8"))
    assert defaults["notice"] == "half trained"
    assert (tmp_path / "out" / "loss.png").stat().st_size > 500


def run_training(*arguments: str) -> None:
    """The command, to its end, with so little work that it takes seconds."""
    command = [sys.executable, "-m", "mochi_app.tiny.train", "--eager", "--geometries", "1"]
    subprocess.run([*command, *arguments], check=True, timeout=150)


def steps_of(work: Path) -> dict[str, int]:
    """How many steps each stage's checkpoint has seen."""
    return {
        name: torch.load(work / f"{name}.pt", weights_only=True)["step"] for name in train.STAGES
    }


@pytest.mark.slow  # seven processes that load torch
def test_the_command_trains_from_nothing_goes_on_and_starts_from_exported_weights(
    tmp_path: Path,
) -> None:
    work, output = tmp_path / "work", tmp_path / "out"
    toy = ("--text-steps", "2", "--decoder-steps", "1", "--transformer-steps", "1")
    run_training("--work", str(work), "--output", str(output), *toy)
    assert steps_of(work) == {"text": 2, "decoder": 1, "transformer": 1}
    first = MochiPipeline.from_pretrained(output)

    longer = ("--text-steps", "2", "--decoder-steps", "1", "--transformer-steps", "2")
    run_training("--work", str(work), "--output", str(output), *longer, "--resume")
    assert steps_of(work) == {"text": 2, "decoder": 1, "transformer": 2}
    second = MochiPipeline.from_pretrained(output)
    assert moved(first.transformer, second.transformer)
    assert not moved(first.vae, second.vae)

    again, other = tmp_path / "again", tmp_path / "other"
    run_training("--work", str(again), "--output", str(other), *toy, "--init", str(output))
    third = MochiPipeline.from_pretrained(other)
    assert not moved(second.text_encoder, third.text_encoder)
    assert moved(second.transformer, third.transformer)
    assert distance(second.transformer, third.transformer) < distance(
        first.transformer, build.build_transformer(5)
    )


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module) -> float:
    """Root mean square of the difference between the weights of two models of one architecture."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    squares = [(a.float() - b.float()).square().flatten() for a, b in pairs]
    return float(torch.cat(squares).mean().sqrt())


def moved(one: nn.Module, other: nn.Module) -> bool:
    """Whether training has changed anything between the two."""
    return distance(one, other) > 0


def test_training_refuses_to_write_over_old_checkpoints(tmp_path: Path) -> None:
    start_text(tmp_path).save()
    with pytest.raises(SystemExit, match="--resume"):
        train.check_work(train.parse_arguments(["--work", str(tmp_path)]))
    train.check_work(train.parse_arguments(["--work", str(tmp_path), "--resume"]))


def test_curve_of_nothing_is_an_empty_picture() -> None:
    assert curve.draw_curves({}).size == curve.PANEL


def test_reconstruction_runs_through_both_halves(shipped: MochiPipeline) -> None:
    video = world.render("a red circle growing on a blue background", 1, num_frames=7)
    assert judge.reconstruct(shipped, video).shape == video.shape

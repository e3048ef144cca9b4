"""The pipeline's promises on the embedded model: exactness, a clean state, a cheap picture."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MochiPipeline
from PIL import Image

from mochi_app.engine import pipeline, previews, start
from mochi_app.engine.gpu_memory import MemoryBudget
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import LoadError, Precision
from mochi_app.engine.pipeline import Engine, Result, TooLarge
from mochi_app.engine.previews import LatentColours
from mochi_app.messages import (
    Configure,
    JobEvent,
    Latent,
    Loading,
    Message,
    Run,
    Stage,
    Step,
    Tiles,
)
from tests.places import TINY
from tests.whole_videos import stock_frames

SCRATCH = tempfile.TemporaryDirectory()

CONFIG = Configure(
    slot=0, rank=0, world_size=1, model=str(TINY), device="cpu", dtype="float32",
    scratch=SCRATCH.name,
)  # fmt: skip

REQUEST = Run(
    job_id="j", prompt="a red ball rolls right", negative_prompt="", seed=3,
    num_inference_steps=2, guidance_scale=3.0, height=64, width=80, num_frames=7, fps=12,
)  # fmt: skip


def ignore(message: Message) -> None:
    """An emit that nobody reads."""


def never() -> bool:
    """A cancel that does not come."""
    return False


def frames_of(engine: Engine, request: Run = REQUEST) -> Result:
    """A run that must succeed."""
    result = engine.run(request, ignore, never)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def told() -> list[Message]:
    """What the loading of `engine` said."""
    return []


@pytest.fixture(scope="module")
def engine(told: list[Message]) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    yield start.load(replace(CONFIG, threads=1), told.append)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Result:
    """What the request yields."""
    return frames_of(engine)


@pytest.fixture(scope="module")
def stock() -> MochiPipeline:
    """The same folder through the library's own door, nothing else done to it."""
    pipe = MochiPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> MochiPipeline:
    """A pipeline that a test may change."""
    pipe = MochiPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"negative_prompt": "a blue square"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "negative_prompt": "a blue square"},
        {"seed": 2**32 - 1, "height": 96, "width": 64, "num_frames": 13, "guidance_scale": 7.5},
    ],
    ids=["guided", "negative prompt", "no guidance", "guidance off", "another size"],
)
def test_frames_are_those_of_a_plain_call(
    engine: Engine, stock: MochiPipeline, change: dict[str, Any]
) -> None:
    request = replace(REQUEST, **change)
    frames = frames_of(engine, request).frames
    assert frames is not None
    assert frames.dtype == np.uint8
    assert frames.shape == (request.num_frames, request.height, request.width, 3)
    assert np.array_equal(frames, stock_frames(stock, request))


def test_a_negative_prompt_counts_only_with_guidance(engine: Engine, plain: Result) -> None:
    read: list[int] = []
    hook = engine._pipe.text_encoder.register_forward_hook(lambda *_: read.append(1))
    negated = replace(REQUEST, negative_prompt="a blue square")
    assert frames_of(engine, negated).frames_hash != plain.frames_hash
    assert len(read) == 2
    free = [frames_of(engine, replace(item, guidance_scale=1.0)) for item in (REQUEST, negated)]
    hook.remove()
    assert free[0].frames_hash == free[1].frames_hash
    assert len(read) == 2 + 2  # the negative prompt was not even read


def test_zeroed_empty_prompts_as_in_a_plain_call(pipe: MochiPipeline, stock: MochiPipeline) -> None:
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    frames = frames_of(Engine(pipe)).frames
    assert frames is not None
    assert np.array_equal(frames, stock_frames(pipe, REQUEST))
    assert not np.array_equal(frames, stock_frames(stock, REQUEST))


def test_tiled_frames_are_those_of_a_plain_call(pipe: MochiPipeline) -> None:
    pipe.vae.enable_tiling(48, 48, 32, 32)
    tiles: list[tuple[int, ...]] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape[3:]))
    frames = frames_of(Engine(pipe)).frames
    assert frames is not None
    assert tiles == [(6, 6), (6, 6), (4, 6), (4, 6), (6, 2), (4, 2)]
    assert np.array_equal(frames, stock_frames(pipe, REQUEST))


def test_large_frames_are_decoded_in_tiles_and_that_is_told(engine: Engine) -> None:
    large = replace(REQUEST, num_inference_steps=2, height=64, width=272, guidance_scale=1.0)
    for request, total in ((large, 2), (REQUEST, 1)):  # 80 pixels wide: whole
        events: list[Message] = []
        engine.run(request, events.append, never)
        told = [(event.done, event.total) for event in events if isinstance(event, Tiles)]
        assert told == [(done, total) for done in range(total + 1)]


def test_a_cancel_between_two_tiles_is_heard(engine: Engine, plain: Result) -> None:
    large = replace(REQUEST, num_inference_steps=2, height=64, width=272, guidance_scale=1.0)
    decoded: list[int] = []

    def hear(message: Message) -> None:
        if isinstance(message, Tiles):
            decoded.append(message.done)

    assert engine.run(large, hear, lambda: decoded[-1:] == [1]) is None
    assert decoded == [0, 1]
    assert frames_of(engine).frames_hash == plain.frames_hash


def test_tiles_are_told_and_a_cancel_is_asked_when_the_device_has_decoded_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's work is only queued when `vae.decode` returns."""
    large = replace(REQUEST, num_inference_steps=2, height=64, width=272, guidance_scale=1.0)
    log: list[str] = []
    monkeypatch.setattr(engine, "_synchronize", lambda: log.append("device done"))

    def hear(message: Message) -> None:
        if isinstance(message, Stage | Tiles):
            log.append(message.stage if isinstance(message, Stage) else f"tile {message.done}")

    def cancelled() -> bool:
        log.append("cancelled?")
        return False

    engine.run(large, hear, cancelled)
    assert log[log.index("decode") :] == [
        "decode", "tile 0", "device done", "tile 1", "cancelled?", "device done", "tile 2",
        "device done",
    ]  # fmt: skip


def test_the_hash_of_the_first_latents_depends_on_seed_and_size_only(
    engine: Engine, plain: Result
) -> None:
    first = plain.latents_hash
    noise = torch.randn(
        (1, 12, 2, 8, 10), generator=torch.Generator("cpu").manual_seed(3), dtype=torch.float32
    )
    assert first == pipeline.sha256(noise.numpy())
    same = replace(REQUEST, num_inference_steps=6, prompt="a green cube", guidance_scale=1.0)
    assert frames_of(engine, same).latents_hash == first
    assert frames_of(engine, replace(REQUEST, seed=4)).latents_hash != first
    assert frames_of(engine, replace(REQUEST, num_frames=13)).latents_hash != first


@pytest.mark.parametrize("boundary", range(5))
def test_a_cancel_at_any_boundary_leaves_no_trace(
    engine: Engine, plain: Result, boundary: int
) -> None:
    """Before text, before denoise, after each of two steps, before decode."""
    asked = iter(range(100))
    events: list[Message] = []
    assert engine.run(REQUEST, events.append, lambda: next(asked) >= boundary) is None
    stages = [event.stage for event in events if isinstance(event, Stage)]
    assert stages == ["text", "denoise"][: min(boundary, 2)]
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == [1, 2][: max(0, boundary - 1)]
    assert frames_of(engine).frames_hash == plain.frames_hash


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_caching_transformer_forgets_a_run_that_ended_early(
    pipe: MochiPipeline, how: str
) -> None:
    """The cache lives in hooks that only the end of a call resets."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    engine = Engine(pipe)
    before = frames_of(engine)
    steps = iter(range(100))

    def interrupt() -> bool:
        late = next(steps) >= 2
        if late and how == "failed":
            raise RuntimeError("in mid-run")
        return late

    other = replace(REQUEST, seed=99, prompt="a yellow star")
    if how == "failed":
        with pytest.raises(RuntimeError, match="in mid-run"):
            engine.run(other, ignore, interrupt)
    else:
        assert engine.run(other, ignore, interrupt) is None
    assert frames_of(engine).frames_hash == before.frames_hash


class OneOfTwo(Ranks):
    """A rank whose peer says yes to everything asked."""

    def agree(self, flag: bool) -> bool:
        return True


@pytest.mark.parametrize(
    ("problem", "ranks", "told"),
    [("needs 90 GB", Ranks(), "needs 90 GB"), ("", OneOfTwo(), "another GPU of the slot")],
)
def test_what_does_not_fit_is_refused_before_any_work(
    pipe: MochiPipeline, monkeypatch: pytest.MonkeyPatch, problem: str, ranks: Ranks, told: str
) -> None:
    budget = MemoryBudget(CONFIG, Precision.choose(CONFIG, torch.device("cpu")), 1)
    monkeypatch.setattr(MemoryBudget, "problem", lambda self, *size: problem)
    events: list[Message] = []
    with pytest.raises(TooLarge, match=told) as caught:
        Engine(pipe, ranks=ranks, budget=budget).run(REQUEST, events.append, never)
    assert caught.value.settled
    assert not events


def test_no_part_stays_in_train_mode(pipe: MochiPipeline) -> None:
    parts = [pipe.text_encoder, pipe.transformer, pipe.vae]
    for part in parts:
        part.train()
    Engine(pipe)
    assert not any(module.training for part in parts for module in part.modules())


def test_steps_are_counted_and_timed(engine: Engine) -> None:
    events: list[Message] = []
    result = engine.run(REQUEST, events.append, never)
    assert result is not None
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.step, step.steps, step.job_id) for step in steps] == [
        (1, 2, "j"),
        (2, 2, "j"),
    ]
    assert list(result.seconds) == ["text", "denoise", "decode"]
    total = result.seconds["denoise"]
    assert 0 < sum(step.seconds for step in steps) <= total


def test_pictures_of_the_run_are_small_and_rare(engine: Engine) -> None:
    events: list[Message] = []
    result = engine.run(replace(REQUEST, num_inference_steps=12), events.append, never)
    assert result is not None
    pictures = [event for event in events if isinstance(event, Latent)]
    assert 1 <= len(pictures) <= 1 + result.seconds["denoise"] / previews.PICTURE_SECONDS
    head, _, data = pictures[0].image.partition(",")
    assert head == "data:image/webp;base64"
    assert len(data) < 16_000
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.size) == ("WEBP", (80, 64))


def test_a_picture_is_at_most_160_pixels_wide() -> None:
    colours = LatentColours(torch.eye(12)[:, :3], torch.full((3,), 0.5))
    url = colours.picture(torch.zeros(12, 60, 106), 480, 848)
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (160, 90)
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 128).max() <= 2


def test_the_forecast_of_a_straight_path_is_its_end() -> None:
    noise, video = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    here, there = ((1 - sigma) * noise + sigma * video for sigma in (0.1, 0.3))
    end = previews.forecast(here, there, torch.tensor([0.1, 0.3]))
    assert torch.allclose(end, video, atol=1e-5)


def test_loading_tells_that_it_tries_the_model(engine: Engine, told: list[Message]) -> None:
    assert told == [Loading(what="warming up")]
    assert engine.device == "cpu"
    assert engine.versions["torch"] == torch.__version__
    assert torch.get_num_threads() == 1
    assert not list(Path(SCRATCH.name).iterdir())


def test_a_model_that_yields_nan_does_not_load(
    pipe: MochiPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    monkeypatch.setattr(start, "open_pipeline", lambda *given, **more: pipe)
    with pytest.raises(ArithmeticError, match="not finite"):
        start.load(CONFIG, ignore)


def test_a_slot_that_cannot_write_a_video_does_not_load(
    pipe: MochiPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start, "open_pipeline", lambda *given, **more: pipe)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        start.load(replace(CONFIG, scratch=str(tmp_path / "file")), ignore)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/nowhere/model"}, "/nowhere/model: expected a MochiPipeline folder"),
        ({"model": "./assets"}, "model_index.json"),
        ({"device": "tpu"}, "device 'tpu': expected cpu or cuda"),
        ({"dtype": "float8"}, "dtype 'float8': expected auto, float32 or bfloat16"),
        ({"attention": "warp"}, "attention 'warp': .*must be one of"),
        ({"quantization": "int3"}, "quantization 'int3': expected none, fp8 or int8"),
        ({"offload": "model"}, "offload model: expected device cuda, not cpu"),
    ],
)
def test_what_cannot_be_loaded_says_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        start.load(replace(CONFIG, **change), ignore)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(LoadError, match="sees no GPU"):
        start.load(replace(CONFIG, device="cuda"), ignore)


def test_bfloat16_takes_the_bfloat16_files_if_there_are_any(
    pipe: MochiPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have the rotary frequencies rounded, which is said: float32 again, they stay rounded."""
    exact = pipe.transformer.pos_frequencies.data.clone()
    rounded = exact.bfloat16().float()
    assert not torch.equal(exact, rounded)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert list(tmp_path.glob("transformer/*.bf16.safetensors"))
    small = replace(CONFIG, dtype="bfloat16", text_dtype="bfloat16")
    plain = start.load(small, ignore)
    frequencies = plain._pipe.transformer.pos_frequencies
    assert torch.equal(frequencies, exact)
    assert "rotary" not in caplog.text
    engine = start.load(replace(small, model=str(tmp_path)), ignore)
    assert torch.equal(engine._pipe.transformer.pos_frequencies, rounded)
    assert caplog.text.count("rotary frequencies") == 1
    frequencies.data = rounded
    assert frames_of(engine).frames_hash == frames_of(plain).frames_hash


@pytest.mark.parametrize("content", ["{", "[]", '{"factors": [[1, 2]], "bias": [0, 0, 0]}'])
def test_a_bad_colour_map_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "latent_rgb.json"
    path.write_text(content)
    with pytest.raises(LoadError, match=r"latent_rgb\.json"):
        LatentColours.read(path)


def test_colour_maps_of_either_orientation_are_read(tmp_path: Path) -> None:
    path = tmp_path / "latent_rgb.json"
    assert LatentColours.read(path) is None
    factors = torch.arange(36.0).reshape(12, 3)
    for shape in (factors, factors.T):
        path.write_text(json.dumps({"factors": shape.tolist(), "bias": [0.1, 0.2, 0.3]}))
        colours = LatentColours.read(path)
        assert colours is not None
        assert torch.equal(colours.factors, factors)


def test_events_of_a_run_are_about_its_job(engine: Engine) -> None:
    events: list[Message] = []
    engine.run(REQUEST, events.append, never)
    assert {event.job_id for event in events if isinstance(event, JobEvent)} == {"j"}
    assert all(isinstance(event, JobEvent) for event in events)


@pytest.mark.slow
def test_bfloat16_weights_stay_closer_to_float32_than_a_bfloat16_pipeline() -> None:
    """Latents in float32 between steps pay in long runs."""
    request = replace(
        REQUEST, num_inference_steps=32, guidance_scale=4.5, height=96, width=96, num_frames=31
    )
    exact = frames_of(start.load(CONFIG, ignore), request).frames
    ours = frames_of(start.load(replace(CONFIG, dtype="bfloat16"), ignore), request).frames
    stock = MochiPipeline.from_pretrained(TINY, dtype=torch.bfloat16)
    stock.set_progress_bar_config(disable=True)
    plain = stock_frames(stock, request)
    assert exact is not None
    assert ours is not None

    def error(frames: np.ndarray[Any, Any]) -> float:
        return float(np.abs(frames.astype(float) - exact.astype(float)).mean())

    assert 0 < error(ours) < error(plain) / 1.5, (error(ours), error(plain))

"""An engine's options: what each changes in the frames, and that no run leaves anything behind."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from torch._dynamo.utils import counters

from mochi_app.engine import speed
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import LoadError, Precision, open_pipeline
from mochi_app.engine.parallel import parallelize
from mochi_app.engine.pipeline import Engine, Result
from mochi_app.engine.speed import SpeedOptions
from mochi_app.messages import Configure, Message, Run, Step
from tests.places import TINY
from tests.ranks import run_ranks

CPU = torch.device("cpu")
STEPS = 6
REQUEST = Run(
    job_id="b", prompt="a red ring moving left on a white background", negative_prompt="", seed=0,
    num_inference_steps=STEPS, guidance_scale=4.5, height=64, width=80, num_frames=7, fps=12,
)  # fmt: skip
# Other by a word: a cache left from its first steps is near enough to pass for that of REQUEST.
OTHER = replace(REQUEST, job_id="a", prompt=REQUEST.prompt.replace("left", "right"))
UNGUIDED = replace(OTHER, guidance_scale=1.0)
SHORT, SHORT_UNGUIDED = (replace(run, num_inference_steps=2) for run in (REQUEST, UNGUIDED))
THRESHOLD = 0.2
SKIPPED = 2  # of the steps of REQUEST, with that threshold

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was:UserWarning")

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU wants g++"
)

OPTIONS = {
    "cache": SpeedOptions(cache_threshold=THRESHOLD),
    "fp8": SpeedOptions(quantization="fp8"),
    "int8": SpeedOptions(quantization="int8"),
    "compile": SpeedOptions(compile=True),
    "cache, compile": SpeedOptions(cache_threshold=THRESHOLD, compile=True),
    "cache, fp8": SpeedOptions(cache_threshold=THRESHOLD, quantization="fp8"),
    "cache, compile, fp8": SpeedOptions(THRESHOLD, compile=True, quantization="fp8"),
}
EACH = [
    pytest.param(name, marks=[needs_torchao] if name == "int8" else [])
    for name in OPTIONS
    if name.count(",") < 2
]


def build(options: SpeedOptions, ranks: Ranks | None = None, dtype: str = "float32") -> Engine:
    """The embedded model with those options, as `pipeline.load` makes it but for the warm-up."""
    ranks = ranks or Ranks()
    torch.set_num_threads(1)
    precision = Precision(getattr(torch, dtype), torch.float32, torch.float32)
    pipe = open_pipeline(str(TINY), precision, CPU, text=ranks.first)
    pipe.set_progress_bar_config(disable=True)
    speed.apply(pipe, options, ranks)
    return Engine(pipe, ranks=ranks)


def frames_of(engine: Engine, request: Run = REQUEST) -> np.ndarray[Any, Any]:
    """Frames of a run that nobody cancels; of shape (0,) on ranks that have none."""
    result = engine.run(request, lambda message: None, lambda: False)
    assert isinstance(result, Result)
    return np.zeros(0) if result.frames is None else result.frames


def difference(frames: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference, in grey levels of 255."""
    return float(np.abs(frames.astype(float) - others.astype(float)).mean())


def transformer_of(engine: Engine) -> Any:
    return engine._pipe.transformer


def block_runs(engine: Engine) -> list[int]:
    """A list that grows by one each time the last block computes."""
    runs: list[int] = []
    feed_forward = transformer_of(engine).transformer_blocks[-1].ff
    feed_forward.register_forward_hook(lambda *_: runs.append(1))
    return runs


def stored_bytes(module: torch.nn.Module) -> int:
    """What the weights take up; a quantized one is a pair of tensors behind one of its old type."""
    total = 0
    for weight in module.parameters():
        flatten = getattr(weight, "__tensor_flatten__", None)
        parts = [getattr(weight, name) for name in flatten()[0]] if flatten else [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@contextmanager
def quick_compilation() -> Iterator[None]:
    """torch traces, guards and recompiles as ever, and then runs the graphs with plain kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "compile_blocks", partial(speed.compile_blocks, backend="eager"))
        yield


@pytest.fixture(scope="module", autouse=True)
def own_thread_and_graphs() -> Iterator[None]:
    """Leave the process to other tests as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain() -> Engine:
    """An engine without options."""
    return build(SpeedOptions())


@pytest.fixture(scope="module")
def expected(plain: Engine) -> np.ndarray[Any, Any]:
    """Its frames."""
    return frames_of(plain)


Optioned = Callable[[str], tuple[Engine, np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def engine_with() -> Optioned:
    """`engine_with(name)`: an engine, made once, and the frames of the request as its first run."""

    @cache
    def make(name: str) -> tuple[Engine, np.ndarray[Any, Any]]:
        with quick_compilation():
            engine = build(OPTIONS[name])
        return engine, frames_of(engine)

    return make


# How the job before may have gone.


class Broken(RuntimeError):
    """What a test raises inside the model."""


def complete(engine: Engine) -> None:
    frames_of(engine, OTHER)


def cancel(engine: Engine) -> None:
    """A cancel after the first step."""
    steps: list[int] = []

    def count(message: Message) -> None:
        if isinstance(message, Step):
            steps.append(message.step)

    assert engine.run(OTHER, count, lambda: bool(steps)) is None
    assert steps == [1]


def fail(engine: Engine, step: int) -> None:
    """An error between two blocks, in `step` (from 0): half of a cache's state is of this step."""
    passes: list[int] = []

    def raise_in_time(*_: Any) -> None:
        passes.append(1)
        if len(passes) == step + 1:
            raise Broken

    hook = transformer_of(engine).transformer_blocks[2].register_forward_hook(raise_in_time)
    with pytest.raises(Broken):
        frames_of(engine, OTHER)
    hook.remove()


EARLY: dict[str, Callable[[Engine], None]] = {
    "cancelled": cancel,
    "failed in the first step": partial(fail, step=0),
    "failed in the second step": partial(fail, step=1),
}
BEFORE = {"completed": complete} | EARLY


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("before", BEFORE)
def test_frames_do_not_depend_on_the_job_before(
    before: str, name: str, engine_with: Optioned
) -> None:
    engine, first = engine_with(name)
    BEFORE[before](engine)
    assert np.array_equal(frames_of(engine), first)


@pytest.mark.parametrize("before", EARLY)
def test_it_is_the_reset_that_makes_it_so(
    before: str, engine_with: Optioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, first = engine_with("cache")

    def frames_or_error() -> Any:
        try:
            return frames_of(engine)
        except TypeError as error:  # there is a first block's result and none of the others
            return error

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reset", lambda: None)
        EARLY[before](engine)
        speed.reset(engine._pipe)
        assert np.array_equal(frames_of(engine), first)
        EARLY[before](engine)
        assert not np.array_equal(frames_or_error(), first)
    speed.reset(engine._pipe)


def test_nothing_of_a_cache_is_kept_between_jobs(engine_with: Optioned) -> None:
    engine, _ = engine_with("cache")
    leader = (
        transformer_of(engine)
        .transformer_blocks[0]
        ._diffusers_hook.get_hook("fbc_leader_block_hook")
    )
    for before in BEFORE.values():
        before(engine)
        assert leader.state_manager._state_cache == {}


def test_a_layer_that_failed_while_its_weights_were_cast_is_whole_again(
    engine_with: Optioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, first = engine_with("fp8")
    layer = transformer_of(engine).transformer_blocks[2].ff.net[2]

    def linear(states: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight is layer.weight:
            raise Broken
        return torch._C._nn.linear(states, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        with pytest.raises(Broken):
            frames_of(engine, OTHER)
    assert layer.weight.dtype is torch.float32
    assert np.array_equal(frames_of(engine), first)
    assert layer.weight.dtype is torch.float8_e4m3fn


# What each option changes.


def test_no_option_is_no_change(plain: Engine) -> None:
    assert (
        SpeedOptions.of(
            Configure(
                slot=0, rank=0, world_size=1, model="", device="cpu", dtype="auto", scratch=""
            )
        )
        == SpeedOptions()
    )
    transformer = transformer_of(plain)
    assert not any(hasattr(module, "_diffusers_hook") and module._diffusers_hook.hooks
                   for module in transformer.modules())  # fmt: skip
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_a_cache_that_never_skips_changes_nothing(expected: np.ndarray[Any, Any]) -> None:
    engine = build(SpeedOptions(cache_threshold=1e-9))
    runs = block_runs(engine)
    assert np.array_equal(frames_of(engine), expected)
    assert len(runs) == STEPS


def test_a_cache_skips_blocks_and_stays_close(expected: np.ndarray[Any, Any]) -> None:
    engine = build(SpeedOptions(cache_threshold=THRESHOLD))
    runs = block_runs(engine)
    error = difference(frames_of(engine), expected)
    assert len(runs) == STEPS - SKIPPED
    another = frames_of(build(SpeedOptions()), replace(REQUEST, seed=1))
    assert 0 < error < difference(another, expected) / 2, error


@pytest.mark.parametrize(
    ("name", "bound"), [("fp8", 3.0), pytest.param("int8", 1.0, marks=needs_torchao)]
)
def test_a_quantized_model_is_half_as_large_and_stays_close(
    name: str, bound: float, plain: Engine, expected: np.ndarray[Any, Any], engine_with: Optioned
) -> None:
    engine, frames = engine_with(name)
    assert 0 < difference(frames, expected) < bound
    assert stored_bytes(transformer_of(engine)) < stored_bytes(transformer_of(plain)) / 2


def test_fp8_leaves_norms_patches_frequencies_and_output_alone(engine_with: Optioned) -> None:
    transformer = transformer_of(engine_with("fp8")[0])
    wide = {name for name, weight in transformer.named_parameters()
            if weight.dtype is torch.float32}  # fmt: skip
    assert {"pos_frequencies", "patch_embed.proj.weight", "proj_out.weight"} <= wide
    assert all(
        ("norm" in name) == (name in wide)
        for name, _ in transformer.named_parameters()
        if name.startswith("transformer_blocks.")
    )


@pytest.mark.parametrize("name", ["fp8", pytest.param("int8", marks=needs_torchao)])
def test_a_quantized_model_computes_in_the_type_that_it_was_loaded_in(
    name: str, expected: np.ndarray[Any, Any]
) -> None:
    engine = build(OPTIONS[name], dtype="bfloat16")
    transformer = transformer_of(engine)
    seen: set[torch.dtype] = set()
    for layer in (transformer.transformer_blocks[2].ff, transformer.proj_out):
        layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    assert difference(frames_of(engine), expected) < 4
    assert seen == {torch.bfloat16}
    assert transformer.pos_frequencies.dtype is torch.float32


def lora_of(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 for some layers of attention and feed-forward."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in transformer.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_out.0", "attn1.add_k_proj", "ff.net.2")):
            sizes = {"lora_A": (4, module.in_features), "lora_B": (module.out_features, 4)}
            for part, size in sizes.items():
                weights[f"{name}.{part}.weight"] = 0.1 * torch.randn(size, generator=generator)
    return weights


@pytest.mark.parametrize(
    "name",
    [
        "fp8",
        pytest.param("int8", marks=needs_torchao),
        pytest.param("compile", marks=pytest.mark.slow),
    ],
)
def test_adapters_come_and_go_after_the_options(name: str, engine_with: Optioned) -> None:
    adapted = build(SpeedOptions())
    transformer_of(adapted).load_lora_adapter(lora_of(transformer_of(adapted)), prefix=None)
    wanted = frames_of(adapted)
    engine, first = engine_with(name)
    transformer = transformer_of(engine)
    with speed.uncast(transformer):
        transformer.load_lora_adapter(lora_of(transformer), prefix=None)
    error = difference(frames_of(engine), wanted)
    transformer.unload_lora()
    assert new_graphs(lambda: np.testing.assert_array_equal(frames_of(engine), first)) == 0
    assert error == 0 if name == "compile" else error < difference(wanted, first) / 2, error
    if name == "fp8":
        assert transformer.transformer_blocks[2].ff.net[2].weight.dtype is torch.float8_e4m3fn


# Compilation.


def new_graphs(work: Callable[[], Any]) -> int:
    """How many graphs torch compiles during `work`."""
    before = counters["stats"]["unique_graphs"]
    work()
    return int(counters["stats"]["unique_graphs"] - before)


def test_compiled_blocks_are_right_and_compiled_once(
    expected: np.ndarray[Any, Any], engine_with: Optioned
) -> None:
    engine, frames = engine_with("compile")
    assert np.array_equal(frames, expected)
    larger = replace(OTHER, height=96, num_frames=13, prompt="a ring and a ball and a square")
    for request in (OTHER, replace(OTHER, prompt=""), larger, REQUEST):
        assert new_graphs(partial(frames_of, engine, request)) == 0, request
    # the first, the middle and the last blocks differ, each before and after its attention
    assert new_graphs(partial(frames_of, engine, UNGUIDED)) == 6  # batches of one sample
    assert new_graphs(partial(frames_of, engine, replace(UNGUIDED, prompt=""))) == 0


def test_another_layout_needs_no_new_graphs(engine_with: Optioned) -> None:
    engine, first = engine_with("compile")

    def laid_out_anew() -> np.ndarray[Any, Any]:
        engine._parallel.remove()  # type: ignore[union-attr]
        engine._parallel = parallelize(transformer_of(engine), None)
        return frames_of(engine)

    assert new_graphs(lambda: np.testing.assert_array_equal(laid_out_anew(), first)) == 0


@pytest.mark.parametrize(
    "name", ["cache, compile", pytest.param("cache, compile, fp8", marks=pytest.mark.slow)]
)
def test_a_cache_and_casts_stay_outside_of_the_compiled_part(
    name: str, engine_with: Optioned
) -> None:
    engine, frames = engine_with(name)
    assert np.array_equal(frames, engine_with(name.replace(", compile", ""))[1])
    assert new_graphs(partial(frames_of, engine, OTHER)) == 0


@pytest.mark.slow
@needs_compiler
def test_really_compiled_blocks_stay_close(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    engine = build(SpeedOptions(compile=True))
    last: list[torch.Tensor] = []
    for each in (plain, engine):
        decode = each._decode

        def note(latents: torch.Tensor, *rest: Any, decode: Any = decode) -> Any:
            last.append(latents.clone())
            return decode(latents, *rest)

        monkeypatch.setattr(each, "_decode", note)
    request = replace(REQUEST, num_inference_steps=3)
    first = frames_of(engine, request)
    for before in BEFORE.values():
        assert new_graphs(partial(before, engine)) == 0
    assert np.array_equal(frames_of(engine, request), first)
    assert difference(first, frames_of(plain, request)) < 0.01
    assert (last[0] - last[-1]).abs().max() < 1e-4


# Offloading. There is no GPU to offload from here: the CPU stands in for it, so these tests show
# what is fetched when, and that the frames stay; not that memory is saved, nor the copies' streams.


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeedOptions, "check", lambda options, ranks: None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_parts_make_the_same_frames(offload: str, expected: np.ndarray[Any, Any]) -> None:
    engine = build(SpeedOptions(offload=offload))
    assert np.array_equal(frames_of(engine), expected)
    fail(engine, step=1)
    assert np.array_equal(frames_of(engine), expected)


@pytest.mark.usefixtures("unchecked")
def test_a_block_that_the_cache_skips_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(SpeedOptions(cache_threshold=THRESHOLD, offload="group"))
    blocks = list(transformer_of(engine).transformer_blocks)
    moved: dict[str, list[int]] = {}

    def watch(name: str) -> None:
        usual = getattr(group_offloading.ModuleGroup, name)
        moves = moved[name] = []

        def move(group: Any) -> None:
            moves.extend(blocks.index(module) for module in group.modules if module in blocks)
            usual(group)

        monkeypatch.setattr(group_offloading.ModuleGroup, name, move)

    watch("onload_")
    watch("offload_")
    runs = block_runs(engine)
    frames_of(engine)
    assert moved["onload_"] == moved["offload_"]
    assert moved["onload_"].count(0) == STEPS
    assert moved["onload_"].count(5) == len(runs) == STEPS - SKIPPED


@pytest.mark.usefixtures("unchecked")
def test_parts_not_in_use_are_taken_off_after_any_end() -> None:
    engine = build(SpeedOptions(offload="model"))
    order = [hook.model for hook in engine._pipe._all_hooks]
    pipe = engine._pipe
    assert order == [pipe.text_encoder, pipe.transformer, pipe.vae]
    for before in (complete, cancel):
        hooks = pipe._all_hooks
        before(engine)
        assert pipe._all_hooks is not hooks  # taken off, and put on anew
        assert pipe.transformer._hf_hook.execution_device == torch.device("cpu:0")


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_threshold": -0.1}, "cache threshold -0.1: expected 0"),
        ({"cache_threshold": float("nan")}, "cache threshold nan: expected 0"),
        ({"cache_threshold": 1.0}, "cache threshold 1.0: expected 0"),
        ({"quantization": "int4"}, "quantization 'int4': expected none, fp8 or int8"),
        ({"offload": "disk"}, "offload 'disk': expected none, model or group"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        SpeedOptions(**changes)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_is_for_one_gpu(offload: str) -> None:
    options = SpeedOptions(offload=offload)
    with pytest.raises(LoadError, match=f"offload {offload}: expected device cuda, not cpu"):
        options.check(Ranks())
    with pytest.raises(LoadError, match=f"offload {offload}: expected a slot of one GPU, not of 2"):
        options.check(Ranks(0, 2, torch.device("cuda")))
    options.check(Ranks(device=torch.device("cuda")))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoadError, match="quantization int8: expected the package torchao"):
        SpeedOptions(quantization="int8").check(Ranks())
    with pytest.raises(LoadError, match=r"expected a C\+\+ compiler, and found no g\+\+"):
        SpeedOptions(compile=True).check(Ranks())
    with pytest.raises(LoadError, match="expected the package triton"):
        SpeedOptions(compile=True).check(Ranks(device=torch.device("cuda")))
    SpeedOptions(THRESHOLD, quantization="fp8").check(Ranks())


def test_a_wrong_option_is_refused_before_the_pipeline_is_touched() -> None:
    with pytest.raises(LoadError):
        speed.apply(None, SpeedOptions(offload="model"), Ranks())


# Several ranks.


def cached_jobs(ranks: Ranks) -> dict[str, Any]:
    """With the cache: the request first, then after each way that the job before may have gone."""
    engine = build(SpeedOptions(cache_threshold=THRESHOLD), ranks)
    runs = block_runs(engine)
    results: dict[str, Any] = {"first": frames_of(engine), "runs": len(runs)}
    ways: dict[str, Callable[[Engine], Any]] = {
        "cancelled": partial(cancel_on_the_second, rank=ranks.rank),
        "failed": partial(fail, step=1),
        "unguided": partial(frames_of, request=UNGUIDED),  # over another mesh
    }
    for name, before in ways.items():
        before(engine)
        results[name] = frames_of(engine)
    return results


def cancel_on_the_second(engine: Engine, rank: int) -> None:
    """A cancel that one rank alone hears of, after the first step: before it, it looks twice."""
    looks: list[int] = []

    def cancelled() -> bool:
        looks.append(1)
        return rank == 1 and len(looks) == 3

    assert engine.run(OTHER, lambda message: None, cancelled) is None
    assert len(looks) == 3


class Fixed(Ranks):
    """Ranks with an axis for the CFG pair whatever is asked."""

    def shape_for(self, guided: bool, heads: int) -> tuple[int, int]:
        return (self.size, 1)


def compiled_jobs(ranks: Ranks) -> list[tuple[str, np.ndarray[Any, Any], int]]:
    """Jobs with and without guidance, over layouts that follow it, and one that does not."""
    with quick_compilation():
        engine = build(SpeedOptions(compile=True), ranks)
    results: list[tuple[str, np.ndarray[Any, Any], int]] = []

    def run(name: str, request: Run) -> None:
        frames: list[np.ndarray[Any, Any]] = []
        graphs = new_graphs(lambda: frames.append(frames_of(engine, request)))
        results.append((name, frames[0], graphs))

    for _ in range(3):
        run("guided", SHORT)
        run("unguided", SHORT_UNGUIDED)
    engine._ranks = Fixed(ranks.rank, ranks.size, ranks.device)
    run("unguided", SHORT_UNGUIDED)
    run("guided", SHORT)
    return results


@pytest.mark.slow
def test_layouts_of_two_ranks_have_graphs_of_their_own(tmp_path: Path, plain: Engine) -> None:
    expected = {"guided": frames_of(plain, SHORT), "unguided": frames_of(plain, SHORT_UNGUIDED)}
    one, other = run_ranks(2, compiled_jobs, tmp_path / "ranks")
    for name, frames, _ in one:
        assert np.array_equal(frames, expected[name]), name
    for results in (one, other):
        assert [graphs for *_, graphs in results] == [6, 6, 0, 0, 0, 0, 3, 0]


def test_two_ranks_skip_alike_and_leave_nothing(tmp_path: Path, engine_with: Optioned) -> None:
    one, other = run_ranks(2, cached_jobs, tmp_path / "ranks")
    assert one.pop("runs") == other.pop("runs") == STEPS - SKIPPED
    first = one["first"]
    assert difference(first, engine_with("cache")[1]) < 0.01
    for before, frames in one.items():
        assert np.array_equal(frames, first), before

"""LoRAs: which files count, what is refused, and that switching one off leaves no trace."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_app.engine.group import Ranks
from mochi_app.engine.lora import LoraCache
from mochi_app.engine.parallel import parallelize
from mochi_app.engine.pipeline import Engine
from mochi_app.loras import LoraError, lora_file, lora_names
from mochi_app.messages import Run
from tests.lora_files import WIDE, open_tiny, write_lora
from tests.ranks import run_ranks

LAYER = "transformer.transformer_blocks.0.attn1.to_q"

PROMPT = "a red ball rolls right"


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Save `source` with other tensors; with its own metadata if None is given."""
    with safe_open(source, framework="pt") as file:
        own = file.metadata()
    save_file(dict(change(load_file(source))), target, own if metadata is None else metadata)


def latents(pipe: MochiPipeline, guidance: float = 3.0, side: int = 64) -> torch.Tensor:
    """Last latents of a short run: `side` x 80 pixels, 7 frames, 2 steps."""
    result: torch.Tensor = pipe(
        prompt=PROMPT, negative_prompt="", height=side, width=80, num_frames=7,
        num_inference_steps=2, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).frames  # fmt: skip
    return result


def expected(path: Path, scale: float) -> torch.Tensor:
    """What the library makes of a LoRA on a pipeline that nobody used before."""
    pipe = open_tiny()
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="only")
    pipe.set_adapters("only", scale)
    return latents(pipe)


def wrapped(pipe: MochiPipeline) -> set[str]:
    """Names of the layers that hold an adapter."""
    return {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def adapters(pipe: MochiPipeline) -> set[str]:
    """Every adapter that any layer, or the configuration, still has."""
    found = set(getattr(pipe.transformer, "peft_config", {}))
    for module in pipe.transformer.modules():
        if isinstance(module, BaseTunerLayer):
            found.update(module._all_available_adapter_names())
    return found


def weights(pipe: MochiPipeline) -> dict[str, torch.Tensor]:
    """A copy of the transformer's own weights, by their names in the stock model."""
    return {
        name.replace(".base_layer.", "."): weight.clone()
        for name, weight in pipe.transformer.state_dict().items()
        if ".lora_" not in name
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`narrow` without metadata, `wide` with a scale of 2 in its metadata, `third`."""
    path = tmp_path_factory.mktemp("loras")
    write_lora(path, "narrow", 0)
    write_lora(path, "wide", 1, WIDE, alpha=4)
    write_lora(path, "third", 2)
    return path


@pytest.fixture(scope="module")
def pipe() -> Iterator[MochiPipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_tiny()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock(pipe: MochiPipeline) -> torch.Tensor:
    """What the pipeline makes before it ever saw a LoRA."""
    assert not wrapped(pipe)
    return latents(pipe)


@pytest.fixture
def loras(pipe: MochiPipeline, stock: torch.Tensor, folder: Path) -> Iterator[LoraCache]:
    """A loras of two; afterwards the pipeline is the stock one again."""
    loras = LoraCache(pipe, folder, keep=2)
    yield loras
    loras.clear()
    assert not wrapped(pipe)
    assert not adapters(pipe)


def used(pipe: MochiPipeline, loras: LoraCache, name: str | None, scale: float = 1.0) -> Any:
    """Latents with a LoRA from the loras."""
    with loras.use(name, scale):
        return latents(pipe)


@pytest.mark.parametrize(("name", "scale"), [("narrow", 1.0), ("wide", 0.7)])
def test_a_lora_does_what_the_library_does_bit_for_bit(
    pipe: MochiPipeline,
    loras: LoraCache,
    stock: torch.Tensor,
    folder: Path,
    name: str,
    scale: float,
) -> None:
    result = used(pipe, loras, name, scale)
    assert torch.equal(result, expected(folder / f"{name}.safetensors", scale))
    assert (result - stock).abs().max() > 0.01
    assert torch.equal(used(pipe, loras, name, 0.0), stock)  # adds exactly zero
    assert not torch.equal(used(pipe, loras, name, 0.5 * scale), result)


def test_frames_change(pipe: MochiPipeline, loras: LoraCache) -> None:
    def frames(name: str | None) -> Any:
        with loras.use(name):
            return pipe(
                prompt=PROMPT, height=64, width=64, num_frames=7, num_inference_steps=2,
                guidance_scale=1.0, output_type="np",
                generator=torch.Generator("cpu").manual_seed(1),
            ).frames  # fmt: skip

    assert abs(frames("narrow") - frames(None)).max() > 1 / 255


def test_none_is_exact_after_any_lora_and_any_end_of_a_run(
    pipe: MochiPipeline, loras: LoraCache, stock: torch.Tensor
) -> None:
    before = weights(pipe)
    narrow = used(pipe, loras, "narrow")
    assert wrapped(pipe)
    assert torch.equal(used(pipe, loras, None), stock)
    wide = used(pipe, loras, "wide")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)
    with pytest.raises(RuntimeError, match="in mid-run"), loras.use("wide", 1.0):
        raise RuntimeError("in mid-run")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "wide"), wide)
    loras.clear()
    assert not wrapped(pipe)
    assert torch.equal(latents(pipe), stock)
    after = weights(pipe)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after.keys() == before.keys()


def test_the_least_recently_used_lora_makes_room_and_can_come_back(
    pipe: MochiPipeline, loras: LoraCache, stock: torch.Tensor
) -> None:
    narrow = used(pipe, loras, "narrow")
    with warnings.catch_warnings(action="error"):  # peft warns if the active adapter is deleted
        first = loras.load("narrow"), loras.load("wide")
        assert adapters(pipe) == set(first)
        assert loras.load("narrow") == first[0]
        third = loras.load("third")
        assert adapters(pipe) == {first[0], third}
        again = loras.load("wide")
    assert again == first[1]  # names are used again, so compiled blocks stay valid
    assert adapters(pipe) == {third, again}
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)


def test_a_replaced_file_is_loaded_anew(pipe: MochiPipeline, folder: Path, tmp_path: Path) -> None:
    loras = LoraCache(pipe, tmp_path)
    path = tmp_path / "style.safetensors"
    for name in ("narrow", "third"):
        path.write_bytes((folder / f"{name}.safetensors").read_bytes())  # in place, same size
        os.utime(path, ns=(0, len(name)))
        result = used(pipe, loras, "style")
        assert torch.equal(result, expected(folder / f"{name}.safetensors", 1.0))
        assert len(adapters(pipe)) == 1
    path.write_bytes(b"broken")
    with pytest.raises(LoraError), loras.use("style", 1.0):
        pytest.fail("a broken file was used")
    assert len(adapters(pipe)) == 1
    loras.clear()


def test_an_overwritten_file_does_not_reach_a_loaded_lora(
    pipe: MochiPipeline, folder: Path, tmp_path: Path
) -> None:
    loras = LoraCache(pipe, tmp_path)
    path = tmp_path / "style.safetensors"
    path.write_bytes((folder / "narrow.safetensors").read_bytes())
    with loras.use("style"):
        result = latents(pipe)
        with path.open("r+b") as file:
            file.seek(-100_000 if path.stat().st_size > 100_000 else -1000, os.SEEK_END)
            file.write(b"\x7f" * 1000)
        assert torch.equal(latents(pipe), result)
    loras.clear()


@pytest.mark.parametrize("form", ["alpha", "older keys", "rslora", "dropout"])
def test_other_forms_of_the_same_lora(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, form: str
) -> None:
    """Each is `narrow` times a factor that its alpha gives."""
    path, factor = tmp_path / "form.safetensors", 1.0
    if form == "alpha":
        factor = 3.0 / 2
        rewrite(folder / "narrow.safetensors", path, lambda tensors: tensors | {
            key.replace("lora_A.weight", "alpha"): torch.tensor(3.0)
            for key in tensors if "lora_A" in key
        })  # fmt: skip
    elif form == "older keys":
        rewrite(folder / "narrow.safetensors", path, lambda tensors: {
            key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
            for key, tensor in tensors.items()
        })  # fmt: skip
    elif form == "rslora":
        factor = 2.0**0.5
        write_lora(tmp_path, "form", 0, use_rslora=True)
    else:
        write_lora(tmp_path, "form", 0, lora_dropout=0.5)
    loras = LoraCache(pipe, tmp_path)
    result = used(pipe, loras, "form")
    loras.clear()
    assert torch.allclose(result, used(pipe, LoraCache(pipe, folder), "narrow", factor), atol=1e-4)
    LoraCache(pipe, folder).clear()


Tensors = dict[str, torch.Tensor]


def with_key(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: torch.ones(shape)}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        key: tensor for key, tensor in tensors.items() if key != f"{LAYER}.{part}"
    }


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "wrong input": (with_key(f"{LAYER}.lora_A.weight", 2, 7), r"shape \(2, 7\), expected \(2, "),
    "wrong output": (with_key(f"{LAYER}.lora_B.weight", 7, 2), r"lora_B.weight \(shape \(7, 2\)"),
    "wrong rank": (with_key(f"{LAYER}.lora_A.weight", 3, 192), "expected"),
    "no rank": (with_key(f"{LAYER}.lora_A.weight", 0, 192), "expected"),
    "a number": (with_key(f"{LAYER}.lora_A.weight"), "expected"),
    "no B": (without("lora_B.weight"), r"to_q.lora_A.weight \(without its lora_B\)"),
    "no A": (without("lora_A.weight"), r"to_q.lora_B.weight \(without its lora_A\)"),
    "other model": (renamed("transformer_blocks", "blocks"), "no such linear layer.*more$"),
    "other format": (renamed("transformer.transformer_blocks.", "lora_unet_"), "not a LoRA of"),
    "no prefix": (renamed("transformer.transformer_blocks", "transformer_blocks"), "not a LoRA of"),
    "text encoder": (with_key("text_encoder.q.lora_A.weight", 2, 2), "text_encoder.q.lora_A"),
    "no linear": (with_key("transformer.patch_embed.proj.lora_A.weight", 2, 2), "no such linear"),
    "inside": (with_key(f"{LAYER}.base_layer.lora_A.weight", 2, 192), "no such linear"),
    "dora": (with_key(f"{LAYER}.dora_scale", 1), "dora_scale"),
    "twice": (with_key(f"{LAYER}.lora.up.weight", 1), "given twice"),
    "long key": (with_key("x\n" * 500, 1), "x x x.*…"),
    "empty": (lambda tensors: {}, "it has no weights"),
    "not finite": (
        lambda tensors: tensors | {f"{LAYER}.lora_B.weight": torch.full((192, 2), torch.nan)},
        r"not finite: .*to_q.lora_B.weight",
    ),
}


def raw(folder: Path, kind: str) -> bytes:
    """The bytes of a broken file."""
    whole = (folder / "narrow.safetensors").read_bytes()
    return {"no bytes": b"", "truncated": whole[:-10], "half": whole[:300], "pickle": b"\x80\x02."}[
        kind
    ]


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "another kind": ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    "rank": ({"r": 4}, r"to_out.0 \(rank 2, metadata says 4\)"),
    "rank pattern": ({"rank_pattern": {"to_q": 8}}, "metadata says 8"),
    "bad pattern": ({"rank_pattern": {"(": 8}}, "metadata says"),
    "bad alpha": ({"lora_alpha": "x"}, "unsupported operand"),
}


def refused(pipe: MochiPipeline, loras: LoraCache, match: str) -> str:
    """The refusal of the LoRA `bad`; what was loaded before is as it was, and nothing else is."""
    layers, held = wrapped(pipe), adapters(pipe)
    with pytest.raises(LoraError, match=match) as caught, loras.use("bad", 1.0):
        pytest.fail("it was used")
    assert wrapped(pipe) == layers
    assert adapters(pipe) == held
    message = str(caught.value)
    assert message.startswith("LoRA 'bad'")
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    change, match = REFUSED[kind]
    rewrite(folder / "narrow.safetensors", tmp_path / "bad.safetensors", change)
    refused(pipe, LoraCache(pipe, tmp_path), match)
    assert not wrapped(pipe)


def test_a_refusal_leaves_what_was_loaded(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, stock: torch.Tensor
) -> None:
    for name in ("narrow", "bad"):  # `bad` names the layers that `narrow` wraps
        rewrite(
            folder / "narrow.safetensors", tmp_path / f"{name}.safetensors",
            renamed(".lora_", ".base_layer.lora_") if name == "bad" else dict,
        )  # fmt: skip
    loras = LoraCache(pipe, tmp_path)
    narrow = used(pipe, loras, "narrow")
    refused(pipe, loras, "no such linear layer")
    assert torch.equal(latents(pipe), stock)
    assert torch.equal(used(pipe, loras, "narrow"), narrow)
    loras.clear()


@pytest.mark.parametrize("kind", ["no bytes", "truncated", "half", "pickle"])
def test_a_broken_file_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(raw(folder, kind))
    refused(pipe, LoraCache(pipe, tmp_path), "not a whole safetensors file")


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_would_change_the_model_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, kind: str
) -> None:
    change, match = METADATA[kind]
    record = {
        f"transformer.{key}": value for key, value in ({"r": 2, "lora_alpha": 2} | change).items()
    }
    rewrite(
        folder / "narrow.safetensors", tmp_path / "bad.safetensors", lambda tensors: tensors,
        {"lora_adapter_metadata": json.dumps(record)},
    )  # fmt: skip
    before = weights(pipe)
    refused(pipe, LoraCache(pipe, tmp_path), match)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())


@pytest.mark.parametrize("text", ["{", "[]", '"r"'])
def test_unreadable_metadata_is_refused(
    pipe: MochiPipeline, folder: Path, tmp_path: Path, text: str
) -> None:
    rewrite(
        folder / "narrow.safetensors", tmp_path / "bad.safetensors", lambda tensors: tensors,
        {"lora_adapter_metadata": text},
    )  # fmt: skip
    refused(pipe, LoraCache(pipe, tmp_path), "metadata is not")


@pytest.mark.parametrize("held", [[], ["narrow"]], ids=["empty cache", "one held"])
def test_a_loader_that_fails_half_way_leaves_nothing(
    pipe: MochiPipeline, folder: Path, stock: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
    held: list[str],
) -> None:  # fmt: skip
    loras = LoraCache(pipe, folder)
    results = [used(pipe, loras, name) for name in held]
    before = adapters(pipe)

    def fail(*given: Any, **more: Any) -> None:
        assert adapters(pipe) > before  # it is in by now, without its weights
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("peft.set_peft_model_state_dict", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            loras.load("wide")
    assert adapters(pipe) == before
    assert bool(wrapped(pipe)) == bool(held)
    assert torch.equal(latents(pipe), stock)
    for name, result in zip(held, results, strict=True):
        assert torch.equal(used(pipe, loras, name), result)
    loras.clear()


def test_weights_take_the_type_of_the_transformer(folder: Path) -> None:
    pipe = open_tiny()
    frequencies = pipe.transformer.pos_frequencies.data
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.pos_frequencies.data = frequencies  # in float32, as when the engine loads it
    LoraCache(pipe, folder).load("wide")
    types = {
        weight.dtype
        for name, weight in pipe.transformer.named_parameters()
        if ".lora_" in name
    }  # fmt: skip
    assert types == {torch.bfloat16}


def test_a_cache_without_a_folder_runs_without_loras(pipe: MochiPipeline) -> None:
    with LoraCache(pipe, None).use(None, 1.0):
        assert not wrapped(pipe)
    with pytest.raises(LoraError, match=r"'x': expected one of: \(there are none\)"):
        LoraCache(pipe, None).load("x")
    with pytest.raises(ValueError, match="keep 0"):
        LoraCache(pipe, None, keep=0)


def test_names_are_those_of_safe_files_in_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "loras"
    root.mkdir()
    kept = ["Film look_v1.2", "a", "b-2", "linked"]
    for name in (*kept[:3], "ümlaut", ".hidden", "-x", "a;b", "new\nline", ""):
        (root / f"{name}.safetensors").touch()
    (root / "other.bin").touch()
    (root / "UPPER.SAFETENSORS").touch()
    (root / "folder.safetensors").mkdir()
    (root / "sub").mkdir()
    (root / "sub" / "inner.safetensors").touch()
    (tmp_path / "outside.safetensors").touch()
    (root / "linked.safetensors").symlink_to(root / "a.safetensors")
    (root / "out.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (root / "nowhere.safetensors").symlink_to(root / "missing.safetensors")
    (tmp_path / "link").symlink_to(root)
    assert lora_names(root) == lora_names(tmp_path / "link") == kept
    assert lora_names(None) == lora_names(tmp_path / "missing") == []
    assert lora_file(root, "a") == root / "a.safetensors"
    for name in ("../outside", "sub/inner", "out", "", str(tmp_path / "outside")):
        with pytest.raises(LoraError, match=r"expected one of: Film look_v1\.2, a, b-2, linked$"):
            lora_file(root, name)


SIDE = 112  # pixels: 2 x 7 x 5 = 70 visual tokens, which four ranks cannot divide

# (LoRA, scale, guidance): the mesh changes with the guidance, while LoRAs are loaded
RUNS: tuple[tuple[str | None, float, float], ...] = (
    (None, 1.0, 1.0), ("wide", 1.0, 1.0), ("wide", 0.5, 3.0), ("narrow", 1.0, 3.0),
    (None, 1.0, 3.0), ("third", 1.0, 3.0), ("wide", 1.0, 1.0), (None, 1.0, 1.0),
)  # fmt: skip


def all_runs(folder: Path, ranks: Ranks) -> list[torch.Tensor]:
    """Latents of every run, on a mesh that fits its guidance, then of one on the bare layers."""
    torch.set_num_threads(1)
    pipe = open_tiny()
    loras = LoraCache(pipe, folder, keep=2)
    mesh: dict[float, Any] = {g: ranks.mesh(ranks.shape_for(g > 1, 12)) for g in (3.0, 1.0)}
    handle, guided = parallelize(pipe.transformer, mesh[1.0]), 1.0
    results = []
    for name, scale, guidance in RUNS:
        with loras.use(name, scale):
            if guidance != guided:
                handle.remove()
                handle, guided = parallelize(pipe.transformer, mesh[guidance]), guidance
            results.append(latents(pipe, guidance, SIDE))
    loras.clear()
    results.append(latents(pipe, guided, SIDE))
    handle.remove()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules()
    )
    return results


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[torch.Tensor]:
    return all_runs(folder, Ranks())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_lora_over_ranks_is_that_of_one_process(
    folder: Path, alone: list[torch.Tensor], tmp_path: Path, size: int
) -> None:
    """Over (cfg, sp) = (2, size / 2) with guidance, (1, size) without."""
    together = run_ranks(size, functools.partial(all_runs, folder), tmp_path / "ranks")
    for results in together:
        for index, (result, single) in enumerate(zip(results, alone, strict=True)):
            error = (result - single).abs().max().item()
            assert error == 0, (index, error)


def run(lora: str | None, scale: float = 1.0, job_id: str = "j") -> Run:
    return Run(
        job_id=job_id, prompt=PROMPT, negative_prompt="", seed=3, num_inference_steps=2,
        guidance_scale=3.0, height=64, width=80, num_frames=7, fps=12, lora=lora, lora_scale=scale,
    )  # fmt: skip


def test_an_engine_takes_a_lora_for_one_run_only(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    name = lora_names(folder)[0]
    engine = Engine(open_tiny(), loras=tmp_path)

    def frames(request: Run) -> str:
        result = engine.run(request, lambda message: None, lambda: False)
        assert result is not None
        return result.frames_hash

    plain = frames(run(None))
    styled = frames(run(name))
    assert styled != plain
    assert frames(run(name, scale=0.5)) not in (plain, styled)
    assert frames(run(None)) == plain
    with pytest.raises(LoraError, match="broken") as refusal:
        frames(run("broken"))
    assert refusal.value.settled
    assert frames(run(name)) == styled
    assert frames(run(None)) == plain

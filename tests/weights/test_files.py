"""Which files a model needs, and whether they are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mochi_app.weights.events import (
    WeightsError,
)
from mochi_app.weights.files import (
    PartTypes,
    check_folder,
    needed_files,
    safetensors_problem,
    weight_files,
)
from tests.downloads import (
    BFLOAT16,
    FLOAT32,
    MB,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    run,
    tiny_files,
)
from tests.hub import Hub

# What genmo/mochi-1-preview held in 2025, as far as public listings of it say.
SHARED = [
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    *(f"text_encoder/model-0000{n}-of-00004.safetensors" for n in range(1, 5)),
    "text_encoder/model.safetensors.index.json", "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json", "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json", "transformer/config.json", "vae/config.json",
]  # fmt: skip

BF16 = [
    *(f"transformer/diffusion_pytorch_model.bf16-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
    "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
    "vae/diffusion_pytorch_model.bf16.safetensors",
]

PLAIN = [
    *(f"transformer/diffusion_pytorch_model-0000{n}-of-00005.safetensors" for n in range(1, 6)),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    VAE,
]

UNUSED = [
    ".gitattributes", "README.md", "assets/grid.gif", "decoder.safetensors", "dit.safetensors",
    "encoder.safetensors", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
    "transformer/model.pt",
]  # fmt: skip

REAL = [*SHARED, *BF16, *PLAIN, *UNUSED]


# Which files
@pytest.mark.parametrize(("types", "weights"), [(BFLOAT16, BF16), (FLOAT32, PLAIN)])
def test_of_the_real_repository_only_one_variant_is_needed(
    types: PartTypes, weights: list[str]
) -> None:
    assert needed_files(REAL, types) == sorted([*SHARED, *weights])


def test_each_component_is_needed_in_its_own_type() -> None:
    text = "text_encoder/model.bf16.safetensors"
    mixed = needed_files([*REAL, text], PartTypes("bfloat16", "float32", "float32"))
    transformer = [path for path in BF16 if path.startswith("transformer")]
    assert mixed == sorted([*SHARED, *transformer, VAE])
    assert text in needed_files([*REAL, text], BFLOAT16)


def test_without_a_variant_the_plain_files_do() -> None:
    assert needed_files([*SHARED, *PLAIN], BFLOAT16) == sorted([*SHARED, *PLAIN])


def test_our_own_extras_come_along() -> None:
    needed = needed_files(tiny_files(), BFLOAT16)
    assert {"latent_rgb.json", "mochi_defaults.json"} <= set(needed)
    assert not {"README.md", "sheet.png"} & set(needed)


@pytest.mark.parametrize("lost", ["model_index.json", "vae/config.json", VAE, PLAIN[5]])
def test_a_repository_that_lacks_a_file_is_refused_by_name(lost: str) -> None:
    paths = [path for path in [*SHARED, *PLAIN] if path != lost]
    with pytest.raises(WeightsError, match=lost) as caught:
        needed_files(paths, FLOAT32)
    assert not caught.value.retry


@pytest.mark.parametrize(
    ("part", "stem", "chosen"),
    [
        ("transformer", "diffusion_pytorch_model", [1, 2]),
        ("text_encoder", "model", [0]),
    ],
)
def test_of_one_file_and_shards_the_library_takes_its_own(
    part: str, stem: str, chosen: list[int]
) -> None:
    names = [
        f"{stem}.safetensors", f"{stem}-00001-of-00001.safetensors",
        f"{stem}.safetensors.index.json",
    ]  # fmt: skip
    assert weight_files(part, names, "float32") == [names[number] for number in chosen]
    assert weight_files(part, names[:2], "float32") == names[:1]


def test_a_folder_that_is_whole_is_done_at_once(copy: Path, hub: Hub) -> None:
    assert run(str(copy)).folder == copy
    assert not hub.asked


@pytest.mark.parametrize(
    "lost",
    ["model_index.json", "tokenizer/tokenizer.json", "vae/config.json", VAE, TEXT_ENCODER],
)
def test_a_folder_that_lacks_a_file_is_refused_by_name(copy: Path, lost: str) -> None:
    (copy / lost).unlink()
    with pytest.raises(WeightsError, match=lost.replace("tokenizer/", "")) as caught:
        check_folder(copy, FLOAT32, "Copy it")
    assert str(caught.value).endswith("Copy it")


def test_a_truncated_file_is_refused_with_its_sizes(copy: Path) -> None:
    os.truncate(copy / TRANSFORMER, 9 * MB)
    failure = run(str(copy)).failure
    assert f"{TRANSFORMER}: it has 9000000 bytes, its header says 11125496" in failure.error
    assert not failure.retry


@pytest.mark.parametrize(
    "content",
    [b"", bytes(8), b"\x02" + bytes(7) + b"[]", b"\xff" * 16, b"\x02" + bytes(7) + b"{x"],
)
def test_what_is_no_safetensors_file_is_seen(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert safetensors_problem(path) == "its header is damaged"


def test_a_lost_shard_is_seen_by_the_index(variants: dict[str, bytes], copy: Path) -> None:
    for path, content in variants.items():
        (copy / path).write_bytes(content)
    check_folder(copy, BFLOAT16, "")
    shard = sorted((copy / "transformer").glob("*.bf16-*"))[-1]
    shard.unlink()
    check_folder(copy, FLOAT32, "")
    with pytest.raises(WeightsError, match=f"{shard.name}: it is missing"):
        check_folder(copy, BFLOAT16, "")


def test_a_component_in_another_type_only_is_taken(copy: Path) -> None:
    small = copy / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    (copy / VAE).rename(small)
    check_folder(copy, BFLOAT16, "")
    check_folder(copy, FLOAT32, "")
    small.unlink()
    with pytest.raises(WeightsError, match=f"for float32: {VAE}: it is missing"):
        check_folder(copy, FLOAT32, "")

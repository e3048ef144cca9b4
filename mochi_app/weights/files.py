"""Which of a model's files are needed, and whether a folder has them complete.

Plain rules over names, headers and sizes: nothing is downloaded, and no weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mochi_app.weights.events import WeightsError

WEIGHT_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
DTYPES = ("float32", "bfloat16")
EXTRA_FILES = ("latent_rgb.json", "mochi_defaults.json")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True, slots=True)
class PartTypes:
    """The type of each component's weights and arithmetic: `float32` or `bfloat16`."""

    transformer: str
    text_encoder: str
    vae: str

    @classmethod
    def choose(cls, device: str, dtype: str, text_dtype: str, vae_dtype: str) -> PartTypes:
        """From the settings, where `auto` means: bfloat16 on a GPU and float32 on a CPU; for text
        float32, as the model's authors run it; for the decoder the transformer's."""
        usual = "float32" if device == "cpu" else "bfloat16"
        transformer = usual if dtype == "auto" else dtype
        return cls(
            transformer=transformer,
            text_encoder="float32" if text_dtype == "auto" else text_dtype,
            vae=transformer if vae_dtype == "auto" else vae_dtype,
        )

    def __str__(self) -> str:
        if self.transformer == self.text_encoder == self.vae:
            return self.transformer
        return f"{self.transformer}, text encoder {self.text_encoder}, decoder {self.vae}"


def weight_files(part: str, names: Collection[str], dtype: str) -> list[str]:
    """The weight files of one component among the names in its folder; empty when there are none.

    Those of the dtype, else those of the other, which loading converts. The bf16 variant is for
    `bfloat16`, the plain files for `float32`: one file, or shards and their index (which may be
    missing from `names`). If a folder has both, the choice is that of the library that loads it:
    diffusers takes the index, transformers the file.
    """
    stem = WEIGHT_STEMS[part]
    for variant in (".bf16", "") if dtype == "bfloat16" else ("", ".bf16"):
        whole = f"{stem}{variant}.safetensors"
        index = f"{stem}.safetensors.index{variant}.json"
        pattern = re.compile(re.escape(stem + variant) + r"-\d{5}-of-\d{5}\.safetensors")
        shards = sorted(name for name in names if pattern.fullmatch(name))
        if whole in names and (part == "text_encoder" or index not in names):
            return [whole]
        if shards:
            return [*shards, index]
    return []


def needed_files(paths: Iterable[str], types: PartTypes) -> list[str]:
    """The files of a repository that a pipeline of these dtypes loads, sorted.

    Never both variants of a component, and no checkpoint that is not part of a diffusers pipeline.

    Raises:
        WeightsError: a file that every pipeline has is not among `paths`.
    """
    present = set(paths)
    wanted = {"model_index.json", "scheduler/scheduler_config.json"}
    for part in WEIGHT_STEMS:
        names = {path.removeprefix(f"{part}/") for path in present if path.startswith(f"{part}/")}
        weights = weight_files(part, names, getattr(types, part))
        wanted.add(f"{part}/config.json")
        wanted.update(f"{part}/{name}" for name in weights or [f"{WEIGHT_STEMS[part]}.safetensors"])
    if missing := sorted(wanted - present):
        raise WeightsError(
            f"no Mochi pipeline of diffusers for {types}: it has no {', '.join(missing)}; "
            "expected a model such as genmo/mochi-1-preview",
            retry=False,
        )
    tokenizer = re.compile(r"tokenizer/[^/]+\.(json|model|txt)")
    wanted.update(path for path in present if path in EXTRA_FILES or tokenizer.fullmatch(path))
    return sorted(wanted)


# A folder's health, without reading its weights


def safetensors_problem(path: Path) -> str:
    """What is wrong with a safetensors file, judged by its header and size; empty if nothing is.

    Format: 8 bytes with the header's length, little endian; a JSON header; the tensors' bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            return "its header is damaged"
        try:
            header = json.loads(file.read(length))
            ends = [item["data_offsets"][1] for key, item in header.items() if key[:2] != "__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is damaged"
    return "" if size == expected else f"it has {size} bytes, its header says {expected}"


def file_problem(path: Path) -> str:
    """What is wrong with a JSON or safetensors file; empty when nothing seems to be."""
    if not path.is_file():
        return "it is missing"
    try:
        if path.suffix == ".safetensors":
            return safetensors_problem(path)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError:
        return "it is no JSON"
    return ""


def shards_of(index: Path) -> list[str]:
    """The shards that an index names; empty if the index is damaged."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def folder_problems(folder: Path, types: PartTypes) -> Iterator[str]:
    """Everything that keeps a pipeline of these dtypes from loading, one sentence each."""
    wanted = ["model_index.json", "scheduler/scheduler_config.json"]
    wanted.append("tokenizer/tokenizer_config.json")
    for part, stem in WEIGHT_STEMS.items():
        wanted.append(f"{part}/config.json")
        inside = folder / part
        names = {path.name for path in inside.iterdir()} if inside.is_dir() else set()
        chosen = weight_files(part, names, getattr(types, part)) or [f"{stem}.safetensors"]
        if chosen[-1].endswith(".json"):
            chosen = sorted({*chosen, *shards_of(inside / chosen[-1])})
        wanted += [f"{part}/{name}" for name in chosen]
    for name in wanted:
        if problem := file_problem(folder / name):
            yield f"{name}: {problem}"
    if not any(
        (folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")
    ):
        yield "tokenizer: neither tokenizer.json nor spiece.model"


def check_folder(folder: Path, types: PartTypes, advice: str) -> None:
    """Make sure that a complete pipeline is there, as far as can be seen without reading it all.

    Raises:
        WeightsError: names files that are missing or damaged, and what to do: `advice`.
    """
    problems = list(folder_problems(folder, types))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise WeightsError(
            f"{folder} is no complete Mochi pipeline for {types}: {'; '.join(problems[:3])}{more}. "
            f"{advice}",
            retry=False,
        )

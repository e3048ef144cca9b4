"""LoRAs for the transformer: loaded once, enabled for one run, never fused.

Owns the adapters in the transformer, and the checks that a LoRA file must pass. A loaded adapter
wraps linear layers; while it is disabled the wrapped layers compute exactly what the stock ones do.
The library only warns of keys that it cannot place, and accepts a configuration from the file that
may rewrite the model's own weights, so both are checked here first.

A wrapped layer's hooks move to the wrapper and back: `parallel.py` hooks the position of a layer in
the transformer, whatever module is there. It does not own which files exist (`loras.py`).
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import MochiPipeline, MochiTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from mochi_app.engine.speed import uncast
from mochi_app.loras import LoraError, lora_file

PREFIX = "transformer."  # of every key in a file that diffusers wrote for this pipeline
KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")
SHOWN_KEYS, SHOWN_CHARACTERS = 3, 100

# Fields of an adapter's configuration: those that change the result, and those only for training
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
UNREAD = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "peft_version", "revision",
    "runtime_config", "target_modules", "task_type",
})  # fmt: skip
# Initialisations of A and B that leave the model's own weights alone; PiSSA and OLoRA do not
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

Shape = tuple[int, ...]


class LoraCache:
    """The LoRAs of a folder for one pipeline. At most `keep` stay loaded, the most recently used.

    Each rank has its own cache for its own copy of the transformer; nothing here communicates.
    """

    def __init__(self, pipe: MochiPipeline, folder: Path | None, keep: int = 4) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep}: expected at least 1")
        self._pipe = pipe
        self._folder = folder
        self._keep = keep
        self._adapters: OrderedDict[tuple[str, int, int, int], str] = OrderedDict()

    @contextmanager
    def use(self, name: str | None, scale: float = 1.0) -> Iterator[None]:
        """Enable a LoRA, scaled by `scale`, within the block; None changes nothing.

        Raises:
            LoraError: no such LoRA, or its file does not fit; cache and pipeline are unchanged.
            RuntimeError: whatever torch raises, out of memory included; likewise.
        """
        if name is None:
            yield
            return
        with self.active(self.load(name), scale):
            yield

    @contextmanager
    def active(self, adapter: str, scale: float) -> Iterator[None]:
        """Enable an adapter that `load` returned, scaled by `scale`; reads no file."""
        try:
            self._pipe.set_adapters(adapter, scale)
            self._pipe.enable_lora()
            yield
        finally:
            self._pipe.disable_lora()

    def load(self, name: str) -> str:
        """Load a LoRA, disabled, and return its adapter's name. `use` does this itself.

        A loaded LoRA is reused unless its file has been replaced.

        Raises:
            LoraError, RuntimeError: as `use` does.
        """
        path = lora_file(self._folder, name)
        try:
            stat = path.stat()
        except OSError as error:
            raise LoraError(f"LoRA {name!r}: {error.strerror}") from error
        key = (name, stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if key not in self._adapters:
            self._adapters[key] = self._inject(path)
            self._drop([other for other in self._adapters if other[0] == name and other != key])
        self._adapters.move_to_end(key)
        self._drop(list(self._adapters)[: -self._keep])
        return self._adapters[key]

    def file_of(self, adapter: str) -> tuple[int, int]:
        """Time (mtime in ns) and size (bytes) of the file that a loaded adapter came from."""
        key = next(key for key, loaded in self._adapters.items() if loaded == adapter)
        return key[1], key[2]

    def clear(self) -> None:
        """Unload everything: the transformer's layers are the stock ones again, hooks included."""
        self._adapters.clear()
        for layer in wrappers(self._pipe.transformer):
            if any(getattr(layer, name) for name in HOOKS):
                swap_hooks(layer, layer.base_layer)
        self._pipe.unload_lora_weights()

    def _inject(self, path: Path) -> str:
        """Load a file as a new adapter, disabled; it is named by number, not after the file,
        because peft allows no dots.
        """
        transformer = self._pipe.transformer
        lora = read_lora(path, transformer)
        taken = set(self._adapters.values())  # names are reused: compiled blocks know them already
        adapter = next(name for n in itertools.count() if (name := f"adapter_{n}") not in taken)
        try:
            with warnings.catch_warnings(), uncast(transformer):
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # intended
                self._pipe.load_lora_into_transformer(
                    lora.weights,
                    transformer=transformer,
                    adapter_name=adapter,
                    metadata=lora.config,
                    _pipeline=self._pipe,
                    low_cpu_mem_usage=True,  # no random weights first
                )
        except BaseException as error:
            self._remove(adapter)
            if isinstance(error, (ValueError, TypeError)):
                raise LoraError(f"LoRA {path.stem!r}: {printable(str(error))}") from error
            raise
        finally:
            self._pipe.disable_lora()
        for layer in wrappers(transformer):
            if any(getattr(layer.base_layer, name) for name in HOOKS):
                swap_hooks(layer, layer.base_layer)
        return adapter

    def _drop(self, keys: Sequence[tuple[str, int, int, int]]) -> None:
        for key in keys:
            self._remove(self._adapters.pop(key))

    def _remove(self, adapter: str) -> None:
        """Remove an adapter, even one that was only partly loaded."""
        if self._adapters:
            self._pipe.delete_adapters(adapter)
        else:
            self.clear()


@dataclass(frozen=True, slots=True)
class Lora:
    """A file that fits. `weights` has the loader's keys and the dtype of the transformer's own
    weights; `config` is the adapter's configuration in the loader's form, or None.
    """

    weights: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None


def read_lora(path: Path, transformer: MochiTransformer3DModel) -> Lora:
    """Read a LoRA for this transformer; keys and shapes are checked before any weight is read.

    Accepts the pipeline's own format and diffusers' older one (`.lora.down`, `.lora.up`), with
    alphas as keys or the adapter's configuration as metadata.

    Raises:
        LoraError: the file is incomplete or does not fit; the message has the first few keys.
    """
    title = f"LoRA {path.stem!r}"
    try:
        with safe_open(path, framework="pt") as file:
            names = {key: peft_name(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
            problems = misfits(names, shapes, linears(transformer))
            if problems:
                raise LoraError(f"{title} does not fit this model: {summary(problems)}")
            tensors = {str(name): file.get_tensor(key) for key, name in names.items()}
            metadata = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise LoraError(
            f"{title}: not a whole safetensors file: {printable(str(error))}"
        ) from error
    # the dtype of a convolution, because quantization leaves those alone
    weights = scaled(tensors, transformer.patch_embed.proj.weight.dtype)
    infinite = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise LoraError(f"{title}: numbers that are not finite: {summary(infinite)}")
    config = adapter_config(metadata, title)
    if config is not None:
        problems = conflicts(config, tensors)
        if problems:
            raise LoraError(f"{title}: its metadata cannot be followed: {summary(problems)}")
    return Lora(
        {PREFIX + name: tensor for name, tensor in weights.items()},
        config and {PREFIX + name: value for name, value in loaded_config(config, weights).items()},
    )


def peft_name(key: str) -> str | None:
    """A file's key as peft names it, `layer.lora_A.weight` and so on; None if it does not belong
    to a LoRA for a transformer.
    """
    if not key.startswith(PREFIX):
        return None
    (name,) = convert_unet_state_dict_to_peft({key.removeprefix(PREFIX): None})
    return name if KEY.fullmatch(name) else None


def misfits(
    names: Mapping[str, str | None], shapes: Mapping[str, Shape], layers: Mapping[str, Any]
) -> list[str]:
    """The keys of a file that do not fit these linear layers, each with the reason."""
    if not names:
        return ["it has no weights"]
    problems = [
        f"{printable(key)} (not a LoRA of a Mochi transformer)"
        for key, name in names.items()
        if not name
    ]
    found = {name: (key, shapes[key]) for key, name in names.items() if name}
    problems += [
        f"{printable(key)} (given twice)"
        for key, name in names.items()
        if name and found[name][0] != key
    ]
    for name, (key, shape) in found.items():
        reason = misfit(name, shape, {other: at for other, (_, at) in found.items()}, layers)
        if reason:
            problems.append(f"{printable(key)} ({reason})")
    return problems


def misfit(
    name: str, shape: Shape, shapes: Mapping[str, Shape], layers: Mapping[str, Any]
) -> str | None:
    """Why the weight `name` does not fit its layer; None if it does."""
    match = KEY.fullmatch(name)
    assert match is not None  # `peft_name` checked it
    layer = layers.get(match["layer"])
    if layer is None:
        return "no such linear layer"
    down, up = (f"{match['layer']}.lora_{side}.weight" for side in "AB")
    if down not in shapes or up not in shapes:
        return f"without its lora_{'B' if down in shapes else 'A'}"
    if match["part"] == "alpha":
        return None if shape in ((), (1,)) else f"shape {shape}, expected a number"
    rank = max((1, *shapes[down][:1]))
    expected = (rank, layer.in_features) if name == down else (layer.out_features, rank)
    return None if shape == expected else f"shape {shape}, expected {expected}"


def linears(transformer: MochiTransformer3DModel) -> dict[str, torch.nn.Linear]:
    """The linear layers by their names in the stock model, whether adapters wrap them or not."""
    found = {}
    for name, module in transformer.named_modules():
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        inside = name.endswith(".base_layer") or ".lora_" in name
        if isinstance(inner, torch.nn.Linear) and not inside:
            found[name] = inner
    return found


def scaled(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies of A and B in `dtype`, with alpha / rank multiplied into B.

    Copies, because the tensors are memory-mapped from the file, which may be overwritten.
    """
    weights = {}
    for name, tensor in tensors.items():
        layer = name.rsplit(".lora_", 1)[0]
        alpha = tensors.get(f"{layer}.alpha")
        if name.endswith(".lora_B.weight") and alpha is not None:
            weights[name] = (tensor.float() * (alpha.item() / tensor.shape[1])).to(dtype)
        elif name.endswith(".weight"):
            weights[name] = tensor.to(dtype, copy=True)
    return weights


def adapter_config(metadata: str | None, title: str) -> dict[str, Any] | None:
    """The configuration of the transformer's adapter that diffusers keeps in a file's metadata.

    Raises:
        LoraError: the metadata is not a JSON object.
    """
    if metadata is None:
        return None
    try:
        record = json.loads(metadata)
    except ValueError as error:
        raise LoraError(f"{title}: its metadata is not JSON: {printable(str(error))}") from error
    if not isinstance(record, dict):
        raise LoraError(f"{title}: its metadata is not a JSON object")
    return {
        key.removeprefix(PREFIX): value for key, value in record.items() if key.startswith(PREFIX)
    } or None


def conflicts(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What a configuration requests beyond a plain LoRA with the file's ranks and alphas."""
    usual = LoraConfig().to_dict() | {"peft_type": "LORA"}  # type: ignore[no-untyped-call]
    problems = [
        printable(f"{name}={value!r}")
        for name, value in config.items()
        if name not in READ and name not in UNREAD and value and value != usual.get(name)
        and not (name == "init_lora_weights" and value in HARMLESS_STARTS)
    ]  # fmt: skip
    if any(name.endswith(".alpha") for name in tensors):
        problems.append("the file has alphas of its own")
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            rank = configured_rank(config, layer)
            if rank != len(tensor):
                problems.append(f"{printable(layer)} (rank {len(tensor)}, metadata says {rank!r})")
    return problems


def configured_rank(config: Mapping[str, Any], layer: str) -> Any:
    """The rank that peft would give a layer: that of the first pattern that matches its name."""
    patterns = config.get("rank_pattern") or {}
    try:
        key = get_pattern_key(list(patterns), layer)
        return patterns.get(key, config.get("r", LoraConfig().r))
    except (AttributeError, TypeError, re.error):
        return patterns


def loaded_config(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is passed to the loader: a plain LoRA without dropout."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    return {name: config[name] for name in READ if name in config} | {"target_modules": layers}


def wrappers(transformer: MochiTransformer3DModel) -> list[Any]:
    """The layers that adapters wrap."""
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


def swap_hooks(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Exchange two modules' forward hooks; a handle still removes its own hook, wherever it is."""
    for name in HOOKS:
        ours, theirs = getattr(one, name), getattr(other, name)
        setattr(one, name, theirs)
        setattr(other, name, ours)


def summary(problems: Sequence[str]) -> str:
    """The first few problems, and how many more there are."""
    more = len(problems) - SHOWN_KEYS
    return "; ".join(problems[:SHOWN_KEYS]) + (f"; and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """Text from a file on one line, truncated."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"

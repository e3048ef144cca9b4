"""Trade exactness, start-up or host memory for speed or GPU memory: options, all off by default.

    options = SpeedOptions.of(config)
    options.check(ranks)               # before weights are read: fail early
    pipe = open_pipeline(...)          # to the CPU with `options.offload`, else to the device
    apply(pipe, options, ranks)        # once; layouts may come and go afterwards
    ...
    reset(pipe)                        # after every run, however it ended

`apply` owns the order, in which each step needs the one before: quantize the weights, compile the
blocks around them, offload what is then there, and put the cache outermost, so that a skipped block
is neither computed nor fetched. The cache's rule over several ranks is `parallel.py`'s.

A request's result depends on these options, but never changes from run to run: a compiled engine is
within rounding of a plain one, a quantized one has different weights, and a cached one skips work.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import MochiPipeline, MochiTransformer3DModel
from diffusers.hooks import apply_group_offloading

from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import LoadError
from mochi_app.engine.parallel import enable_first_block_cache
from mochi_app.messages import Configure

QUANTIZATIONS = ("none", "fp8", "int8")
OFFLOADS = ("none", "model", "group")

CASTING_HOOK = "layerwise_casting"
# Compiled graphs that torch may keep of one function. The first, a middle and the last block
# differ, as do one and two samples, layouts with and without guidance, and each adapter's name and
# rank. Past the limit torch runs new variants uncompiled.
GRAPHS = 64


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What to switch on.

    `cache_threshold` is the relative change of the first block's residual, from one step to the
    next, up to which the other blocks' last result is reused; 0 turns the cache off. `compile`
    applies to the transformer's blocks, `quantization` to its stored weights but not to its
    arithmetic. `offload` keeps weights in host memory: those of parts not in use, or of all but the
    current block.

    Raises:
        LoadError: a value that is not one of these.
    """

    cache_threshold: float = 0.0
    compile: bool = False
    quantization: str = "none"
    offload: str = "none"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cache_threshold) and 0 <= self.cache_threshold < 1):
            raise LoadError(
                f"cache threshold {self.cache_threshold}: expected 0 (off) to less than 1"
            )
        expect("quantization", self.quantization, QUANTIZATIONS)
        expect("offload", self.offload, OFFLOADS)

    @classmethod
    def of(cls, config: Configure) -> SpeedOptions:
        """The options in a rank's configuration."""
        return cls(config.cache_threshold, config.compile, config.quantization, config.offload)

    def check(self, ranks: Ranks) -> None:
        """Raise for what cannot work in this process, before any weights are read.

        Raises:
            LoadError: a package or compiler is missing, or offloading in a slot that is not one
                GPU.
        """
        if self.compile:
            check_compiler(ranks.device)
        if self.quantization == "int8" and importlib.util.find_spec("torchao") is None:
            raise LoadError("quantization int8: expected the package torchao; pip install torchao")
        if self.offload != "none":
            if ranks.device.type != "cuda":
                raise LoadError(
                    f"offload {self.offload}: expected device cuda, not {ranks.device.type}"
                )
            if ranks.size > 1:
                raise LoadError(
                    f"offload {self.offload}: expected a slot of one GPU, not of {ranks.size}; "
                    "more GPUs do not need it less, each holds all weights: try quantization"
                )


def expect(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise LoadError(f"{name} {value!r}: expected {', '.join(choices[:-1])} or {choices[-1]}")


def check_compiler(device: torch.device) -> None:
    """Raise unless torch.compile finds what it needs: a C++ compiler for a CPU, Triton for a GPU.

    Raises:
        LoadError: it does not.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise LoadError("compile: expected the package triton, which comes with torch for CUDA")
        if not any(shutil.which(os.environ.get("CC", name)) for name in ("gcc", "clang")):
            raise LoadError("compile: triton expects a C compiler, and found no gcc or clang")
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise LoadError(f"compile on a CPU: expected a C++ compiler, and found no {compiler}")


def apply(pipe: MochiPipeline, options: SpeedOptions, ranks: Ranks) -> None:
    """Apply `options` for the life of `pipe`, which must be in host memory if it is offloaded.

    Raises:
        LoadError: see `SpeedOptions.check`.
    """
    options.check(ranks)
    if options.quantization != "none":
        quantize(pipe.transformer, options.quantization)
    if options.compile:
        compile_blocks(pipe.transformer)
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=ranks.device)
    if options.offload == "group":
        offload_groups(pipe, ranks.device)
    if options.cache_threshold > 0:
        enable_first_block_cache(pipe.transformer, options.cache_threshold, ranks.group)


def reset(pipe: MochiPipeline) -> None:
    """Clear what a run left: a cache's last result, and parts left on the GPU by an offload.

    The pipeline does this itself at the end of a call, but not after an exception. Weights that the
    exception left in their compute dtype need nothing: the cast from float8 and back is exact, and
    the next pass does it.
    """
    pipe.maybe_free_model_hooks()


def quantize(transformer: MochiTransformer3DModel, kind: str) -> None:
    """Store weights in one byte each, and compute in their original dtype: `fp8` or `int8`.

    fp8 is a plain cast of every layer but the patch embedding, the last, and all norms with their
    modulation, which hold 27 % of Mochi's weights. int8 has a scale per row and covers all linear
    layers in the blocks, 99 %. `transformer.pos_frequencies` belongs to no layer and is left alone.
    """
    if kind == "fp8":
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.proj_out.weight.dtype
        )
    else:
        torchao = importlib.import_module("torchao.quantization")
        torchao.quantize_(transformer.transformer_blocks, torchao.Int8WeightOnlyConfig())


@contextmanager
def uncast(transformer: MochiTransformer3DModel) -> Iterator[None]:
    """Keep weights in their compute dtype while adapters (LoRA) are added.

    An adapter takes the dtype of its layer's weights, and cannot compute in float8. Without fp8
    this does nothing; with it, the block takes as much memory as loading did.
    """
    layers = cast_layers(transformer)
    for layer, hook in layers:
        layer.to(hook.compute_dtype)
    try:
        yield
    finally:
        for layer, hook in layers:
            layer.to(hook.storage_dtype)


def compile_blocks(transformer: MochiTransformer3DModel, backend: str = "inductor") -> None:
    """Compile what each block does around its attention: norms, modulation, feed-forward.

    Attention is not compiled. It depends on the number of valid text tokens, so torch would
    recompile for every prompt length, and it communicates with other ranks. Its module's `forward`
    is what is excluded, so a layout may replace the processor without recompilation. Likewise the
    block's `forward` and not its call is compiled, so hooks on the block (a layout's, a cache's or
    an offload's) stay out. Layers whose weights are cast for each pass are not compiled.

    A layout's hooks inside blocks are compiled in. torch must notice when they come and go, which
    it does not by default; this is set for the whole process.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    transformer.requires_grad_(False)  # an adapter would do it, and torch would recompile
    without_tracing: Any = torch.compiler.disable
    compiled: Any = partial(torch.compile, dynamic=True, backend=backend, recompile_limit=GRAPHS)
    for block in transformer.transformer_blocks:
        for module in (block.attn1, *(layer for layer, _ in cast_layers(block))):
            module.forward = without_tracing(module.forward)
        block.forward = compiled(block.forward)


def cast_layers(module: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """The layers in `module` whose weights are cast before each pass and back after it, each with
    diffusers' hook that does so."""
    layers = []
    for layer in module.modules():
        registry: Any = getattr(layer, "_diffusers_hook", None)
        hook = registry.get_hook(CASTING_HOOK) if registry is not None else None
        if hook is not None:
            layers.append((layer, hook))
    return layers


def offload_groups(pipe: MochiPipeline, device: torch.device) -> None:
    """Offload the transformer by block and the text encoder by layer, to fetch each when needed.

    On a GPU the next block is prefetched while one computes, which takes pinned host memory of the
    transformer's size. The VAE is small and stays on `device`: its `decode` would bypass the hook.
    """
    pipe.transformer.enable_group_offload(
        device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    )
    if pipe.text_encoder is not None:
        apply_group_offloading(pipe.text_encoder, device, offload_type="leaf_level")
    pipe.vae.to(device)

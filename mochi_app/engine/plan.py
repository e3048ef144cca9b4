"""The plan on paper: memory, work and traffic of every GPU of a slot, before any weight is loaded.

Owns the arithmetic of a run of Mochi over N GPUs: a step in the layout of `parallel.py`, decoding
in the rounds of `decode.py`, weights in the types that `loading.py` chooses. The architecture
is built from its real classes on the meta device, so parameters are counted and one decoder tile
is walked through, without memory for either. It runs nothing and knows no hardware. Run it with::

    python -m mochi_app.engine.plan --gpus 1,2,4,8 --gpu-memory 80
    python -m mochi_app.engine.plan --published

Exact, and tested against torch's own counter: weights, multiply-adds of matrix products and
convolutions, bytes handed to collectives. Estimated: live tensors at the peak of a step. Predicted
from two numbers that the reader gives, a sustained rate and a link bandwidth: seconds. They assume
that nothing overlaps and that matrix products, attention and convolution all run at that one rate.
Not in them: kernels bound by memory or by launches (norms, rotary embedding, group norms of the
decoder, the text encoder at batch 1), latency of collectives, imbalance between GPUs, copies of
decoded tiles to rank 0, video encoding, loading, and the first call's compilation or autotuning.
Not in the peaks, but for what `reserve` allows: the CUDA context, NCCL's buffers, workspaces of
cuDNN and cuBLAS, fragmentation. A GB is 10**9 bytes, a TFLOP 10**12 operations.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from mochi_app.engine.decode import plan_tiles
from mochi_app.engine.parallel import LayoutError, check_heads, mesh_shape, shares

GB = 10**9
TERA = 10**12
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SPACE, TIME = 8, 6  # pixels and frames to a latent cell, as MochiPipeline has them

# huggingface.co/genmo/mochi-1-preview, transformer/config.json
TRANSFORMER: Mapping[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "out_channels": None,
    "qk_norm": "rms_norm",
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "activation_fn": "swiglu",
    "max_sequence_length": 256,
}
# the same repository, vae/config.json, without the statistics of the latents
VAE: Mapping[str, Any] = {
    "in_channels": 15,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 128, 256, 384),
    "decoder_block_out_channels": (128, 256, 512, 768),
    "latent_channels": 12,
    "layers_per_block": (3, 3, 4, 6, 3),
    "act_fn": "silu",
    "temporal_expansions": (1, 2, 3),
    "spatial_expansions": (2, 2, 2),
    "add_attention_block": (False, True, True, True, True),
    "scaling_factor": 1.0,
}
# huggingface.co/google/t5-v1_1-xxl, config.json: the encoder half, which Mochi's repository holds
TEXT_ENCODER: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
    "use_cache": False,
}


class PlanError(ValueError):
    """A setting that cannot be planned. The message says what was given and expected."""


class FitError(RuntimeError):
    """The run does not fit the GPU's memory. The message has the figures."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What to plan for.

    Sizes in pixels and frames, memory and `reserve` in GB a GPU, `tflops` sustained by one GPU in
    10**12 operations a second, `link_gbs` what one GPU sends in GB a second. `text_tokens` are the
    valid ones of each prompt, `decode_tflops` is `tflops` if None, `mesh` (cfg, sp) the default of
    `parallel.mesh_shape` if None.
    """

    gpus: int = 1
    gpu_memory: float = 80.0
    height: int = 480
    width: int = 848
    num_frames: int = 163
    guidance_scale: float = 4.5
    text_tokens: int = 256
    dtype: str = "bfloat16"
    t5_dtype: str = "float32"
    vae_dtype: str = "bfloat16"
    tflops: float = 400.0
    decode_tflops: float | None = None
    link_gbs: float = 200.0
    reserve: float = 1.5
    mesh: tuple[int, int] | None = None

    @property
    def guided(self) -> bool:
        """Whether a step works on the pair of an unconditional and a conditional sample."""
        return self.guidance_scale > 1.0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (self.num_frames - 1) // TIME + 1, self.height // SPACE, self.width // SPACE

    def check(self) -> None:
        """Raise unless every field makes sense.

        Raises:
            PlanError: naming the field, its value and what was expected.
        """
        for name in ("gpus", "gpu_memory", "num_frames", "text_tokens", "tflops", "link_gbs"):
            if getattr(self, name) <= 0:
                raise PlanError(f"{name} {getattr(self, name)}: expected a positive number")
        if self.reserve < 0 or (self.decode_tflops or 1) <= 0:
            raise PlanError(f"reserve {self.reserve}, decode_tflops {self.decode_tflops}: negative")
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise PlanError(f"{name} {getattr(self, name)}: expected a multiple of 16")
        for name in ("dtype", "t5_dtype", "vae_dtype"):
            if getattr(self, name) not in DTYPES:
                raise PlanError(f"{name} {getattr(self, name)!r}: expected {' or '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of a `MochiTransformer3DModel`, named as its code uses them."""

    layers: int
    heads: int
    width: int  # of a visual token
    text_width: int  # of a text token inside the blocks
    embed: int  # of a text token as T5 gives it
    time: int
    patch_in: int  # latent values to a visual token
    patch_out: int
    length: int  # text tokens, padding included
    channels: int  # of latents

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """From a transformer's `config` or its config.json."""
        cells = config["patch_size"] ** 2
        return cls(
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            text_width=config["pooled_projection_dim"],
            embed=config["text_embed_dim"],
            time=config["time_embed_dim"],
            patch_in=config["in_channels"] * cells,
            patch_out=(config.get("out_channels") or config["in_channels"]) * cells,
            length=config["max_sequence_length"],
            channels=config["in_channels"],
        )

    @property
    def inner(self) -> int:
        """Width inside the feed-forward of visual tokens."""
        return 4 * self.width * 2 // 3

    @property
    def text_inner(self) -> int:
        """Width inside the feed-forward of text tokens."""
        return 4 * self.text_width * 2 // 3


def video_tokens(config: Mapping[str, Any], latent_shape: Sequence[int]) -> int:
    """Visual tokens of a video whose latents have that (frames, rows, columns)."""
    frames, rows, columns = latent_shape
    side = int(config["patch_size"])
    return frames * (rows // side) * (columns // side)


def samples_of(text_tokens: int | Sequence[int], guidance: bool) -> tuple[int, ...]:
    """Valid text tokens of each sample of the batch: the (uncond, cond) pair, or the one alone."""
    if isinstance(text_tokens, int):
        return (text_tokens,) * (2 if guidance else 1)
    return tuple(text_tokens)


def own_samples(samples: Sequence[int], cfg: int, cfg_rank: int) -> Sequence[int]:
    """The samples of one rank along cfg: one of the pair, or, without a split, all of them."""
    return samples[cfg_rank : cfg_rank + 1] if cfg > 1 else samples


def row_flops(size: Sizes) -> int:
    """Linear layers that see one row a sample: a step's conditioning, and every modulation.

    Timestep MLP, query and output of the caption's attention pool; in each block four parts for
    the visual and four for the text stream (the last block: one for the text); scale and shift of
    the output norm.
    """
    timestep = size.time * size.width + size.width**2
    pool = size.embed**2 + size.embed * size.width
    blocks = size.layers * 4 * size.width**2 + size.width * size.text_width * (4 * size.layers - 3)
    return 2 * (timestep + pool + blocks + 2 * size.width**2)


def caption_flops(size: Sizes) -> int:
    """What the padded caption goes through once a step: the pool's keys, values and attention,
    over the caption and its mean, and the projection to the blocks' width.
    """
    pooled = size.length + 1
    pool = 2 * pooled * size.embed * 2 * size.embed + 4 * pooled * size.embed
    return pool + 2 * size.length * size.embed * size.text_width


def visual_flops(size: Sizes, own: int) -> int:
    """Linear layers of one block over `own` visual tokens: q, k, v, out and the gated MLP."""
    return 2 * own * (4 * size.width**2 + 3 * size.width * size.inner)


def text_flops(size: Sizes, last: bool) -> int:
    """Linear layers of one block over the padded caption: q, k, v, out and the gated MLP.

    The last block discards what the text becomes: it has no text output and no text MLP.
    """
    weights = 3 * size.width * size.text_width
    if not last:
        weights += size.width * size.text_width + 3 * size.text_width * size.text_inner
    return 2 * size.length * weights


def attention_flops(size: Sizes, tokens: int, valid: int, sp: int) -> int:
    """Joint attention of one block and sample, with one rank's share of the heads.

    Two products (scores, values) over all visual and the valid text tokens: nothing is masked.
    """
    return 4 * (size.width // sp) * (tokens + valid) ** 2


def transformer_flops(
    config: Mapping[str, Any],
    tokens: int,
    text_tokens: Sequence[int],
    sp: int = 1,
    sp_rank: int = 0,
    cfg: int = 1,
) -> int:
    """Operations of one forward pass on one rank, two for a multiply-add.

    Counted as `torch.utils.flop_counter` does: matrix products, convolutions and attention only.
    `tokens` are the visual ones of the whole video; `text_tokens` the valid ones of each sample of
    this rank's batch. Every rank embeds all patches and turns all rotary angles; the rest of the
    visual work is divided, the text's is not, except for its attention. Layers that see one row a
    sample work on the rows of all samples, whatever the split over `cfg`.

    Raises:
        LayoutError: the heads cannot be split over `sp` ranks.
    """
    size = Sizes.of(config)
    check_heads(size.heads, sp)
    own = shares(tokens, sp)[sp_rank]
    sample = cfg * row_flops(size) + caption_flops(size)
    sample += 2 * tokens * size.patch_in * size.width + 2 * own * size.width * size.patch_out
    sample += size.layers * visual_flops(size, own)
    sample += (size.layers - 1) * text_flops(size, last=False) + text_flops(size, last=True)
    attention = sum(attention_flops(size, tokens, valid, sp) for valid in text_tokens)
    angles = 2 * tokens * 3 * (size.width // 2)
    return len(text_tokens) * sample + size.layers * attention + angles


def rank_flops(
    config: Mapping[str, Any],
    tokens: int,
    text_tokens: int | Sequence[int],
    cfg: int,
    sp: int,
    sp_rank: int,
    guidance: bool,
    cfg_rank: int = 0,
) -> int:
    """Operations of one denoising step on the rank at (`cfg_rank`, `sp_rank`) of a (cfg, sp) mesh.

    `text_tokens` are the valid ones, of every prompt alike or of (negative, positive).

    Raises:
        LayoutError: the heads cannot be split over `sp` ranks.
    """
    samples = own_samples(samples_of(text_tokens, guidance), cfg, cfg_rank)
    return transformer_flops(config, tokens, samples, sp, sp_rank, cfg)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends to others in one step, by collective."""

    heads: int  # all-to-all of q, k, v before attention, every block
    tokens: int  # all-to-all of its output, every block
    text: int  # all-gather of the text's attention, every block but the last
    result: int  # all-gather of the noise prediction over sp
    pair: int  # all-gather of the noise prediction over cfg

    @property
    def total(self) -> int:
        """All of them."""
        return self.heads + self.tokens + self.text + self.result + self.pair


def rank_traffic(
    config: Mapping[str, Any],
    tokens: int,
    cfg: int,
    sp: int,
    sp_rank: int,
    guidance: bool,
    itemsize: int,
) -> Traffic:
    """What one rank sends in one step, for `itemsize` bytes a number.

    Per sample: q, k, v of the own tokens, less the own heads; the output of the own heads, less
    the own tokens; the own heads' share of the padded caption, and the own tokens' prediction
    (padded to the largest share), each once to every other rank. Over cfg: the whole prediction.
    """
    size = Sizes.of(config)
    own, largest = shares(tokens, sp)[sp_rank], shares(tokens, sp)[0]
    others, head_width = sp - 1, size.width // sp
    batch = 2 if guidance and cfg == 1 else 1
    each = itemsize * batch
    return Traffic(
        heads=each * size.layers * 3 * own * head_width * others,
        tokens=each * size.layers * (tokens - own) * head_width,
        text=each * (size.layers - 1) * size.length * head_width * others,
        result=each * largest * size.patch_out * others,
        pair=each * tokens * size.patch_out * (cfg - 1) if guidance else 0,
    )


def step_activations(
    config: Mapping[str, Any],
    tokens: int,
    cfg: int,
    sp: int,
    sp_rank: int,
    guidance: bool,
    itemsize: int,
) -> int:
    """Bytes of tensors alive at the peak of a step, without gradients and without compilation.

    The peak is inside the gated MLP of the first block. Alive there, for each own token: the
    block's new hidden state, the attention's result, the normalised input of the MLP (one width
    each), its up-projection (two inner widths), the gate after its activation and the product
    (one each). For each token of the video: the embedded patches, of which a rank's share is a
    view, and cosines and sines in float32. Of the caption: the block's, its norm and its
    attention. And the inputs of the pass, of all samples: latents and T5's embeddings. The
    exchange of q, k and v stays just below: 13 widths a token against 13.7.
    """
    size = Sizes.of(config)
    own = shares(tokens, sp)[sp_rank]
    samples = 2 if guidance else 1
    inputs = samples * (tokens * size.patch_in + size.length * size.embed)
    block = own * (3 * size.width + 4 * size.inner)
    sample = block + tokens * size.width + size.length * 3 * size.text_width
    return itemsize * (inputs + samples // cfg * sample) + 4 * tokens * size.width


def text_encoder_flops(config: Mapping[str, Any], length: int) -> int:
    """Operations of T5's encoder for one prompt, padded to `length` tokens."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = str(config["feed_forward_proj"]).startswith("gated")
    mlp = (3 if gated else 2) * width * config["d_ff"]
    linear = 2 * length * (4 * width * inner + mlp)
    return int(config["num_layers"] * (linear + 4 * length**2 * inner))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storage of tensors made inside it, while they live; `peak` is the most, in bytes.

    Works on the meta device too, where nothing is allocated. What an operation uses inside, it
    cannot see.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count the storages of its results that it was not given."""
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in storages((args, kwargs))} | self._live.keys()
        for storage in storages(result):
            if storage._cdata not in known:
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Storages of all tensors in nested arguments."""
    leaves = tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """One tile through the decoder: operations, bytes alive at its peak, and bytes of its frames.

    Each is in proportion to the tile's area, `cells` latent columns times rows.
    """

    cells: int
    flops: int
    peak: int
    frames: int


@lru_cache(maxsize=16)
def decode_cost(decoder: Any, latent_shape: tuple[int, int, int], dtype: torch.dtype) -> DecodeCost:
    """What the real decoder does to latents of that (frames, rows, columns), on the meta device."""
    channels = decoder.conv_in.in_channels
    latents = torch.empty((1, channels, *latent_shape), device="meta", dtype=dtype)
    decoder.to(dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, LiveBytes() as live:
        frames = decoder(latents)[0]
    cells = latent_shape[1] * latent_shape[2]
    return DecodeCost(cells, flops.get_total_flops(), live.peak, frames.untyped_storage().nbytes())


@dataclass(frozen=True, slots=True)
class Parts:
    """A pipeline's modules on the meta device, with the configurations that they were built from.

    Weights are counts of parameters and buffers.
    """

    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Any
    transformer_weights: int
    text_encoder_weights: int
    vae_weights: int


@lru_cache(maxsize=4)
def build_parts(model: str | None = None) -> Parts:
    """The published Mochi 1 preview, or the pipeline folder `model`, without its weights.

    Raises:
        PlanError: `model` has no config.json where a pipeline has one.
    """
    configs = [TRANSFORMER, VAE, TEXT_ENCODER]
    if model is not None:
        configs = [read_config(model, part) for part in ("transformer", "vae", "text_encoder")]
    with torch.device("meta"):
        transformer = MochiTransformer3DModel.from_config(dict(configs[0]))
        vae = AutoencoderKLMochi.from_config(dict(configs[1])).eval()
        vae.enable_tiling()
        text_config = T5Config(**configs[2])
        text_encoder = T5EncoderModel(text_config)
    return Parts(
        transformer=dict(transformer.config),
        text_encoder=text_config.to_dict(),
        vae=vae,
        transformer_weights=count_weights(transformer),
        text_encoder_weights=count_weights(text_encoder),
        vae_weights=count_weights(vae),
    )


def read_config(model: str, part: str) -> Mapping[str, Any]:
    """The config.json of one part of a pipeline folder.

    Raises:
        PlanError: there is none, or it is not JSON.
    """
    path = Path(model).expanduser() / part / "config.json"
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{path}: expected the configuration of a Mochi pipeline: {error}"
        ) from None
    return config


def count_weights(module: torch.nn.Module) -> int:
    """Numbers in parameters and buffers; a shared one counts once."""
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one GPU holds and does. Bytes; operations and traffic of one step; tiles to decode."""

    rank: int
    cfg_rank: int
    sp_rank: int
    tokens: int
    weights: int
    step_activations: int
    decode_activations: int
    reserve: int
    flops: int
    traffic: Traffic
    tiles: int
    decode_flops: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: weights stay, a step and the decoding follow each other."""
        return self.weights + self.reserve + max(self.step_activations, self.decode_activations)


@dataclass(frozen=True, slots=True)
class Plan:
    """A setting worked out. `text_flops` are those of all prompts, on rank 0."""

    setting: Setting
    mesh: tuple[int, int]
    ranks: tuple[RankPlan, ...]
    text_flops: int
    one_process_flops: int

    @property
    def worst(self) -> RankPlan:
        """The GPU with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool:
        """Whether every GPU's peak is within its memory."""
        return self.worst.peak <= self.setting.gpu_memory * GB

    @property
    def busiest_flops(self) -> int:
        """Operations of one step on the GPU that has the most, for which all others wait."""
        return max(rank.flops for rank in self.ranks)

    @property
    def overhead(self) -> float:
        """Busiest GPU times their number, over one process: 1 is a perfect division."""
        return self.busiest_flops * len(self.ranks) / self.one_process_flops

    @property
    def text_seconds(self) -> float:
        """Predicted seconds of the text encoder."""
        return self.text_flops / (self.setting.tflops * TERA)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of one denoising step: work, then traffic."""
        sent = max(rank.traffic.total for rank in self.ranks)
        work = self.busiest_flops / (self.setting.tflops * TERA)
        return work + sent / (self.setting.link_gbs * GB)

    @property
    def decode_seconds(self) -> float:
        """Predicted seconds of the GPU that decodes the most."""
        rate = self.setting.decode_tflops or self.setting.tflops
        return max(rank.decode_flops for rank in self.ranks) / (rate * TERA)

    def seconds(self, steps: int) -> float:
        """Predicted seconds of a run of that many steps, from prompt to frames."""
        return self.text_seconds + steps * self.step_seconds + self.decode_seconds

    def verdict(self) -> str:
        """One sentence: the need of the worst GPU, and what it has."""
        worst, memory = self.worst, self.setting.gpu_memory
        stage = "decode" if worst.decode_activations > worst.step_activations else "step"
        live = max(worst.decode_activations, worst.step_activations)
        needs = (
            f"needs {worst.peak / GB:.1f} GB at its peak on rank {worst.rank} "
            f"(weights {worst.weights / GB:.1f}, {stage} {live / GB:.1f}, "
            f"reserve {worst.reserve / GB:.1f})"
        )
        if self.fits:
            return f"fits: {needs}; the GPU has {memory:g} GB"
        return f"does not fit: {needs}; the GPU has {memory:g} GB: {self._advice(stage)}"

    def _advice(self, stage: str) -> str:
        worst, setting = self.worst, self.setting
        if worst.weights + worst.reserve > setting.gpu_memory * GB:
            kinds = {setting.dtype, setting.t5_dtype, setting.vae_dtype}
            return "the weights alone do not" + (", try bfloat16" if "float32" in kinds else "")
        if stage == "decode" and setting.vae_dtype == "float32":
            return "decode in bfloat16, or make fewer frames"
        return "make fewer frames" + (
            " or smaller ones, or use more GPUs" if stage == "step" else ""
        )


def make_plan(setting: Setting, parts: Parts) -> Plan:
    """Work a setting out, whether it fits or not.

    Raises:
        PlanError: a setting that makes no sense.
        LayoutError: attention heads that cannot be split over so many GPUs.
    """
    setting.check()
    cfg, sp = setting.mesh or mesh_shape(setting.gpus, setting.guided)
    if cfg * sp != setting.gpus or cfg > (2 if setting.guided else 1):
        raise PlanError(f"mesh {cfg}x{sp}: expected one of {setting.gpus} GPUs")
    check_heads(Sizes.of(parts.transformer).heads, sp)
    tokens = video_tokens(parts.transformer, setting.latent_shape)
    samples = samples_of(setting.text_tokens, setting.guided)
    length = Sizes.of(parts.transformer).length
    if setting.text_tokens > length:
        raise PlanError(f"text_tokens {setting.text_tokens}: expected at most {length}")
    return Plan(
        setting=setting,
        mesh=(cfg, sp),
        ranks=tuple(plan_rank(setting, parts, rank, cfg, sp) for rank in range(cfg * sp)),
        text_flops=len(samples) * text_encoder_flops(parts.text_encoder, length),
        one_process_flops=transformer_flops(parts.transformer, tokens, samples),
    )


def plan_rank(setting: Setting, parts: Parts, rank: int, cfg: int, sp: int) -> RankPlan:
    """The part of one GPU: cfg-major, as in `parallel.py`'s mesh. The text encoder is on rank 0."""
    config, guided = parts.transformer, setting.guided
    cfg_rank, sp_rank = divmod(rank, sp)
    itemsize = DTYPES[setting.dtype].itemsize
    tokens = video_tokens(config, setting.latent_shape)
    tiles, decode_flops, decode_activations = plan_decode(setting, parts, rank)
    weights = parts.transformer_weights * itemsize
    weights += parts.vae_weights * DTYPES[setting.vae_dtype].itemsize
    if rank == 0:
        weights += parts.text_encoder_weights * DTYPES[setting.t5_dtype].itemsize
    return RankPlan(
        rank=rank,
        cfg_rank=cfg_rank,
        sp_rank=sp_rank,
        tokens=shares(tokens, sp)[sp_rank],
        weights=weights,
        step_activations=step_activations(config, tokens, cfg, sp, sp_rank, guided, itemsize),
        decode_activations=decode_activations,
        reserve=int(setting.reserve * GB),
        flops=rank_flops(config, tokens, setting.text_tokens, cfg, sp, sp_rank, guided, cfg_rank),
        traffic=rank_traffic(config, tokens, cfg, sp, sp_rank, guided, itemsize),
        tiles=tiles,
        decode_flops=decode_flops,
    )


def plan_decode(setting: Setting, parts: Parts, rank: int) -> tuple[int, int, int]:
    """Tiles of one GPU, their operations, and bytes alive at the peak of its decoding.

    In the rounds of `decode.py`: the first rank has the largest tile of each, and keeps the frames
    of all rounds before; the others keep none.
    """
    channels = Sizes.of(parts.transformer).channels
    tiling = plan_tiles(parts.vae, (1, channels, *setting.latent_shape))
    first = tiling.tiles[0]
    shape = (setting.latent_shape[0], first.height, first.width)
    cost = decode_cost(parts.vae.decoder, shape, DTYPES[setting.vae_dtype])
    tiles, area, kept, peak = 0, 0, 0, 0
    for dealt in tiling.rounds(setting.gpus):
        areas = [tile.height * tile.width for tile in dealt]
        if rank < len(areas):
            tiles += 1
            area += areas[rank]
            peak = max(peak, (cost.peak * areas[rank] + cost.frames * kept) // cost.cells)
        kept += sum(areas) if rank == 0 else 0
    return tiles, cost.flops * area // cost.cells, peak


def check_fit(setting: Setting, model: str | None = None) -> Plan:
    """The plan of a slot that is about to start. `model` as in `build_parts`.

    Raises:
        FitError: it needs more memory than a GPU has; the message says which GPU, and for what.
        PlanError: a setting that makes no sense.
        LayoutError: attention heads that cannot be split over so many GPUs.
    """
    plan = make_plan(setting, build_parts(model))
    if not plan.fits:
        raise FitError(plan.verdict())
    return plan


@dataclass(frozen=True, slots=True)
class Timing:
    """A published time of the whole run: seconds on `mesh` (cfg, sp) GPUs.

    `series` names what shares one sustained rate. `alone`: every GPU decodes the whole video.
    """

    series: str
    num_frames: int
    steps: int
    mesh: tuple[int, int]
    seconds: float
    link_gbs: float
    alone: bool = False


# All at 480x848 with guidance. Link bandwidths are ours: PCIe 4 x16, NVLink 3, NVLink 4, one way.
# mochi-xdit's README (64 steps are the default of its demos/cli.py); ParaAttention's README with
# its parallel_examples/run_mochi.py, which leaves the steps to diffusers: 28 are assumed, since 64
# would need more than an A100's peak of 312 TFLOP/s; the last series is this project's earlier
# deployment, H100-class GPUs and no separate cfg axis.
TIMINGS = (
    Timing("L40, mochi-xdit", 49, 64, (1, 1), 394.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (1, 2), 222.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (2, 1), 198.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (2, 3), 74.0, 25),
    Timing("A100, ParaAttention", 84, 28, (1, 1), 196.5, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (1, 2), 110.1, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (2, 1), 105.4, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (2, 2), 61.2, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (1, 1), 149.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (1, 2), 83.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (2, 1), 81.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (2, 2), 47.1, 250, alone=True),
    Timing("H100-class, earlier deployment", 163, 100, (1, 2), 540.0, 400),
    Timing("H100-class, earlier deployment", 163, 100, (1, 4), 285.0, 400),
    Timing("H100-class, earlier deployment", 163, 100, (1, 8), 150.0, 400),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published time beside the plan's, in seconds.

    `tflops` was fitted to the first of the series, whose prediction is therefore no news.
    """

    timing: Timing
    tflops: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """How far the plan is off, as a part of the published time; negative if too fast."""
        return self.predicted / self.timing.seconds - 1


def compare_published(parts: Parts, timings: Sequence[Timing] = TIMINGS) -> list[Comparison]:
    """Fit one sustained rate to the first timing of each series, and predict them all with it."""
    rates: dict[str, float] = {}
    comparisons = []
    for timing in timings:
        work, traffic = published_cost(timing, parts)
        fitted = timing.series not in rates
        rate = rates.setdefault(timing.series, work / (timing.seconds - traffic))
        comparisons.append(Comparison(timing, rate / TERA, work / rate + traffic, fitted))
    return comparisons


def published_cost(timing: Timing, parts: Parts) -> tuple[float, float]:
    """Operations on the critical path of a published run, and its seconds of traffic."""
    cfg, sp = timing.mesh
    setting = Setting(
        gpus=cfg * sp, mesh=timing.mesh, num_frames=timing.num_frames, link_gbs=timing.link_gbs
    )
    plan = make_plan(setting, parts)
    decode = [rank.decode_flops for rank in plan.ranks]
    work = plan.text_flops + timing.steps * plan.busiest_flops
    work += sum(decode) if timing.alone else max(decode)
    sent = max(rank.traffic.total for rank in plan.ranks)
    return work, timing.steps * sent / (timing.link_gbs * GB)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, every column as wide as its widest cell, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(lines)


def ranks_table(plan: Plan) -> str:
    """One row a GPU: where it is in the mesh, what it holds, what a step costs, what it decodes."""
    head = ["rank", "cfg", "sp", "tokens", "weights GB", "step GB", "decode GB", "peak GB"]
    head += ["TFLOP/step", "GB sent/step", "tiles", "decode TFLOP"]
    rows = [head]
    for rank in plan.ranks:
        counts = [rank.rank, rank.cfg_rank, rank.sp_rank, rank.tokens]
        held = [rank.weights, rank.step_activations, rank.decode_activations, rank.peak]
        rows.append(
            [
                *map(str, counts),
                *(f"{size / GB:.1f}" for size in held),
                f"{rank.flops / TERA:.1f}",
                f"{rank.traffic.total / GB:.2f}",
                str(rank.tiles),
                f"{rank.decode_flops / TERA:.1f}",
            ]
        )
    return align(rows)


def counts_table(plans: Sequence[Plan], preview_steps: int, enhance_steps: int) -> str:
    """One row a number of GPUs: the busiest of each figure, and predicted seconds."""
    head = ["GPUs", "cfg x sp", "tokens", "weights GB", "step GB", "decode GB", "peak GB", "fits"]
    head += ["TFLOP/step", "x N / one", "GB sent/step", "tiles", "text s", "step s", "decode s"]
    head += [f"preview s ({preview_steps})", f"enhance s ({enhance_steps})"]
    rows = [head]
    for plan in plans:
        first = plan.ranks[0]
        held = [first.weights, first.step_activations, first.decode_activations, plan.worst.peak]
        seconds = [plan.seconds(preview_steps), plan.seconds(enhance_steps)]
        rows.append(
            [
                str(len(plan.ranks)),
                "{} x {}".format(*plan.mesh),
                str(first.tokens),
                *(f"{size / GB:.1f}" for size in held),
                "yes" if plan.fits else "NO",
                f"{plan.busiest_flops / TERA:.1f}",
                f"{plan.overhead:.4f}",
                f"{max(rank.traffic.total for rank in plan.ranks) / GB:.2f}",
                str(first.tiles),
                f"{plan.text_seconds:.2f}",
                f"{plan.step_seconds:.2f}",
                f"{plan.decode_seconds:.2f}",
                *(f"{value:.1f}" for value in seconds),
            ]
        )
    return align(rows)


def published_table(comparisons: Sequence[Comparison]) -> str:
    """One row a published time, with the plan's beside it."""
    rows = [["series", "frames", "steps", "cfg x sp", "TFLOP/s", "published s", "plan s", "off"]]
    for item in comparisons:
        rows.append(
            [
                item.timing.series,
                str(item.timing.num_frames),
                str(item.timing.steps),
                "{} x {}".format(*item.timing.mesh),
                f"{item.tflops:.0f}",
                f"{item.timing.seconds:.1f}",
                f"{item.predicted:.1f}",
                "fitted" if item.fitted else f"{item.error:+.0%}",
            ]
        )
    return align(rows)


def as_record(plan: Plan, steps: Mapping[str, int]) -> dict[str, Any]:
    """A plan as plain data for JSON: bytes, operations, seconds."""
    ranks = [asdict(rank) | {"peak": rank.peak, "sent": rank.traffic.total} for rank in plan.ranks]
    predicted = {name: plan.seconds(count) for name, count in steps.items()}
    return {
        "setting": asdict(plan.setting),
        "mesh": plan.mesh,
        "fits": plan.fits,
        "verdict": plan.verdict(),
        "ranks": ranks,
        "text_flops": plan.text_flops,
        "one_process_flops": plan.one_process_flops,
        "overhead": plan.overhead,
        "seconds": {
            "text": plan.text_seconds,
            "step": plan.step_seconds,
            "decode": plan.decode_seconds,
            **predicted,
        },
    }


def parse_counts(text: str) -> list[int]:
    """`1,2,4` as numbers of GPUs."""
    return [int(count) for count in text.split(",")]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults are those of `Setting`."""
    parser = argparse.ArgumentParser(
        prog="python -m mochi_app.engine.plan",
        description="Memory, work, traffic and predicted seconds of Mochi on N GPUs, on paper.",
    )
    plain = Setting()
    parser.add_argument(
        "--gpus", type=parse_counts, action="extend", help="numbers of GPUs: 4, or 1,2,4,8"
    )
    for name, text in (
        ("gpu-memory", "GB of one GPU"),
        ("height", "pixels"),
        ("width", "pixels"),
        ("num-frames", "frames of the video"),
        ("guidance-scale", "1 or less: no guidance"),
        ("text-tokens", "valid tokens of a prompt"),
        ("tflops", "sustained by one GPU"),
        ("link-gbs", "GB/s that one GPU sends"),
        ("reserve", "GB kept for context, workspaces and fragmentation"),
    ):
        value = getattr(plain, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=f"{text} (default {value:g})"
        )
    parser.add_argument(
        "--decode-tflops", type=float, help="sustained in decoding, if not the same"
    )
    for name in ("dtype", "t5-dtype", "vae-dtype"):
        value = getattr(plain, name.replace("-", "_"))
        parser.add_argument(f"--{name}", choices=tuple(DTYPES), default=value)
    parser.add_argument("--preview-steps", type=int, default=8)
    parser.add_argument("--enhance-steps", type=int, default=64)
    parser.add_argument("--model", help="a pipeline folder; default: the published Mochi 1 preview")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--published", action="store_true", help="compare with published times")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace, gpus: int) -> Setting:
    """The command line's setting for one number of GPUs."""
    names = (name for name in Setting.__dataclass_fields__ if name not in ("gpus", "mesh"))
    return replace(Setting(gpus=gpus), **{name: getattr(options, name) for name in names})


def report(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        PlanError, LayoutError: see `make_plan` and `build_parts`.
    """
    parts = build_parts(options.model)
    if options.published:
        comparisons = compare_published(parts)
        if options.json:
            return json.dumps([asdict(item) | {"error": item.error} for item in comparisons])
        return published_table(comparisons)
    plans = [make_plan(setting_of(options, gpus), parts) for gpus in options.gpus or [1]]
    steps = {"preview": options.preview_steps, "enhance": options.enhance_steps}
    if options.json:
        return json.dumps([as_record(plan, steps) for plan in plans], indent=1)
    lines = [counts_table(plans, *steps.values())]
    if len(plans) == 1:
        lines = [ranks_table(plans[0]), "", *lines]
    verdicts = [f"{len(plan.ranks)} GPUs: {plan.verdict()}" for plan in plans]
    return "\n".join([*lines, "", *verdicts])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 2 and a line on stderr for what cannot be planned."""
    try:
        sys.stdout.write(report(parse_arguments(arguments)) + "\n")
    except (PlanError, LayoutError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

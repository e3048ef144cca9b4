"""What a run of Mochi costs: operations, bytes between GPUs, bytes alive at a time.

The published architecture of genmo/mochi-1-preview, and pure functions from sizes to counts. Exact,
and tested against torch's own counter: multiply-adds of matrix products and convolutions, bytes
handed to collectives. Estimated: live tensors at the peak of a step. Layouts are those of
`parallel.py`, tiles those of `decode.py`. A GB is 10**9 bytes, a TFLOP 10**12 operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mochi_app.engine.parallel import check_heads, shares

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
    """Linear layers with one row per sample: a step's conditioning, and every modulation.

    Timestep MLP, query and output of the caption's attention pool; in each block four parts for
    the visual and four for the text stream (the last block: one for the text); scale and shift of
    the output norm.
    """
    timestep = size.time * size.width + size.width**2
    pool = size.embed**2 + size.embed * size.width
    blocks = size.layers * 4 * size.width**2 + size.width * size.text_width * (4 * size.layers - 3)
    return 2 * (timestep + pool + blocks + 2 * size.width**2)


def caption_flops(size: Sizes) -> int:
    """The work on the padded caption once a step: the pool's keys, values and attention, over the
    caption and its mean, and the projection to the blocks' width.
    """
    pooled = size.length + 1
    pool = 2 * pooled * size.embed * 2 * size.embed + 4 * pooled * size.embed
    return pool + 2 * size.length * size.embed * size.text_width


def visual_flops(size: Sizes, own: int) -> int:
    """Linear layers of one block over `own` visual tokens: q, k, v, out and the gated MLP."""
    return 2 * own * (4 * size.width**2 + 3 * size.width * size.inner)


def text_flops(size: Sizes, last: bool) -> int:
    """Linear layers of one block over the padded caption: q, k, v, out and the gated MLP.

    The last block discards the text stream: it has no text output and no text MLP.
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
    this rank's batch. Every rank embeds all patches and computes all rotary angles; the rest of the
    visual work is split, the text's is not, except for its attention. Layers with one row per
    sample process the rows of all samples, whatever the split over `cfg`.

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

    Works on the meta device too, where nothing is allocated. It cannot see what an operation
    allocates internally.
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


def count_weights(module: torch.nn.Module) -> int:
    """Numbers in parameters and buffers; a shared one counts once."""
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])

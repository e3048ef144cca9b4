"""Whether a slot's runs fit its GPUs, and how long they would take: one plan for N ranks.

Adds up the costs (`costs.py`) by rank, with weights in the dtypes that `loading.py` chooses. The
architecture is built from its real classes on the meta device, so parameters are counted and one
decoder tile is traced without memory for either. It runs nothing and knows no hardware: a slot
checks it before it loads, and `__main__.py` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

from mochi_app.engine.decode import plan_tiles
from mochi_app.engine.parallel import check_heads, mesh_shape, shares
from mochi_app.engine.plan.costs import (
    DTYPES,
    GB,
    SPACE,
    TERA,
    TEXT_ENCODER,
    TIME,
    TRANSFORMER,
    VAE,
    Sizes,
    Traffic,
    count_weights,
    decode_cost,
    rank_flops,
    rank_traffic,
    samples_of,
    step_activations,
    text_encoder_flops,
    transformer_flops,
    video_tokens,
)


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
        """Raise unless every field is valid.

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
        """Bytes at the worst moment: weights stay; steps and decoding never overlap."""
        return self.weights + self.reserve + max(self.step_activations, self.decode_activations)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for a setting. `text_flops` are those of all prompts, on rank 0."""

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
        """Operations of one step on the busiest GPU, for which all others wait."""
        return max(rank.flops for rank in self.ranks)

    @property
    def overhead(self) -> float:
        """Work of the busiest GPU times their number, over one process: 1 is a perfect split."""
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
        """One sentence: what the worst GPU needs, and what it has."""
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
    """Plan a setting, whether it fits or not.

    Raises:
        PlanError: the setting is invalid.
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
    """One GPU's share: cfg-major, as in `parallel.py`'s mesh. The text encoder is on rank 0."""
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

    Follows the rounds of `decode.py`: the first rank has the largest tile of each, and keeps the
    frames of all earlier rounds; the others keep none.
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
        PlanError: the setting is invalid.
        LayoutError: attention heads that cannot be split over so many GPUs.
    """
    plan = make_plan(setting, build_parts(model))
    if not plan.fits:
        raise FitError(plan.verdict())
    return plan

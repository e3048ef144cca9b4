"""Load the model into this rank according to its configuration."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch

from mochi_app.engine import checkpoint, speed
from mochi_app.engine.encode import EncodeError, Frames, save
from mochi_app.engine.gpu_memory import MemoryBudget
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import (
    Precision,
    choose_attention,
    choose_device,
    name_of,
    open_pipeline,
    quiet_libraries,
    warn_of_rounding,
)
from mochi_app.engine.pipeline import Engine
from mochi_app.engine.previews import LatentColours
from mochi_app.engine.progress import Emit
from mochi_app.engine.scratch import refused
from mochi_app.engine.speed import SpeedOptions
from mochi_app.errors import one_line
from mochi_app.messages import Configure, Loading

logger = logging.getLogger(__name__)


def load(config: Configure, emit: Emit) -> Engine:
    """Load the model that `config` names and try it on the smallest video, which is encoded into
    the scratch folder and removed: a slot is ready when it has made one.

    Raises:
        EncodeError, OSError: the smallest video cannot be encoded or written.
        LoadError: no such folder, no such device, or a model that yields no finite numbers.
        LayoutError: the model's attention heads cannot be split over the ranks.
    """
    device = choose_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    quiet_libraries()
    precision = Precision.choose(config, device)
    budget = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        budget = MemoryBudget(config, precision, memory)
        if config.rank == 0:
            budget.check_start()
    ranks = Ranks.join(config.rank, config.world_size, config.rendezvous, device)
    options = SpeedOptions.of(config)
    options.check(ranks)
    facts = checkpoint.of_configuration(config) | precision_facts(precision)
    place = device if options.offload == "none" else torch.device("cpu")
    pipe = open_pipeline(config.model, precision, place, text=ranks.first)
    if ranks.first:
        warn_of_rounding(Path(config.model).expanduser(), precision.transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()  # takes effect above 256 pixels a side only
    if config.attention != "native":
        choose_attention(pipe, config.attention)
    speed.apply(pipe, options, ranks)
    colours = LatentColours.read(Path(config.model) / "latent_rgb.json")
    loras = Path(config.lora_dir) if config.lora_dir else None
    exact = options.cache_threshold == 0  # a cache is state that checkpoints do not hold
    engine = Engine(pipe, colours, ranks, loras, budget, facts if exact else None)
    emit(Loading(what="warming up"))
    frames = engine.warm_up()
    if frames is not None:
        try_encoder(frames, Path(config.scratch))
    return engine


def try_encoder(frames: Frames, folder: Path) -> None:
    """Encode a video into the folder and remove it. An unusable folder is only logged: it is not
    this rank's fault.

    Raises:
        EncodeError, OSError: it cannot be encoded or written.
    """
    try:
        output = save(frames, folder, "warm-up", fps=1, prompt="warm-up", metadata={})
        (folder / output.video).unlink()
        (folder / output.poster).unlink()
    except (EncodeError, OSError) as error:
        if not refused(error, folder):
            raise
        logger.warning("the encoder could not be tried: %s", one_line(error))


def precision_facts(precision: Precision) -> dict[str, str]:
    """The parts' dtypes, for a checkpoint's stamp."""
    return {
        f"{item.name} type": name_of(getattr(precision, item.name)) for item in fields(precision)
    }

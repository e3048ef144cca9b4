"""Load a pipeline from a local folder: which device, which dtypes, which files.

Owns the steps from a folder to a `MochiPipeline` on its device. The folder exists before a rank
starts: `weights/` has downloaded it once for the whole machine. `pipeline.py` runs the pipeline.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel
from safetensors import safe_open
from transformers import T5EncoderModel

from mochi_app.messages import Configure
from mochi_app.weights.files import PartTypes, weight_files

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadError(RuntimeError):
    """The model cannot be loaded as configured. The message says what was given and expected."""


def choose_device(config: Configure) -> torch.device:
    """The device of this rank: the one GPU that it can see, or the CPU."""
    if config.device not in ("cpu", "cuda"):
        raise LoadError(f"device {config.device!r}: expected cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise LoadError(f"torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES {seen})")
    return torch.device(config.device)


@dataclass(frozen=True, slots=True)
class Precision:
    """The type of each part's weights and arithmetic."""

    transformer: torch.dtype
    text_encoder: torch.dtype
    vae: torch.dtype

    @classmethod
    def choose(cls, config: Configure, device: torch.device) -> Precision:
        """The choice of `PartTypes.choose` as torch dtypes."""
        types = PartTypes.choose(device.type, config.dtype, config.text_dtype, config.vae_dtype)
        return cls(
            **{name: dtype_named(getattr(types, name)) for name in PartTypes.__dataclass_fields__}
        )


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of that name: `float32` or `bfloat16`."""
    if name not in DTYPES:
        raise LoadError(f"dtype {name!r}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def choose_attention(pipe: MochiPipeline, name: str) -> None:
    """Set the attention backend, by its diffusers name, for all jobs of this process.

    Raises:
        LoadError: there is no such backend, or it cannot run here.
    """
    try:
        pipe.transformer.set_attention_backend(name)
    except (ValueError, ImportError, RuntimeError) as error:
        raise LoadError(f"attention {name!r}: {error}") from error


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name: `float32` or `bfloat16`."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def quiet_libraries() -> None:
    """Turn off progress bars, which progress events replace. Libraries' advice is logged at debug
    level in a rank (`logs.LibraryFilter`)."""
    # Mochi's rope asks for float32 under autocast, which a CPU uses anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def open_pipeline(
    model: str, precision: Precision, device: torch.device, *, text: bool = True
) -> MochiPipeline:
    """Load the pipeline in a folder, each part in its own dtype, its rotary frequencies in float32
    (as exact as the files store them, see `warn_of_rounding`).

    Weights go from the files to the device through accelerate, part by part, so host memory never
    holds a second copy. Without `text` the text encoder is not loaded.

    Raises:
        LoadError: `model` is not a pipeline folder.
    """
    folder = Path(model).expanduser()
    if not (folder / "model_index.json").is_file():
        raise LoadError(f"{model}: expected a MochiPipeline folder with a model_index.json")
    encoder = None
    if text:
        encoder = T5EncoderModel.from_pretrained(
            folder, **part_options(folder, "text_encoder", precision.text_encoder, device)
        )
    usual = MochiTransformer3DModel._keep_in_fp32_modules
    MochiTransformer3DModel._keep_in_fp32_modules = ["pos_frequencies"]
    try:
        transformer = MochiTransformer3DModel.from_pretrained(
            folder, **part_options(folder, "transformer", precision.transformer, device)
        )
    finally:
        MochiTransformer3DModel._keep_in_fp32_modules = usual
    vae = AutoencoderKLMochi.from_pretrained(
        folder, **part_options(folder, "vae", precision.vae, device)
    )
    parts: dict[str, Any] = {"text_encoder": encoder, "transformer": transformer, "vae": vae}
    if not text:
        parts["tokenizer"] = None
    return MochiPipeline.from_pretrained(folder, **parts)


def warn_of_rounding(folder: Path, dtype: torch.dtype) -> None:
    """Log a warning if the weight files for this dtype store the transformer's rotary frequencies
    in bfloat16: loaded into float32 they stay rounded. Reads headers only."""
    for name in chosen_files(folder, "transformer", dtype):
        path = folder / "transformer" / name
        if path.suffix == ".safetensors" and stored_type(path, "pos_frequencies") == "BF16":
            log.warning(
                "rotary frequencies: transformer/%s has them rounded to bfloat16, so frames differ "
                "a little from those that Mochi's authors get, who keep them in float32. To have "
                "them exact, let MOCHI_MODEL name a folder that has the transformer's float32 "
                "files and not its bf16 ones: the other weights are converted as they are read. "
                "MOCHI_DTYPE=float32 takes the float32 files, too, at twice the memory",
                name,
            )


def stored_type(path: Path, tensor: str) -> str:
    """A tensor's dtype in a safetensors file, such as `F32` or `BF16`; empty if it is not there."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return str(file.get_slice(tensor).get_dtype()) if tensor in names else ""


def chosen_files(folder: Path, part: str, dtype: torch.dtype) -> list[str]:
    """The weight files from which a part is loaded in this dtype."""
    names = [path.name for path in (folder / part).iterdir()]
    return weight_files(part, names, name_of(dtype))


def part_options(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments of `from_pretrained` for one part, with the file variant of its dtype."""
    small = any(".bf16" in file for file in chosen_files(folder, name, dtype))
    return {
        "subfolder": name,
        "dtype": dtype,
        "variant": "bf16" if small else None,
        "device_map": {"": device},
    }

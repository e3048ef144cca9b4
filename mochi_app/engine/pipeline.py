"""Load a MochiPipeline and run one request through it: text, denoise, decode.

Owns the model in this process and the exactness promise: the frames of a request are those of a
plain `MochiPipeline(...)` call with the same arguments and a CPU generator, bit for bit. It does
not own the process (`rank.py`) or files (`encode.py`).
"""

from __future__ import annotations

import base64
import gc
import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import MochiPipeline
from PIL import Image

from mochi_app.engine.encode import Frames
from mochi_app.engine.messages import Configure, Latent, Loading, Message, Run, Stage, Step

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PICTURE_SIDE = 160
PICTURE_SECONDS = 0.7

Emit = Callable[[Message], None]


class LoadError(RuntimeError):
    """The model cannot be loaded as configured. The message says what was given and expected."""


class Stopped(Exception):
    """Unwinds a run that was cancelled."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    `frames` is RGB, uint8, shape (F, H, W, 3). `seconds` has text, denoise and decode. The hashes
    are SHA-256: of the first latents as float32, and of the raw frames.
    """

    frames: Frames
    seconds: Mapping[str, float]
    latents_hash: str
    frames_hash: str


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """What the text encoder says: embeddings (1, L, D), masks (1, L).

    The negative ones are None without guidance.
    """

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None


def load(config: Configure, emit: Emit) -> Engine:
    """Load the model that `config` names, ready to run, and try it once on the smallest video.

    Raises:
        LoadError: no such folder, no such device, or a model that yields no finite numbers.
    """
    device = choose_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    quiet_libraries()
    pipe = open_pipeline(config.model, choose_dtype(config.dtype, device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()  # takes effect above 256 pixels a side only
    engine = Engine(pipe, LatentColours.read(Path(config.model) / "latent_rgb.json"))
    emit(Loading(what="warming up"))
    engine.warm_up()
    return engine


def choose_device(config: Configure) -> torch.device:
    """The device of this rank: the one GPU that it can see, or the CPU."""
    if config.device not in ("cpu", "cuda"):
        raise LoadError(f"device {config.device!r}: expected cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        raise LoadError(f"torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES {seen})")
    return torch.device(config.device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise LoadError(f"dtype {name!r}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def quiet_libraries() -> None:
    """Keep the log for what matters: no progress bars, which events stand for, and no advice."""
    # Mochi's rope asks for float32 under autocast, which on a CPU is what it has anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def open_pipeline(model: str, dtype: torch.dtype) -> MochiPipeline:
    """`MochiPipeline.from_pretrained` for a folder or a Hub id, bf16 files first for bfloat16.

    Raises:
        LoadError: `model` looks like a folder and is not one of a pipeline.
    """
    folder = Path(model).expanduser()
    local = folder.is_dir()
    if local or folder.is_absolute() or model.startswith("."):
        if not (folder / "model_index.json").is_file():
            raise LoadError(f"{model}: expected a MochiPipeline folder with a model_index.json")
        model = str(folder)
    variants: list[str | None] = [None]
    if dtype is torch.bfloat16 and (not local or any(folder.glob("*/*.bf16*.safetensors"))):
        variants = ["bf16", None]
    for variant in variants:
        try:
            return MochiPipeline.from_pretrained(model, dtype=dtype, variant=variant)
        except ValueError as error:
            if variant is None or "variant" not in str(error):
                raise
    raise AssertionError("the last variant returns or raises")


class Engine:
    """A loaded pipeline, running one request at a time."""

    def __init__(self, pipe: MochiPipeline, colours: LatentColours | None = None) -> None:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # a pipeline made by constructors still has dropout
        self._pipe = pipe
        self._colours = colours

    @property
    def device(self) -> str:
        """Name of the device, for people: `cpu`, or the GPU's product name."""
        device = self._pipe.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions that a result depends on."""
        libraries = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
        return {name: str(library.__version__) for name, library in libraries.items()}

    def warm_up(self) -> None:
        """Make the smallest video in two steps: a broken model shows now, not at the first job.

        Raises:
            ArithmeticError: the model yields infinities or NaN.
        """
        smallest = Run(
            job_id="warm-up", prompt="a", negative_prompt="", seed=0, num_inference_steps=2,
            guidance_scale=4.5, height=64, width=64, num_frames=7, fps=1,
        )  # fmt: skip
        self.run(smallest, emit=lambda message: None, cancelled=lambda: False)

    def run(self, request: Run, emit: Emit, cancelled: Callable[[], bool]) -> Result | None:
        """Make the frames of `request`; None if `cancelled` said so at a stage or step boundary.

        Whatever happens, the pipeline is left as it was: the next run's frames do not depend on
        this one.

        Raises:
            ArithmeticError: the model yielded infinities or NaN.
            RuntimeError: whatever torch raises, out of memory included.
        """
        clock = StageClock(request.job_id, emit, cancelled, self._synchronize)
        try:
            with torch.no_grad():
                with clock.stage("text"):
                    text = self._encode_text(request)
                with clock.stage("denoise"):
                    first = self._first_latents(request, text.prompt_embeds.dtype)
                    latents = self._denoise(request, text, first, emit, cancelled)
                with clock.stage("decode"):
                    frames = self._decode(latents)
        except Stopped:
            return None
        finally:
            self._reset()
        return Result(
            frames=frames,
            seconds=clock.seconds,
            latents_hash=sha256(first.float().cpu().numpy()),
            frames_hash=sha256(frames),
        )

    def free(self) -> None:
        """Give cached memory back, after a run that failed."""
        gc.collect()
        if self._pipe.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode_text(self, request: Run) -> TextEmbeddings:
        """Both prompts, one at a time as the pipeline does it; no negative one without guidance."""
        return TextEmbeddings(
            *self._pipe.encode_prompt(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                do_classifier_free_guidance=request.guidance_scale > 1.0,
                device=self._pipe._execution_device,
            )
        )

    def _first_latents(self, request: Run, dtype: torch.dtype) -> torch.Tensor:
        """Noise of shape (1, 12, (F-1)/6+1, H/8, W/8), drawn on the CPU.

        It depends on seed, size and frames only: not on the steps, and not on the device.
        """
        latents: torch.Tensor = self._pipe.prepare_latents(
            1,
            self._pipe.transformer.config.in_channels,
            request.height,
            request.width,
            request.num_frames,
            dtype,
            self._pipe._execution_device,
            torch.Generator("cpu").manual_seed(request.seed),
        )
        return latents

    def _denoise(
        self,
        request: Run,
        text: TextEmbeddings,
        first: torch.Tensor,
        emit: Emit,
        cancelled: Callable[[], bool],
    ) -> torch.Tensor:
        """All steps, from the first latents to the last, same shape."""
        watcher = StepWatcher(request, first, emit, cancelled, self._synchronize, self._colours)
        latents: torch.Tensor = self._pipe(
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            latents=first,
            prompt_embeds=text.prompt_embeds,
            prompt_attention_mask=text.prompt_attention_mask,
            negative_prompt_embeds=text.negative_prompt_embeds,
            negative_prompt_attention_mask=text.negative_prompt_attention_mask,
            output_type="latent",
            callback_on_step_end=watcher,
            callback_on_step_end_tensor_inputs=["latents"],
            return_dict=False,
        )[0]
        if not torch.isfinite(latents).all():
            raise ArithmeticError("the model yielded numbers that are not finite")
        return latents

    def _decode(self, latents: torch.Tensor) -> Frames:
        """Latents (1, 12, T, h, w) to RGB frames (6T-5, 8h, 8w, 3).

        The arithmetic of `MochiPipeline.__call__` after its loop, and of `VaeImageProcessor` after
        that, with the rounding to bytes done on the device: a quarter of the traffic to the host.
        """
        config = self._pipe.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
                for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        video = self._pipe.vae.decode(latents, return_dict=False)[0]
        video = self._pipe.video_processor.postprocess_video(video, output_type="pt")[0]
        pixels = (video.float() * 255).round().to(torch.uint8)  # F, 3, H, W
        frames: Frames = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return frames

    def _synchronize(self) -> None:
        """Wait for the device, so that a measured time is that of the work."""
        if self._pipe.device.type == "cuda":
            torch.cuda.synchronize(self._pipe.device)

    def _reset(self) -> None:
        """What the pipeline does at the end of a call that no exception left early."""
        self._pipe.maybe_free_model_hooks()
        self._pipe._interrupt = False
        self._pipe._current_timestep = None


class StageClock:
    """Announces stages, measures them in seconds, and stops the run between them if asked."""

    def __init__(
        self,
        job_id: str,
        emit: Emit,
        cancelled: Callable[[], bool],
        synchronize: Callable[[], None],
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._job_id = job_id
        self._emit = emit
        self._cancelled = cancelled
        self._synchronize = synchronize

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage, from its announcement to the end of its work on the device."""
        stop_if(self._cancelled)
        self._emit(Stage(job_id=self._job_id, stage=name))
        started = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[name] = time.perf_counter() - started


class StepWatcher:
    """The pipeline's step callback: reports progress, shows pictures, stops the run if asked."""

    def __init__(
        self,
        request: Run,
        first: torch.Tensor,
        emit: Emit,
        cancelled: Callable[[], bool],
        synchronize: Callable[[], None],
        colours: LatentColours | None,
    ) -> None:
        self._request = request
        self._emit = emit
        self._cancelled = cancelled
        self._synchronize = synchronize
        self._colours = colours
        self._before = middle(first)
        self._shown_at = -PICTURE_SECONDS
        self._started = time.perf_counter()

    def __call__(
        self, pipe: MochiPipeline, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """After step `index` (from 0)."""
        self._synchronize()
        now = time.perf_counter()
        job_id, step = self._request.job_id, index + 1
        self._emit(
            Step(
                job_id=job_id,
                step=step,
                steps=self._request.num_inference_steps,
                seconds=now - self._started,
            )
        )
        if self._colours is not None:
            after = middle(tensors["latents"])
            if now - self._shown_at >= PICTURE_SECONDS:
                self._shown_at = now
                sigmas = pipe.scheduler.sigmas[index : index + 2]
                clean = forecast(self._before, after, sigmas)
                image = self._colours.picture(clean, self._request.height, self._request.width)
                self._emit(Latent(job_id=job_id, step=step, image=image))
            self._before = after
        stop_if(self._cancelled)
        self._started = time.perf_counter()
        return tensors


@dataclass(frozen=True, slots=True)
class LatentColours:
    """A linear map from a latent cell to its colour, for pictures of a run that is under way.

    `factors` has shape (12, 3), `bias` (3,): RGB from 0 to 1 = latents · factors + bias.
    """

    factors: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def read(cls, path: Path) -> LatentColours | None:
        """The map beside the model; None if it has none.

        Raises:
            LoadError: the file is not such a map.
        """
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            factors, bias = torch.tensor(record["factors"]), torch.tensor(record["bias"])
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(f"{path}: {error}") from error
        if factors.shape == (3, 12):
            factors = factors.T
        if factors.shape != (12, 3) or bias.shape != (3,):
            shapes = f"{tuple(factors.shape)} and {tuple(bias.shape)}"
            raise LoadError(f"{path}: factors and bias of {shapes}, expected (12, 3) and (3,)")
        return cls(factors.float(), bias.float())

    def picture(self, latents: torch.Tensor, height: int, width: int) -> str:
        """One latent frame (12, h, w) as a WebP data URL, its longer side at most 160 pixels."""
        rgb = torch.einsum("chw,cd->hwd", latents, self.factors) + self.bias
        pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        scale = min(1.0, PICTURE_SIDE / max(height, width))
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, format="WEBP", quality=70, method=0)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def middle(latents: torch.Tensor) -> torch.Tensor:
    """The middle frame of latents (1, 12, T, h, w), as float32 (12, h, w) on the CPU."""
    return latents[0, :, latents.shape[2] // 2].detach().float().cpu().clone()


def forecast(before: torch.Tensor, after: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Where the last step points: its latents carried on along its velocity to sigma 1, no noise.

    Mochi's sigmas rise from 0 (noise) to 1 (video), and a step is Euler's:
    after = before + (sigmas[1] - sigmas[0]) · velocity.
    """
    here, there = (float(sigma) for sigma in sigmas)
    return after + (1 - there) / (there - here) * (after - before)


def stop_if(cancelled: Callable[[], bool]) -> None:
    """A boundary: unwind the run if it is cancelled."""
    if cancelled():
        raise Stopped


def sha256(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of the array's bytes in C order, as hex."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()

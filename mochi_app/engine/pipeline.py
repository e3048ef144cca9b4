"""Run one request through a loaded MochiPipeline: text, denoise, decode.

Owns the model in this process and the exactness promise: in float32 on one rank, the frames of a
request are bit-identical to those of a plain `MochiPipeline(...)` call with the same arguments and
a CPU generator. With bfloat16 weights it keeps in float32 what the model's authors do: the latents
between steps, the rotary frequencies (rounded if the weight files store them so), and the text
encoder unless configured otherwise. With several ranks all run the same code: the first encodes the
text and gets the frames, and what stops one stops all at the same boundary. It does not own the
process (`rank.py`), the prompts' embeddings (`text.py`), the layout of the transformer
(`parallel.py`) or files (`encode.py`).
"""

from __future__ import annotations

import gc
import hashlib
import logging
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

from mochi_app.engine import checkpoint, speed
from mochi_app.engine.checkpoint import CheckpointWriter
from mochi_app.engine.decode import decode
from mochi_app.engine.encode import Frames
from mochi_app.engine.gpu_memory import MemoryBudget
from mochi_app.engine.group import Ranks
from mochi_app.engine.lora import LoraCache
from mochi_app.engine.parallel import ParallelHandle, parallelize
from mochi_app.engine.previews import LatentColours
from mochi_app.engine.progress import (
    Contact,
    Emit,
    StageClock,
    Start,
    StepWatcher,
    Stopped,
    stop_if,
    unsaid,
)
from mochi_app.engine.schedule import SCHEDULES, MochiScheduler
from mochi_app.engine.text import TextEmbeddings, encode_text
from mochi_app.loras import LoraError
from mochi_app.messages import Resumed, Run, Tiles

logger = logging.getLogger(__name__)


class NotFinite(ArithmeticError):
    """The model yielded infinities or NaN. All ranks see the same latents, so all raise it."""

    settled = True


class TooLarge(ValueError):
    """The video does not fit the slot's GPUs. All ranks agree on this before any work."""

    settled = True


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    `frames` is RGB, uint8, shape (F, H, W, 3); None on ranks other than the first. `seconds` has
    text, denoise and decode. The hashes are SHA-256: of the first latents as float32, and of the
    raw frames (empty without any).
    """

    frames: Frames | None
    seconds: Mapping[str, float]
    latents_hash: str
    frames_hash: str


class Engine:
    """A loaded pipeline, running one request at a time, on this rank and its peers.

    `facts` is what the latents depend on besides the request and the layout: part of each
    checkpoint's stamp. Without it no run writes checkpoints or resumes from one.
    """

    def __init__(
        self,
        pipe: MochiPipeline,
        colours: LatentColours | None = None,
        ranks: Ranks | None = None,
        loras: Path | None = None,
        budget: MemoryBudget | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # a pipeline built by constructors still has dropout
        self._pipe = pipe
        self._colours = colours
        self._ranks = ranks or Ranks()
        pipe.scheduler = MochiScheduler.from_config(pipe.scheduler.config)
        self._loras = LoraCache(pipe, loras)
        self._budget = budget
        self._facts = facts
        self._parallel: ParallelHandle | None = None
        self._shape = (0, 0)
        for guided in (False, True):
            self._spread(guided)  # a model that cannot be spread fails now

    def _spread(self, guided: bool) -> None:
        """Spread the transformer over the ranks for a run with or without guidance."""
        heads = self._pipe.transformer.config.num_attention_heads
        shape = self._ranks.shape_for(guided, heads)
        if shape == self._shape:
            return
        if self._parallel is not None:
            self._parallel.remove()
            self._parallel = None
        self._parallel = parallelize(self._pipe.transformer, self._ranks.mesh(shape))
        self._shape = shape

    @property
    def device(self) -> str:
        """Name of the device, for people: `cpu`, or the GPU's product name."""
        device = self._ranks.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions that a result depends on."""
        libraries = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
        return {name: str(library.__version__) for name, library in libraries.items()}

    def warm_up(self) -> Frames | None:
        """Make the smallest video in two steps, with and without guidance: a broken model fails
        now, and no job pays for what is compiled or connected on first use.

        Returns its frames, as `Result.frames`.

        Raises:
            ArithmeticError: the model yields infinities or NaN.
        """
        for guidance_scale in (1.0, 4.5):
            smallest = Run(
                job_id="warm-up", prompt="a", negative_prompt="", seed=0, num_inference_steps=2,
                guidance_scale=guidance_scale, height=64, width=64, num_frames=7, fps=1,
            )  # fmt: skip
            result = self.run(smallest, emit=unsaid, cancelled=lambda: False)
        return result.frames if result else None

    def run(self, request: Run, emit: Emit, cancelled: Callable[[], bool]) -> Result | None:
        """Make the frames of `request`; None if `cancelled` was true at a stage or step boundary,
        here or on another rank.

        However a run ends, the pipeline is left as it was: the next run's frames do not depend on
        this one.

        Raises:
            TooLarge: according to the plan the video does not fit the GPUs.
            NotFinite: the model yielded infinities or NaN.
            LoraError: the LoRA does not fit the model, or cannot be read on some rank.
            RuntimeError: whatever torch raises, out of memory included.
        """
        ranks = self._ranks

        def stopped() -> bool:
            return ranks.agree(cancelled())

        contact = Contact(emit if ranks.first else unsaid, stopped, self._synchronize)
        clock = StageClock(request.job_id, contact)
        self._require_memory(request)
        self._spread(request.guidance_scale > 1.0)
        try:
            with torch.no_grad():
                with clock.stage("text"):
                    text = encode_text(self._pipe, self._ranks, request)
                with clock.stage("denoise"), self._with_lora(request) as lora_file:
                    first = self._first_latents(request)
                    checkpoints = self._checkpoints(request, lora_file)
                    start = self._start(request, first, checkpoints, contact.emit)
                    watcher = StepWatcher(request, start, contact, self._colours, checkpoints)
                    latents = self._denoise(request, text, start, watcher)
                with clock.stage("decode"):
                    frames = self._decode(latents, request, contact.emit, stopped)
        except Stopped:
            return None
        finally:
            self._reset()
        return Result(
            frames=frames,
            seconds=clock.seconds,
            latents_hash=sha256(first.float().cpu().numpy()),
            frames_hash="" if frames is None else sha256(frames),
        )

    def _require_memory(self, request: Run) -> None:
        """Refuse what would run out of memory midway, where the ranks would lose each other."""
        if self._budget is None:
            return
        problem = self._budget.problem(request.height, request.width, request.num_frames)
        if self._ranks.agree(bool(problem)):
            size = f"{request.width}x{request.height} pixels, {request.num_frames} frames"
            raise TooLarge(f"{size}: {problem or 'another GPU of the slot has less memory'}")

    def free(self) -> None:
        """Release cached memory after a failed run."""
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _with_lora(self, request: Run) -> Iterator[tuple[int, int] | None]:
        """Enable the LoRA that the request names, on all ranks or on none; yields its file as
        `LoraCache.file_of` does."""
        if request.lora is None:
            yield None
            return
        adapter, problem = "", None
        try:
            adapter = self._loras.load(request.lora)
        except LoraError as error:
            problem = error
        if self._ranks.agree(problem is not None):
            raise problem or LoraError(f"LoRA {request.lora!r}: another rank cannot read it")
        with self._loras.active(adapter, request.lora_scale):
            yield self._loras.file_of(adapter)

    def _first_latents(self, request: Run) -> torch.Tensor:
        """Noise of shape (1, 12, (F-1)/6+1, H/8, W/8) in float32, drawn on the CPU.

        It depends on seed, size and frames only: not on the steps, the device or the weights' type.
        """
        latents: torch.Tensor = self._pipe.prepare_latents(
            1,
            self._pipe.transformer.config.in_channels,
            request.height,
            request.width,
            request.num_frames,
            torch.float32,
            self._pipe._execution_device,
            torch.Generator("cpu").manual_seed(request.seed),
        )
        return latents

    def _checkpoints(
        self, request: Run, lora_file: tuple[int, int] | None
    ) -> CheckpointWriter | None:
        """The run's checkpoint writer; None if it has none, or on ranks other than the first."""
        if not self._keeps(request) or not self._ranks.first:
            return None
        stamp = {
            **(self._facts or {}),
            **checkpoint.of_request(request),
            **self.versions,
            "layout": self._shape,
            "device": self.device,
            "processor": processor(self._ranks.device),
            "lora_file": lora_file,
        }
        return CheckpointWriter(Path(request.checkpoint), request.checkpoint_steps, stamp)

    def _keeps(self, request: Run) -> bool:
        """Whether the run has checkpoints: the same answer on all ranks."""
        return bool(request.checkpoint and request.checkpoint_steps and self._facts is not None)

    def _start(
        self, request: Run, first: torch.Tensor, checkpoints: CheckpointWriter | None, emit: Emit
    ) -> Start:
        """Where to begin: at the first latents, or at the first rank's checkpoint."""
        if not self._keeps(request):
            return Start(0, first)
        found = checkpoints.resume(tuple(first.shape)) if checkpoints else None
        step = torch.tensor([found.step if found else 0])
        self._ranks.share([step])
        if not step:
            return Start(0, first)
        latents = torch.from_numpy(found.latents).to(first) if found else torch.empty_like(first)
        self._ranks.share([latents])
        emit(Resumed(job_id=request.job_id, step=int(step)))
        logger.info("job %s: goes on after step %d", request.job_id, int(step))
        return Start(int(step), latents)

    def _denoise(
        self, request: Run, text: TextEmbeddings, start: Start, watcher: StepWatcher
    ) -> torch.Tensor:
        """Run all steps from `start` on; returns the last latents, same shape."""
        try:
            with self._pipe.scheduler.planned(SCHEDULES[request.schedule], start.step):
                latents = self._steps(request, text, start.latents, watcher)
        finally:
            watcher.settle()
        if not torch.isfinite(latents).all():
            raise NotFinite("the model yielded numbers that are not finite")
        return latents

    def _steps(
        self, request: Run, text: TextEmbeddings, begin: torch.Tensor, watcher: StepWatcher
    ) -> torch.Tensor:
        """The pipeline's own loop, from latents to latents."""
        latents: torch.Tensor = self._pipe(
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            latents=begin,
            prompt_embeds=text.prompt_embeds,
            prompt_attention_mask=text.prompt_attention_mask,
            negative_prompt_embeds=text.negative_prompt_embeds,
            negative_prompt_attention_mask=text.negative_prompt_attention_mask,
            output_type="latent",
            callback_on_step_end=watcher,
            callback_on_step_end_tensor_inputs=["latents"],
            return_dict=False,
        )[0]
        return latents

    def _decode(
        self,
        latents: torch.Tensor,
        request: Run,
        emit: Emit,
        cancelled: Callable[[], bool],
    ) -> Frames | None:
        """Latents (1, 12, T, h, w) to RGB frames (6T-5, 8h, 8w, 3), all ranks decoding tiles.

        None on ranks other than the first. The arithmetic is that of `MochiPipeline.__call__` after
        its loop, then of `VaeImageProcessor`, with the rounding to bytes done on the device: a
        quarter of the traffic to the host.
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

        def between(done: int, total: int) -> None:
            if done:  # on a GPU the decoding may only be queued so far
                self._synchronize()
            emit(Tiles(job_id=request.job_id, done=done, total=total))
            if 0 < done < total:
                stop_if(cancelled)

        video = decode(self._pipe.vae, latents.to(self._pipe.vae.dtype), self._ranks.group, between)
        if video is None:
            return None
        video = self._pipe.video_processor.postprocess_video(video, output_type="pt")[0]
        pixels = (video.float() * 255).round().to(torch.uint8)  # F, 3, H, W
        frames: Frames = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return frames

    def _synchronize(self) -> None:
        """Wait for the device, so that a measured time is that of the work."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)

    def _reset(self) -> None:
        """Do what the pipeline does at the end of a call, also after an exception."""
        speed.reset(self._pipe)
        self._pipe._interrupt = False
        self._pipe._current_timestep = None


def processor(device: torch.device) -> list[Any]:
    """What a CPU's results depend on: its vector unit and the number of threads; [] on a GPU."""
    if device.type != "cpu":
        return []
    return [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def sha256(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of the array's bytes in C order, as hex."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()

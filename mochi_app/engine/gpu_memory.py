"""How much memory a GPU has left for the model and its work."""

from __future__ import annotations

from dataclasses import dataclass

from mochi_app.engine.loading import LoadError, Precision, name_of
from mochi_app.engine.plan import fit
from mochi_app.messages import Configure


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What fits a slot's GPUs according to the plan. `memory` is one GPU's, in bytes."""

    config: Configure
    precision: Precision
    memory: int

    @property
    def known(self) -> bool:
        """Whether the plan applies: not to offloaded or quantised weights, or without a size."""
        usual = (self.config.offload, self.config.quantization) == ("none", "none")
        return usual and self.config.height > 0

    def check_start(self) -> None:
        """Check the default video before anything is loaded.

        Raises:
            LoadError: it does not fit; the message has the plan's figures.
        """
        config = self.config
        if problem := self._problem(config.height, config.width, config.num_frames):
            advice = "more GPUs a slot, MOCHI_TEXT_DTYPE=bfloat16 or MOCHI_OFFLOAD=model may help"
            raise LoadError(f"{problem}; {advice}")

    def problem(self, height: int, width: int, num_frames: int) -> str:
        """Why a video does not fit this slot; empty if it does. One that is no larger than the
        default in any dimension fits, since the slot has started. More frames of fewer pixels may
        not, because decoding needs memory in proportion to frames and tile area."""
        usual = (self.config.height, self.config.width, self.config.num_frames)
        size = (height, width, num_frames)
        if all(asked <= default for asked, default in zip(size, usual, strict=True)):
            return ""
        return self._problem(height, width, num_frames)

    def _problem(self, height: int, width: int, num_frames: int) -> str:
        if not self.known:
            return ""
        setting = fit.Setting(
            gpus=self.config.world_size,
            gpu_memory=self.memory / 1e9,
            height=height,
            width=width,
            num_frames=num_frames,
            dtype=name_of(self.precision.transformer),
            t5_dtype=name_of(self.precision.text_encoder),
            vae_dtype=name_of(self.precision.vae),
        )
        try:
            fit.check_fit(setting, self.config.model)
        except fit.FitError as error:
            return str(error)
        return ""

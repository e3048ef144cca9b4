"""Live pictures of a running job: latents to colours, a forecast of the result."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mochi_app.engine.loading import LoadError

PICTURE_SIDE = 160
PICTURE_SECONDS = 0.7


@dataclass(frozen=True, slots=True)
class LatentColours:
    """A linear map from a latent cell to its colour, for pictures of a running job.

    `factors` has shape (12, 3), `bias` (3,): RGB from 0 to 1 = latents · factors + bias.
    """

    factors: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def read(cls, path: Path) -> LatentColours | None:
        """Read the map that comes with the model; None if there is none.

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
    """Where the last step points: its latents extrapolated along its velocity to sigma 1, no noise.

    Mochi's sigmas rise from 0 (noise) to 1 (video), and a step is Euler's:
    after = before + (sigmas[1] - sigmas[0]) · velocity.
    """
    here, there = (float(sigma) for sigma in sigmas)
    return after + (1 - there) / (there - here) * (after - before)

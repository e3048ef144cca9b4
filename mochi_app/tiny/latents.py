"""The meaning of the embedded model's latents, fixed before any training.

One latent cell covers 8x8 pixels of 6 frames (the first cell in time: the first frame alone). Its
12 channels are four inner products of the block with an orthonormal basis, each for red, green and
blue: the mean, and the first-order ramps along x, y and t. So an edge's place, direction and speed
inside a block are all in the cell, the mean colour can be read off for live previews, and the
transformer can be trained on rendered videos without an encoder. `write_encoder` writes exactly
this map into the weights of `AutoencoderKLMochi`'s encoder; none of it is learned.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLMochi

SPATIAL = 8
TEMPORAL = 6
CHANNELS = 12
LATENTS_MEAN = (0.17, -0.11, -0.13, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
LATENTS_STD = (0.68, 0.58, 0.65) + (0.12,) * 9
_REFERENCE = 32.0


def ramp(length: int) -> torch.Tensor:
    """Linear ramp over `length` samples with mean 0 and mean square 1."""
    values = torch.arange(length, dtype=torch.float64) - (length - 1) / 2
    return values / values.square().mean().sqrt()


def basis() -> torch.Tensor:
    """The four functionals over a block, shape (4, 6, 8, 8), to be averaged against it."""
    ones_t, ones_s = torch.ones(TEMPORAL), torch.ones(SPATIAL)
    return torch.stack(
        [
            torch.einsum("t,y,x->tyx", ones_t, ones_s, ones_s),
            torch.einsum("t,y,x->tyx", ones_t, ones_s, ramp(SPATIAL).float()),
            torch.einsum("t,y,x->tyx", ones_t, ramp(SPATIAL).float(), ones_s),
            torch.einsum("t,y,x->tyx", ramp(TEMPORAL).float(), ones_s, ones_s),
        ]
    )


def block_moments(planes: torch.Tensor) -> torch.Tensor:
    """Four moments of each block: (..., T, H, W) with T = 6k+1 to (..., 4, k+1, H/8, W/8).

    The first frame stands for a whole block, as the causal encoder's replicated padding makes it.
    """
    first = planes[..., :1, :, :].expand(*planes.shape[:-3], TEMPORAL - 1, *planes.shape[-2:])
    padded = torch.cat([first, planes], dim=-3)
    *lead, frames, height, width = padded.shape
    blocks = padded.reshape(
        *lead,
        frames // TEMPORAL,
        TEMPORAL,
        height // SPATIAL,
        SPATIAL,
        width // SPATIAL,
        SPATIAL,
    )
    weights = basis().to(planes.dtype) / (TEMPORAL * SPATIAL * SPATIAL)
    return torch.einsum("...atbycx,ftyx->...fabc", blocks, weights)


def analytic_latents(video: torch.Tensor) -> torch.Tensor:
    """Videos in [-1, 1] (B, 3, T, H, W) to latents (B, 12, (T-1)/6+1, H/8, W/8), not normalised."""
    moments = block_moments(video)  # B, 3, 4, t, h, w
    return moments.transpose(1, 2).flatten(1, 2)


def normalise(latents: torch.Tensor) -> torch.Tensor:
    """What the transformer sees: shape (B, 12, ...) with about zero mean and unit spread."""
    return (latents - _statistics(LATENTS_MEAN)) / _statistics(LATENTS_STD)


def denormalise(latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalise`, as the pipeline does it before decoding."""
    return latents * _statistics(LATENTS_STD) + _statistics(LATENTS_MEAN)


def _statistics(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(1, CHANNELS, 1, 1, 1)


def latent_to_rgb() -> dict[str, list[list[float]] | list[float]]:
    """Exact linear map from a normalised latent cell to its mean colour in [0, 1].

    `rgb = factors @ latent + bias`: factors has shape (3, 12), bias (3,).
    """
    factors = [[0.0] * CHANNELS for _ in range(3)]
    for color in range(3):
        factors[color][color] = LATENTS_STD[color] / 2
    return {"factors": factors, "bias": [(LATENTS_MEAN[c] + 1) / 2 for c in range(3)]}


def write_encoder(vae: AutoencoderKLMochi) -> None:
    """Write `analytic_latents` into the encoder's weights, in place.

    The strided convolutions rearrange 4x4x2 blocks losslessly into channels and then take the
    inner products. The last group norm would lose their scale, so each of its groups of four
    channels holds (a, -a, K, -K) with a constant K far above a: the group's deviation is then K /
    sqrt(2) to within one part in a thousand. And silu(a) - silu(-a) = a exactly, so the last
    activation has no effect.
    """
    encoder = vae.encoder
    with torch.no_grad():
        for parameter in (encoder.proj_in.weight, encoder.proj_in.bias, encoder.proj_out.weight):
            parameter.zero_()
        for color in range(3):  # the Fourier features of the input stay unused
            encoder.proj_in.weight[color, color] = 1.0
        _write_rearrangement(encoder.down_blocks[0].conv_in.conv, channels=3)
        _write_rearrangement(encoder.down_blocks[1].conv_in.conv, channels=12)
        _write_moments(encoder.down_blocks[2].conv_in.conv)
        for block in (*encoder.down_blocks, encoder.block_out):
            for resnet in block.resnets:
                resnet.conv2.conv.weight.zero_()
                resnet.conv2.conv.bias.zero_()
        encoder.norm_out.norm_layer.weight.fill_(1.0)
        encoder.norm_out.norm_layer.bias.zero_()
        scale = _REFERENCE / math.sqrt(2)
        constant = torch.nn.functional.silu(torch.tensor(math.sqrt(2))).item()
        for channel in range(CHANNELS):
            encoder.proj_out.weight[channel, 4 * channel] = scale
            encoder.proj_out.weight[channel, 4 * channel + 1] = -scale
            encoder.proj_out.weight[CHANNELS + channel, 4 * channel + 2] = -14.0 / constant


def _write_rearrangement(conv: torch.nn.Conv3d, channels: int) -> None:
    """Space and time to depth: output ((t, y, x), channel) is one input sample."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    times, rows, columns = conv.kernel_size
    for t in range(times):
        for y in range(rows):
            for x in range(columns):
                place = (t * rows + y) * columns + x
                for channel in range(channels):
                    conv.weight[place * channels + channel, channel, t, y, x] = 1.0


def _write_moments(conv: torch.nn.Conv3d) -> None:
    """Inner products of the last 3x2x2 group of rearranged channels with the block's basis."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    # index order of the two rearrangements below: (t2, y2, x2, (t1, y1, x1, (y0, x0, color)))
    weights = basis() / (TEMPORAL * SPATIAL * SPATIAL)
    parts = weights.reshape(4, 3, 2, 2, 2, 2, 2, 2, 2)  # f, t2, t1, y2, y1, y0, x2, x1, x0
    parts = parts.permute(0, 1, 3, 6, 2, 4, 7, 5, 8).reshape(4, 3, 2, 2, 32)
    for moment in range(4):
        for color in range(3):
            channel = 4 * (moment * 3 + color)
            plane = parts[moment].permute(3, 0, 1, 2)  # 32 samples, t2, y2, x2
            conv.weight[channel, color:96:3] = plane
            conv.weight[channel + 1, color:96:3] = -plane
    for group in range(32):
        conv.bias[4 * group + 2] = _REFERENCE
        conv.bias[4 * group + 3] = -_REFERENCE

"""Encode a request's prompts on the first rank and broadcast the embeddings to the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import MochiPipeline

from mochi_app.engine.group import Ranks
from mochi_app.messages import Run


@dataclass(frozen=True, slots=True)
class TextEmbeddings:
    """The text encoder's output, in float32: embeddings (1, L, D), masks (1, L).

    The negative ones are None without guidance.
    """

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None


def encode_text(pipe: MochiPipeline, ranks: Ranks, request: Run) -> TextEmbeddings:
    """Encode both prompts, one at a time as the pipeline does; no negative one without guidance.

    The first rank encodes them, the others receive the result.
    """
    guided = request.guidance_scale > 1.0
    device = pipe._execution_device
    if ranks.first:
        parts = pipe.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            do_classifier_free_guidance=guided,
            device=device,
        )
        parts = [part if part is None or part.dtype is torch.bool else part.float()
                 for part in parts]  # fmt: skip
    else:
        config = pipe.transformer.config
        shape = (1, config.max_sequence_length, config.text_embed_dim)
        embeds = [torch.empty(shape, device=device) for _ in range(2)]
        masks = [torch.empty(shape[:2], dtype=torch.bool, device=device) for _ in range(2)]
        parts = [embeds[0], masks[0], embeds[1], masks[1]] if guided else [
            embeds[0], masks[0], None, None]  # fmt: skip
    ranks.share([part for part in parts if part is not None])
    return TextEmbeddings(*parts)

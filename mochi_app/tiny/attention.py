"""Mochi's joint attention for training: the whole batch in one masked call.

The stock processor loops over samples and strips each one's padding, which takes most of the time
of a small model. Here padded text is masked instead; `tests/tiny/test_model.py` compares the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel
from diffusers.models.attention_processor import MochiAttention


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of pairs: x (B, N, heads, width), cos and sin (N, heads, width / 2)."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class BatchedAttention:
    """Drop-in for `MochiAttnProcessor2_0`."""

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens (B, N, C) and text tokens (B, L, D), mask (B, L), attend to each other."""
        heads = (attn.heads, -1)
        cos, sin = image_rotary_emb
        query = rotate(attn.norm_q(attn.to_q(hidden_states).unflatten(2, heads)), cos, sin)
        key = rotate(attn.norm_k(attn.to_k(hidden_states).unflatten(2, heads)), cos, sin)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        text_query = attn.norm_added_q(attn.add_q_proj(encoder_hidden_states).unflatten(2, heads))
        text_key = attn.norm_added_k(attn.add_k_proj(encoder_hidden_states).unflatten(2, heads))
        text_value = attn.add_v_proj(encoder_hidden_states).unflatten(2, heads)
        visible = F.pad(attention_mask.bool(), (query.shape[1], 0), value=True)[:, None, None, :]
        query, key, value = (
            torch.cat([ours, theirs.to(ours.dtype)], dim=1).transpose(1, 2).float()
            for ours, theirs in ((query, text_query), (key, text_key), (value, text_value))
        )
        with torch.autocast("cpu", enabled=False):  # its backward is three times slower in bfloat16
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        mixed = mixed.transpose(1, 2).flatten(2, 3)
        sizes = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        visual, text = torch.split(mixed, sizes, dim=1)
        visual = attn.to_out[0](visual)
        return visual, text if attn.context_pre_only else attn.to_add_out(text)


def use_batched_attention(transformer: MochiTransformer3DModel) -> None:
    """Switch every block to the batched processor, in place; weights and results do not change."""
    for block in transformer.transformer_blocks:
        block.attn1.processor = BatchedAttention()

"""Mochi's transformer over several ranks: the CFG pair on one mesh axis, the video on the other.

Owns the layout and its communication. Along "sp" each rank keeps a part of the visual tokens and
all text tokens; inside joint attention it owns a part of the heads instead, for all tokens (an
all-to-all before and after, and an all-gather of the text's result where a later block reads it).
Along "cfg" each rank keeps one sample of the (uncond, cond) pair. Inputs and output of the
transformer are whole on every rank, so pipeline, scheduler and LoRA are unaware of the split.

The split uses torch's own module hooks, outside diffusers' HookRegistry, so caches can be enabled
and disabled in any order. It does not own the process group (`group.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig, MochiTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

CFG, SP = "cfg", "sp"
INPUTS = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
LEADER_HOOK = "fbc_leader_block_hook"
CONDITIONING = re.compile(
    r"timestep_embedder\.|pooler\.to_(q|out)(\.|$)|norm1(_context)?\.linear|norm_out\.linear"
)

Decision = Callable[[torch.Tensor], bool]


class LayoutError(ValueError):
    """A mesh that this transformer, or this batch, cannot be spread over."""


def mesh_shape(ranks: int, guided: bool = True) -> tuple[int, int]:
    """Ranks along (cfg, sp): the CFG pair first, because it hardly communicates.

    With an odd number of ranks, or without guidance, nothing is split along cfg.
    """
    return (2, ranks // 2) if guided and ranks % 2 == 0 else (1, ranks)


def check_heads(heads: int, sp: int) -> None:
    """Raise unless the attention heads can be split over `sp` ranks.

    Raises:
        LayoutError: `heads` is not a multiple of `sp`.
    """
    if heads % sp:
        possible = [number for number in range(1, heads + 1) if heads % number == 0]
        raise LayoutError(
            f"{heads} attention heads cannot be split over {sp} ranks; possible: "
            + ", ".join(map(str, possible))
        )


def shares(total: int, parts: int) -> list[int]:
    """Sizes of `parts` consecutive shares of `total` that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass
class Axis:
    """One mesh axis as this rank sees it. `sent` counts the bytes that it sent to others."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sent: int = 0

    @classmethod
    def of(cls, mesh: DeviceMesh | None, name: str) -> Axis:
        """The axis of that name; of size 1 without a mesh."""
        if mesh is None:
            return cls()
        part = mesh[name]
        return cls(part.size(), part.get_local_rank(), part.get_group())

    def own(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's share of `tensor` along `dim`."""
        sizes = shares(tensor.shape[dim], self.size)
        return tensor.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])

    def gather(self, tensor: torch.Tensor, dim: int, total: int) -> torch.Tensor:
        """All shares side by side along `dim`, where they add up to `total`."""
        sizes = shares(total, self.size)
        moved = tensor.movedim(dim, 0)
        padded = moved.new_zeros((sizes[0], *moved.shape[1:]))
        padded[: len(moved)] = moved
        gathered = padded.new_empty((self.size, *padded.shape))
        dist.all_gather_single(gathered.flatten(0, 1), padded, group=self.group)
        self._count(padded.numel() * (self.size - 1), padded)
        parts = [gathered[part, :size] for part, size in enumerate(sizes)]
        return torch.cat(parts).movedim(0, dim)

    def exchange(self, parts: Sequence[torch.Tensor], shapes: Sequence[Any]) -> list[torch.Tensor]:
        """All-to-all: `parts[r]` goes to rank r; what comes from rank r has shape `shapes[r]`."""
        outgoing = torch.cat([part.reshape(-1) for part in parts])
        lengths = [torch.Size(shape).numel() for shape in shapes]
        incoming = outgoing.new_empty(sum(lengths))
        dist.all_to_all_single(
            incoming, outgoing, lengths, [part.numel() for part in parts], group=self.group
        )
        self._count(outgoing.numel() - parts[self.rank].numel(), outgoing)
        pieces = torch.split(incoming, lengths)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _count(self, elements: int, tensor: torch.Tensor) -> None:
        self.sent += elements * tensor.element_size()


@dataclass
class Layout:
    """What hooks and processors share during one forward pass.

    `tokens` is the number of visual tokens in the whole video; `valid` holds, for each sample of
    this rank, the indices of its valid text tokens.
    """

    cfg: Axis = field(default_factory=Axis)
    sp: Axis = field(default_factory=Axis)
    tokens: int = 0
    split_batch: bool = False
    batch: int = 0
    valid: list[torch.Tensor] = field(default_factory=list)


class JointAttention:
    """Mochi's attention processor, through diffusers' dispatcher and over the "sp" axis.

    On one rank it computes what `MochiAttnProcessor2_0` does, bit for bit.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens (B, own tokens, C) and text (B, L, C') to the same shapes.

        Where the block discards the text's result, the text is returned unchanged.
        """
        visual = project(
            hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), attn.heads
        )
        text = project(
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
            attn.heads,
        )
        if image_rotary_emb is not None:
            visual = [rotate(part, *image_rotary_emb) for part in visual[:2]] + visual[2:]
        if self._layout.sp.size > 1:
            visual, text = self._to_heads(visual), [self._layout.sp.own(part, 2) for part in text]
        outputs = [self._attend(visual, text, index) for index in range(len(hidden_states))]
        visual_out = torch.cat([output[:, : visual[0].shape[1]] for output in outputs])
        if self._layout.sp.size > 1:
            visual_out = self._to_tokens(visual_out)
        hidden_states = attn.to_out[1](attn.to_out[0](visual_out.flatten(2, 3)))
        if hasattr(attn, "to_add_out"):
            text_out = torch.cat([output[:, visual[0].shape[1] :] for output in outputs])
            if self._layout.sp.size > 1:
                text_out = self._layout.sp.gather(text_out, 2, attn.heads)
            encoder_hidden_states = attn.to_add_out(text_out.flatten(2, 3))
        return hidden_states, encoder_hidden_states

    def _attend(
        self, visual: Sequence[torch.Tensor], text: Sequence[torch.Tensor], index: int
    ) -> torch.Tensor:
        """Attention of one sample over its valid text tokens only: no mask, so any kernel works.

        Returns (1, tokens + L, heads, D), zero-padded at the end for the invalid text tokens.
        """
        sample = slice(index, index + 1)
        valid = self._layout.valid[index]
        query, key, value = (
            torch.cat([visual_part[sample], text_part[sample, valid]], dim=1)
            for visual_part, text_part in zip(visual, text, strict=True)
        )
        output = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        missing = text[0].shape[1] - len(valid)
        return torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing))

    def _to_heads(self, visual: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(B, own tokens, all heads, D) each to (B, all tokens, own heads, D)."""
        sp = self._layout.sp
        packed = torch.stack(list(visual))
        kinds, batch, _, heads, width = packed.shape
        shapes = [
            (kinds, batch, tokens, heads // sp.size, width)
            for tokens in shares(self._layout.tokens, sp.size)
        ]
        return list(torch.cat(sp.exchange(packed.chunk(sp.size, dim=3), shapes), dim=2))

    def _to_tokens(self, visual: torch.Tensor) -> torch.Tensor:
        """(B, all tokens, own heads, D) to (B, own tokens, all heads, D)."""
        sp = self._layout.sp
        sizes = shares(self._layout.tokens, sp.size)
        batch, _, heads, width = visual.shape
        shapes = [(batch, sizes[sp.rank], heads, width)] * sp.size
        return torch.cat(sp.exchange(torch.split(visual, sizes, dim=1), shapes), dim=2)


def project(
    states: torch.Tensor, linears: Sequence[Any], norms: Sequence[Any], heads: int
) -> list[torch.Tensor]:
    """Query, key and value of (B, S, C), each (B, S, heads, D); the first two are normalised."""
    query, key, value = (linear(states).unflatten(2, (heads, -1)) for linear in linears)
    return [norms[0](query), norms[1](key), value]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, S, heads, D) in float32, by angles (S, heads, D/2)."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


class ParallelHandle:
    """A transformer that runs over a mesh until `remove()`."""

    def __init__(self, transformer: MochiTransformer3DModel, mesh: DeviceMesh | None) -> None:
        self._transformer = transformer
        self.layout = Layout(Axis.of(mesh, CFG), Axis.of(mesh, SP))
        check_heads(transformer.config.num_attention_heads, self.layout.sp.size)
        if mesh is not None and is_parallel(transformer):
            raise RuntimeError("the transformer lies on a mesh already: remove() its handle first")
        self._processors = [block.attn1.processor for block in transformer.transformer_blocks]
        for block in transformer.transformer_blocks:
            block.attn1.processor = JointAttention(self.layout)
        first = transformer.transformer_blocks[0]
        self._hooks: list[RemovableHandle] = [
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            transformer.register_forward_hook(self._leave),
            transformer.rope.register_forward_hook(self._own_angles),
            first.register_forward_pre_hook(self._own_tokens, with_kwargs=True),
            transformer.proj_out.register_forward_hook(self._all_tokens),
        ]
        if self.layout.cfg.size > 1:
            for linear in conditioning_linears(transformer):
                self._hooks.append(linear.register_forward_pre_hook(self._whole_batch))
                self._hooks.append(linear.register_forward_hook(self._own_samples))

    def remove(self) -> None:
        """Undo everything: hooks and processors are as they were before. Safe to repeat."""
        for hook in self._hooks:
            hook.remove()
        blocks = self._transformer.transformer_blocks
        for block, processor in zip(blocks, self._processors, strict=False):
            block.attn1.processor = processor
        self._hooks, self._processors = [], []

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to others so far, in bytes of tensors."""
        return self.layout.cfg.sent + self.layout.sp.sent

    def _enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep this rank's samples, in the weights' dtype, and record what the pass needs."""
        inputs = dict(zip((*INPUTS, "attention_kwargs"), args, strict=False)) | kwargs
        layout = self.layout
        layout.batch = len(inputs["hidden_states"])
        layout.split_batch = layout.cfg.size > 1 and layout.batch > 1
        if layout.split_batch:
            if layout.batch % layout.cfg.size:
                raise LayoutError(f"a batch of {layout.batch} over {layout.cfg.size} cfg ranks")
            inputs |= {name: layout.cfg.own(inputs[name], 0) for name in INPUTS}
        weight = self._transformer.proj_out.weight
        for name in INPUTS[:2]:
            inputs[name] = inputs[name].to(weight.dtype)
        masks = inputs["encoder_attention_mask"]
        layout.valid = [torch.nonzero(mask.flatten()).flatten() for mask in masks]
        return (), inputs

    def _whole_batch(
        self, module: torch.nn.Module, args: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor] | None:
        """Repeat to as many rows as one process has: BLAS picks kernels by the row count."""
        return (args[0].repeat(self.layout.cfg.size, 1),) if self.layout.split_batch else None

    def _own_samples(
        self, module: torch.nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        return self.layout.cfg.own(output, 0) if self.layout.split_batch else None

    def _own_angles(
        self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layout.tokens = len(output[0])
        return self.layout.sp.own(output[0], 0), self.layout.sp.own(output[1], 0)

    def _own_tokens(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        own = self.layout.sp.own(kwargs["hidden_states"], 1)
        return args, kwargs | {"hidden_states": own}

    def _all_tokens(
        self, module: torch.nn.Module, args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        if self.layout.sp.size == 1:
            return None
        return self.layout.sp.gather(output, 1, self.layout.tokens)

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not self.layout.split_batch:
            return None
        whole = self.layout.cfg.gather(output[0], 0, self.layout.batch)
        return (whole,) if isinstance(output, tuple) else type(output)(sample=whole)


def is_parallel(transformer: MochiTransformer3DModel) -> bool:
    """Whether a handle is active; a second layout on top would compute nonsense."""
    blocks = transformer.transformer_blocks
    return any(isinstance(block.attn1.processor, JointAttention) for block in blocks)


def conditioning_linears(transformer: MochiTransformer3DModel) -> Iterator[torch.nn.Linear]:
    """The layers with one row per sample: the time embedding's and the blocks' modulation."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and CONDITIONING.search(name):
            yield module


def parallelize(transformer: MochiTransformer3DModel, mesh: DeviceMesh | None) -> ParallelHandle:
    """Spread a transformer over `mesh`, with dimensions "cfg" and "sp", until `handle.remove()`.

    Every rank must then call it with the same, whole inputs, and gets the same, whole output.
    Without a mesh, or on one of a single rank, results are bit-identical to the stock
    transformer's, and `set_attention_backend` still applies.

    Raises:
        LayoutError: the heads cannot be split over the "sp" ranks.
        RuntimeError: it is on a mesh already.
    """
    return ParallelHandle(transformer, mesh)


def enable_first_block_cache(
    transformer: MochiTransformer3DModel, threshold: float, group: dist.ProcessGroup | None
) -> None:
    """diffusers' first-block cache with one decision for all ranks of `group`.

    Each rank sees only its own tokens. Deciding alone, one may skip blocks in which another waits
    for it; so the compared sums are taken over all ranks, which is also what one process compares.
    """
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    hook = transformer.transformer_blocks[0]._diffusers_hook.get_hook(LEADER_HOOK)
    if group is not None:
        hook._should_compute_remaining_blocks = agreed_decision(hook, group)


def agreed_decision(hook: Any, group: dist.ProcessGroup) -> Decision:
    """The hook's rule over all ranks: does the first block's residual differ by the threshold?"""

    def decide(residual: torch.Tensor) -> bool:
        before = hook.state_manager.get_state().head_block_residual
        if before is None:
            return True
        sizes = [part.abs().sum(dtype=torch.float32) for part in (residual - before, before)]
        sums = torch.stack(sizes)
        dist.all_reduce(sums, group=group)
        change, size = sums.tolist()
        return bool(change > hook.threshold * size)

    without_tracing: Decision = torch.compiler.disable(decide)  # type: ignore[no-untyped-call]
    return without_tracing

"""The ranks of one slot, as seen from one of them: rendezvous, agreement, broadcasts, meshes.

Owns the process group. GPUs use NCCL, plus gloo for tensors in host memory (the agreements); CPU
ranks use gloo alone. Ranks find each other through a file of their slot, so no port is fixed and
nothing listens beyond loopback.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mochi_app.engine.parallel import CFG, SP, mesh_shape
from mochi_app.platforms import loopback

# For every group, the meshes' included: the slot has the deadlines and kills what hangs; a rank
# that waits for a slow peer does no harm.
GROUP_TIMEOUT = timedelta(days=1)


class Ranks:
    """All ranks of the slot. With `size` 1 no method communicates."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self._meshes: dict[tuple[int, int], DeviceMesh] = {}

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: str, device: torch.device) -> Ranks:
        """Wait for all `size` ranks at the file `rendezvous`, new for each start."""
        if size == 1:
            return cls(device=device)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, loopback())
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.FileStore(rendezvous, size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=GROUP_TIMEOUT,
            device_id=torch.device("cuda", 0) if on_gpu else None,
        )
        return cls(rank, size, device)

    @property
    def first(self) -> bool:
        """Whether this rank acts for the slot: it encodes text, reports and writes the video."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None when alone."""
        return dist.group.WORLD if self.size > 1 else None

    def mesh(self, shape: tuple[int, int]) -> DeviceMesh | None:
        """A mesh of all ranks as (cfg, sp), cached by shape; None when alone. Collective."""
        if self.size == 1:
            return None
        if shape not in self._meshes:
            ranks = torch.arange(self.size).view(shape)
            groups = [axis_group(part.tolist()) for part in (ranks.T, ranks)]
            self._meshes[shape] = DeviceMesh.from_group(
                groups, self.device.type, ranks, mesh_dim_names=(CFG, SP)
            )
        return self._meshes[shape]

    def shape_for(self, guided: bool, heads: int) -> tuple[int, int]:
        """The mesh shape for a run with or without guidance.

        Where the heads cannot be split over all ranks, a run without guidance leaves the cfg axis
        idle: both halves compute the same.
        """
        cfg, sp = mesh_shape(self.size, guided)
        return (cfg, sp) if heads % sp == 0 else mesh_shape(self.size)

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Every rank must call it at the same point."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Broadcast the first rank's tensors to all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def axis_group(lines: list[list[int]]) -> dist.ProcessGroup:
    """This rank's group along a mesh axis that partitions all ranks into `lines`. Collective.

    `init_device_mesh` would give it torch's timeout of 10 or 30 minutes: its `backend_override`
    takes the options of one backend only, and on GPUs there are two.
    """
    if len(lines) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        lines, timeout=GROUP_TIMEOUT
    )
    return group

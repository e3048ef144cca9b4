"""Decode latents to video, with the tiles of a frame distributed over the ranks of a group.

Owns the assignment and transport of tiles; the VAE decodes each tile and blends neighbours, so the
result is bit-identical to `vae.decode` on one process. It does not own the group, and it does not
scale latents (`pipeline.py`).

Tiles are decoded in rounds of one tile per rank, largest first, so that the tiles of a round take
about the same time. A rank sends each tile to the first rank before it decodes the next, so it
never holds two. Nothing is in flight between rounds: only there can the ranks agree to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLMochi

Between = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Tile:
    """A region of all frames: its place in the grid, and its bounds in latent cells."""

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int

    def cut(self, latents: torch.Tensor) -> torch.Tensor:
        """The tile's latents (1, 12, T, height, width), a view of (1, 12, T, h, w)."""
        bottom, right = self.top + self.height, self.left + self.width
        return latents[:, :, :, self.top : bottom, self.left : right]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a video is decoded: its tiles, row by row; a single tile covers the whole frame.

    A decoded tile has shape (1, 3, `frames`, height · `scale`, width · `scale`). `size`, `stride`
    and `blend` are (height, width) in pixels: of the frame, of what each tile adds to it, and of a
    tile's overlap with the previous one.
    """

    tiles: tuple[Tile, ...]
    frames: int
    scale: int
    size: tuple[int, int]
    stride: tuple[int, int]
    blend: tuple[int, int]

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.tiles)

    def sample_shape(self, tile: Tile) -> tuple[int, ...]:
        """Shape of the decoded tile."""
        return (1, 3, self.frames, tile.height * self.scale, tile.width * self.scale)

    def rounds(self, ranks: int) -> list[tuple[Tile, ...]]:
        """The tiles of each round: the n-th is for group rank n. Only the last may be short."""
        by_size = sorted(self.tiles, key=lambda tile: -tile.height * tile.width)
        return [tuple(by_size[start : start + ranks]) for start in range(0, self.count, ranks)]


def plan_tiles(vae: AutoencoderKLMochi, shape: torch.Size | tuple[int, ...]) -> Tiling:
    """How `vae`, with its current settings, decodes latents of `shape` (1, 12, T, h, w).

    The grid is that of `AutoencoderKLMochi.tiled_decode`; nothing is computed.

    Raises:
        ValueError: not the shape of one video's latents.
    """
    if len(shape) != 5 or shape[0] != 1:
        raise ValueError(f"latents of shape {tuple(shape)}: expected (1, 12, T, h, w)")
    *_, depth, height, width = shape
    scale = vae.spatial_compression_ratio
    largest = (vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale)
    stride = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
    if vae.use_tiling and (height > largest[0] or width > largest[1]):
        tiles = tuple(
            Tile(
                row=row,
                column=column,
                top=top,
                left=left,
                height=min(largest[0], height - top),
                width=min(largest[1], width - left),
            )
            for row, top in enumerate(range(0, height, stride[0] // scale))
            for column, left in enumerate(range(0, width, stride[1] // scale))
        )
    else:
        tiles = (Tile(row=0, column=0, top=0, left=0, height=height, width=width),)
    return Tiling(
        tiles=tiles,
        frames=frames_of(vae, depth),
        scale=scale,
        size=(height * scale, width * scale),
        stride=stride,
        blend=(vae.tile_sample_min_height - stride[0], vae.tile_sample_min_width - stride[1]),
    )


def frames_of(vae: AutoencoderKLMochi, depth: int) -> int:
    """Frames that `depth` latent frames decode to: 6 each, less the first 5 unless kept."""
    ratio: int = vae.temporal_compression_ratio
    frames = depth * ratio
    return frames - (ratio - 1) if vae.drop_last_temporal_frames and frames >= ratio else frames


@torch.no_grad()
def decode(
    vae: AutoencoderKLMochi,
    latents: torch.Tensor,
    group: dist.ProcessGroup | None,
    between: Between,
) -> torch.Tensor | None:
    """Decode the video (1, 3, F, H, W) on the first rank of `group`; None on the others.

    Every rank of the group must call it with the same weights, settings and `latents`
    (1, 12, T, h, w), scaled as for `vae.decode`. Without a group this process decodes everything
    (unlike in torch.distributed, where None is the group of all ranks). The group's backend must
    support tensors on the device of `latents`.

    `between(done, total)` is called before the first round and after each, with the number of tiles
    decoded by all ranks: as often and with the same numbers on every rank, idle ones included. If
    it raises, it must raise in the same call on all; the group can then be reused. An error on one
    rank within a round leaves the first rank waiting for its tile.
    On a GPU the work of a round may only be queued by then: `between` must wait for the device.

    Raises:
        ValueError: latents of another shape, or a process outside the group.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    if rank < 0:
        raise ValueError("this process is not in the group that decodes")
    tiling = plan_tiles(vae, latents.shape)
    samples: dict[Tile, torch.Tensor] = {}
    done = 0
    between(done, tiling.count)
    for tiles in tiling.rounds(size):
        if rank < len(tiles):
            sample = decode_tile(vae, tiles[rank].cut(latents))
            if rank == 0:
                samples[tiles[0]] = sample
                samples |= receive(tiles[1:], tiling, like=sample, group=group)
            else:
                dist.send(sample.contiguous(), dst=global_rank(group, 0), group=group)
            del sample
        done += len(tiles)
        between(done, tiling.count)
    return assemble(vae, tiling, samples) if rank == 0 else None


def decode_tile(vae: AutoencoderKLMochi, latents: torch.Tensor) -> torch.Tensor:
    """One tile, from (1, 12, T, h, w) to (1, 3, F, 8h, 8w).

    `vae.decode` does not split what is no larger than a tile, and does the rest (frame by frame,
    dropped frames) as in its own tiling.
    """
    sample: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return sample


def receive(
    tiles: tuple[Tile, ...], tiling: Tiling, like: torch.Tensor, group: dist.ProcessGroup | None
) -> dict[Tile, torch.Tensor]:
    """Receive the decoded tiles of group ranks 1, 2 and so on, in the dtype and on the device of
    `like`."""
    samples = {}
    for sender, tile in enumerate(tiles, start=1):
        samples[tile] = like.new_empty(tiling.sample_shape(tile))
        dist.recv(samples[tile], src=global_rank(group, sender), group=group)
    return samples


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    """The global rank, which point-to-point calls expect, of `rank` in the group."""
    assert group is not None, "one process alone neither sends nor receives"
    return dist.get_global_rank(group, rank)


def assemble(
    vae: AutoencoderKLMochi, tiling: Tiling, samples: Mapping[Tile, torch.Tensor]
) -> torch.Tensor:
    """Assemble the decoded tiles, modified in place, into the whole sample (1, 3, F, H, W).

    A tile is blended with the already blended tile above it, then with the one to its left; another
    order would give different numbers.
    """
    if tiling.count == 1:
        return samples[tiling.tiles[0]]
    grid = {(tile.row, tile.column): samples[tile] for tile in tiling.tiles}
    rows: dict[int, list[torch.Tensor]] = {}
    for (row, column), sample in grid.items():
        if row > 0:
            sample = vae.blend_v(grid[row - 1, column], sample, tiling.blend[0])
        if column > 0:
            sample = vae.blend_h(grid[row, column - 1], sample, tiling.blend[1])
        part = sample[:, :, :, : tiling.stride[0], : tiling.stride[1]]
        rows.setdefault(row, []).append(part)
    whole = torch.cat([torch.cat(parts, dim=4) for parts in rows.values()], dim=3)
    # strides that are not a multiple of a cell add up to more than the frame
    return whole[:, :, :, : tiling.size[0], : tiling.size[1]]

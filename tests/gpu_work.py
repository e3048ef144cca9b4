"""What GPUs, or CPUs in a rehearsal, compute together and alone, and how it is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

from mochi_app.engine.group import GROUP_TIMEOUT, Ranks
from mochi_app.engine.loading import Precision, open_pipeline
from mochi_app.engine.parallel import parallelize
from mochi_app.engine.pipeline import Engine
from mochi_app.engine.plan.costs import GB
from tests import decoding, sharing, whole_videos
from tests.benchmarks.random_models import layers_that_fit, random_inputs, random_transformer
from tests.places import TINY

MESHES = [(2, 1), (1, 2), (1, 3), (2, 2), (1, 4), (2, 3), (1, 6), (2, 4)]


SIZES = [2, 3, 4, 6, 8]

TOLERANCE = 1e-4  # of the transformer's outputs, absolute; they are 5 at most

LATENT_TOLERANCE = 5e-4  # of the last latents, absolute; they are 14 at most

CPU_TOLERANCE = 1e-3  # between GPU and CPU: fused attention of CUDA has an arithmetic of its own

MOST_CHANGED = 1e-3  # of a video's bytes, each by one

FULL_SIZE = (28, 60, 106)  # latents of 163 frames, 480x848

RESERVE = 4 * GB  # kept free for workspaces and fragmentation

LIMIT = 900.0  # seconds of one start of the ranks

Found = dict[Any, Any]

Say = Callable[[str], None]

# The work of a rank
plain_forward = sharing.forward

plain_load = sharing.load_transformer


@contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    """The work of the other tests is done on `device`, exactly; their data stay in host memory."""

    def load() -> MochiTransformer3DModel:
        return plain_load().to(device)

    def forward(
        transformer: MochiTransformer3DModel, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        return plain_forward(transformer, there).cpu()

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    with (
        mock.patch.object(sharing, "load_transformer", load),
        mock.patch.object(sharing, "forward", forward),
    ):
        yield


def open_tiny(ranks: Ranks) -> MochiPipeline:
    """The embedded model on this rank's device, in float32."""
    exact = Precision(torch.float32, torch.float32, torch.float32)
    pipe = open_pipeline(str(TINY), exact, ranks.device, text=ranks.first)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def work_alone(ranks: Ranks) -> Found:
    """What one process computes on the device, all of the model's own code first."""
    with working_on(ranks.device):
        transformer = sharing.load_transformer()
        outputs = run_cases(transformer)
        parallelize(transformer, None)
        requests = whole_videos.CASES
        frames = {name: whole_videos.stock_frames(open_tiny(ranks), request)
                  for name, request in requests.items()}  # fmt: skip
        engine = Engine(open_tiny(ranks), ranks=Ranks(device=ranks.device))
        return {
            "stock outputs": outputs,
            "outputs": run_cases(transformer),
            "cached": sharing.cached(ranks, (1, 1)),
            "stock frames": frames,
            "videos": {name: whole_videos.make(engine, request)
                       for name, request in requests.items()},
        }  # fmt: skip


def run_cases(transformer: MochiTransformer3DModel) -> Found:
    """Outputs of all cases, and once more of the one that `outputs_of_all_cases` ends with."""
    cases = [*sharing.every_case()]
    outputs: Found = {
        case: sharing.forward(transformer, sharing.inputs_of(*case)) for case in cases
    }
    outputs["after", ""] = sharing.forward(transformer, sharing.inputs_of("even", "guided"))
    return outputs


def work_together(ranks: Ranks) -> Found:
    """All that one of several ranks has to do, in one start of the processes."""
    with working_on(ranks.device):
        return {
            "transformer": {
                shape: {name: work(ranks, shape) for name, work in sharing.WORK.items()}
                for shape in MESHES
                if math.prod(shape) == ranks.size
            },
            "videos": make_videos(ranks),
            "cancels": cancel_and_go_on(ranks),
            "tiles": decode_cases(ranks),
            "agreement": agree_and_share(ranks),
        }


class InMesh(Ranks):
    """Ranks that lie in one mesh, with guidance and without."""

    def __init__(self, ranks: Ranks, shape: tuple[int, int]) -> None:
        super().__init__(ranks.rank, ranks.size, ranks.device)
        self._shape = shape

    def shape_for(self, guided: bool, heads: int) -> tuple[int, int]:
        return self._shape


def make_videos(ranks: Ranks) -> Found:
    """Last latents and frames of every case in every mesh of these ranks."""
    found: Found = {}
    for shape in MESHES:
        if math.prod(shape) == ranks.size:
            engine = Engine(open_tiny(ranks), ranks=InMesh(ranks, shape))
            for name, request in whole_videos.CASES.items():
                found[shape, name] = whole_videos.make(engine, request)
    return found


def cancel_and_go_on(ranks: Ranks) -> Found:
    """A video in the engine's own choice of mesh, before and after cancels at every boundary."""
    engine, request = Engine(open_tiny(ranks), ranks=ranks), whole_videos.EVEN
    _, before = whole_videos.make(engine, request)
    boundaries = 3 + request.num_inference_steps  # three stages begin, and each step ends
    cancelled = [
        engine.run(run, whole_videos.unsaid, whole_videos.CancelAt(ranks.rank, looks)) is None
        for looks in range(boundaries)
        for run in (request, replace(request, guidance_scale=1.0))
    ]
    _, after = whole_videos.make(engine, request)
    return {"cancelled": cancelled, "before": before, "after": after}


@dataclass(frozen=True)
class CaseThere(decoding.Case):
    """A case of `decoding.py` on a device."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @classmethod
    def of(cls, case: decoding.Case, device: torch.device) -> CaseThere:
        return cls(**{item.name: getattr(case, item.name) for item in fields(case)}, device=device)

    @property
    def latents(self) -> torch.Tensor:
        return super().latents.to(self.device)

    def vae(self) -> AutoencoderKLMochi:
        return super().vae().to(self.device)


def decode_cases(ranks: Ranks) -> Found:
    """Every case decoded by all ranks and, on the first, by the library; and cancelled decodes."""
    cases = {name: CaseThere.of(case, ranks.device) for name, case in decoding.CASES.items()}
    found: Found = {}
    for name, case in cases.items():
        found["ranks", name] = decoding.decode_until(case.vae(), case.latents, ranks.group)
        if ranks.first:
            with torch.no_grad():
                found["whole", name] = case.vae().decode(case.latents, return_dict=False)[0]
    found["cancels"] = decoding.cancels(cases["five tiles"], ranks.group, ranks.size)
    return found


def agree_and_share(ranks: Ranks) -> Found:
    """Who carries what, an agreement for each rank that may say yes, and what the first shares."""
    world = dist.group.WORLD
    assert world is not None
    devices = {"cpu": torch.device("cpu"), "ranks": ranks.device}
    shared = [
        torch.full((3, 5), float(ranks.rank), device=ranks.device),
        torch.full((7,), ranks.first, device=ranks.device),
    ]
    ranks.share(shared)
    return {
        "backends": {name: world._get_backend(device).name() for name, device in devices.items()},
        "agreed": [ranks.agree(ranks.rank == who) for who in range(ranks.size)],
        "nobody": ranks.agree(False),
        "shared": shared,
    }


def one_step(
    ranks: Ranks, config: Mapping[str, Any], latent_shape: Sequence[int], dtype: torch.dtype
) -> Found:
    """A guided step of a transformer with random weights, with as many layers as have room."""
    layers = int(config["num_layers"])
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        layers = layers_that_fit(config, latent_shape, dtype, free - RESERVE)
    if layers < 1:
        return {"layers": 0}
    transformer = random_transformer({**config, "num_layers": layers}, ranks.device, dtype)
    parallelize(transformer, None)
    inputs = random_inputs(config, latent_shape, 2, ranks.device)
    output = plain_forward(transformer, inputs)
    on_gpu = ranks.device.type == "cuda"
    return {
        "layers": layers,
        "shape": tuple(output.shape),
        "dtype": output.dtype,
        "finite": bool(torch.isfinite(output).all()),
        "spread": output.float().std().item(),
        "peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


# The checks, for any device
def largest(outputs: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor]) -> float:
    """The largest difference over all cases."""
    assert outputs.keys() == expected.keys()
    return max((outputs[case] - expected[case]).abs().max().item() for case in expected)


def check_outputs(ranks: Sequence[Found], alone: Found, most: float) -> str:
    """Outputs of every rank of a mesh are those of the library's transformer."""
    error = max(largest(rank["outputs"], alone["stock outputs"]) for rank in ranks)
    assert error <= most
    return f"outputs differ by {error:.1e} at most"


def check_cached(ranks: Sequence[Found], alone: Found, most: float) -> str:
    """With the first-block cache all ranks skip the blocks that one process skips."""
    expected, computed = alone["cached"]
    assert 1 < computed < len(expected)
    for rank in ranks:
        outputs, count = rank["cached"]
        assert count == computed
        error = largest(dict(enumerate(outputs)), dict(enumerate(expected)))
        assert error <= most
    return f"{computed} of {len(expected)} steps computed"


def check_group_timeouts(ranks: Sequence[Found], device: str) -> None:
    """No rank gives up on a slow peer, whatever the tensors are in."""
    axes = [(name, kind) for name in ("cfg", "sp") for kind in {"cpu", device}]
    for rank in ranks:
        assert rank["group_timeouts"] == dict.fromkeys(axes, GROUP_TIMEOUT)


def check_frames(name: str, found: Any, expected: Any, changed: float) -> str:
    """Bytes of a video differ by one at most, and few do."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    part = float((difference > 0).mean())
    assert difference.max() <= 1
    assert part <= changed
    return f"{name}: {part:.1e} of the bytes differ"


def check_videos(
    ranks: Sequence[Found], alone: Found, shape: tuple[int, int], most: float, changed: float
) -> str:
    """Last latents and frames of the first rank are those of one process; the others have none."""
    first, *others = (rank["videos"] for rank in ranks)
    said = []
    for name, (expected, frames) in alone["videos"].items():
        latents, found = first[shape, name]
        error = (latents - expected).abs().max().item()
        assert error <= most, name
        said.append(check_frames(name, found, frames, changed) + f", latents by {error:.1e}")
        assert all(other[shape, name][1] is None for other in others)
    return "; ".join(said)


def check_cancels(ranks: Sequence[Found]) -> None:
    """A cancel that one rank hears at any boundary stops all, and changes nothing of the next."""
    for rank in ranks:
        assert rank["cancels"]["cancelled"]
        assert all(rank["cancels"]["cancelled"])
    first = ranks[0]["cancels"]
    assert np.array_equal(first["before"], first["after"])


def check_tiles(ranks: Sequence[Found]) -> None:
    """Tiles of all ranks make the video of `vae.decode`, bit for bit."""
    first, *others = (rank["tiles"] for rank in ranks)
    for name, case in decoding.CASES.items():
        sample = first["ranks", name].sample
        assert sample.dtype == case.dtype
        assert torch.equal(sample, first["whole", name]), name
        for outcome in (first["ranks", name], *(other["ranks", name] for other in others)):
            assert outcome.calls == decoding.calls_expected(decoding.COUNTS[name], len(ranks))


def check_tile_cancels(ranks: Sequence[Found]) -> None:
    """After a cancel between two rounds the group decodes the next video."""
    expected = ranks[0]["tiles"]["whole", "five tiles"]
    for number, rank in enumerate(ranks):
        for cancelled, after in rank["tiles"]["cancels"]:
            assert cancelled.cancelled
            assert (after.sample is None) == (number > 0)
            assert number > 0 or torch.equal(after.sample, expected)


def check_agreement(ranks: Sequence[Found], backend: str) -> None:
    """All hear one rank's yes, over host memory; all have the first one's tensors."""
    for rank in ranks:
        found = rank["agreement"]
        assert found["backends"] == {"cpu": "gloo", "ranks": backend}
        assert found["agreed"] == [True] * len(ranks)
        assert found["nobody"] is False
        numbers, flags = found["shared"]
        assert not numbers.any()
        assert flags.all()


def check_step(found: Found, config: Mapping[str, Any], latent_shape: Sequence[int]) -> str:
    """Noise predictions of both samples, finite and not all alike; says what was left out."""
    assert found["shape"] == (2, config["in_channels"], *latent_shape)
    assert found["finite"]
    assert found["spread"] > 0
    layers, all_layers = found["layers"], config["num_layers"]
    short = f" of {all_layers}, for which memory is short" if layers < all_layers else ""
    return f"{layers} layers{short}; {found['peak'] / GB:.1f} GB at the peak, {found['dtype']}"


Together = Callable[[int], list[Found]]


def transformers_of(together: Together, shape: tuple[int, int]) -> list[Found]:
    """What each rank of a mesh found of the transformer."""
    return [rank["transformer"][shape] for rank in together(math.prod(shape))]

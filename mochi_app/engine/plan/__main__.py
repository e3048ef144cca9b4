"""The plan on paper: memory, work and traffic of every GPU of a slot, before any weight is loaded.

A command that prints what `fit.py` plans from the counts of `costs.py`, also next to published
timings. Run it with::

    python -m mochi_app.engine.plan --gpus 1,2,4,8 --gpu-memory 80
    python -m mochi_app.engine.plan --published

Exact, and tested against torch's own counter: weights, multiply-adds of matrix products and
convolutions, bytes handed to collectives. Estimated: live tensors at the peak of a step. Predicted
from two numbers that the reader gives, a sustained rate and a link bandwidth: seconds. They assume
that nothing overlaps and that matrix products, attention and convolution all run at that one rate.
Not in them: kernels bound by memory or by launches (norms, rotary embedding, group norms of the
decoder, the text encoder at batch 1), latency of collectives, imbalance between GPUs, copies of
decoded tiles to rank 0, video encoding, loading, and the first call's compilation or autotuning.
Not in the peaks, but for what `reserve` allows: the CUDA context, NCCL's buffers, workspaces of
cuDNN and cuBLAS, fragmentation. A GB is 10**9 bytes, a TFLOP 10**12 operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mochi_app.engine.parallel import LayoutError
from mochi_app.engine.plan.costs import DTYPES, GB, TERA
from mochi_app.engine.plan.fit import Parts, Plan, PlanError, Setting, build_parts, make_plan


@dataclass(frozen=True, slots=True)
class Timing:
    """A published time of the whole run: seconds on `mesh` (cfg, sp) GPUs.

    `series` names what shares one sustained rate. `alone`: every GPU decodes the whole video.
    """

    series: str
    num_frames: int
    steps: int
    mesh: tuple[int, int]
    seconds: float
    link_gbs: float
    alone: bool = False


# All at 480x848 with guidance. Link bandwidths are ours: PCIe 4 x16, NVLink 3, NVLink 4, one way.
# mochi-xdit's README (64 steps are the default of its demos/cli.py); ParaAttention's README with
# its parallel_examples/run_mochi.py, which leaves the steps to diffusers: 28 are assumed, since 64
# would need more than an A100's peak of 312 TFLOP/s; the last series is this project's earlier
# deployment, H100-class GPUs and no separate cfg axis.
TIMINGS = (
    Timing("L40, mochi-xdit", 49, 64, (1, 1), 394.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (1, 2), 222.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (2, 1), 198.0, 25),
    Timing("L40, mochi-xdit", 49, 64, (2, 3), 74.0, 25),
    Timing("A100, ParaAttention", 84, 28, (1, 1), 196.5, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (1, 2), 110.1, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (2, 1), 105.4, 250, alone=True),
    Timing("A100, ParaAttention", 84, 28, (2, 2), 61.2, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (1, 1), 149.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (1, 2), 83.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (2, 1), 81.9, 250, alone=True),
    Timing("A100, ParaAttention, compiled", 84, 28, (2, 2), 47.1, 250, alone=True),
    Timing("H100-class, earlier deployment", 163, 100, (1, 2), 540.0, 400),
    Timing("H100-class, earlier deployment", 163, 100, (1, 4), 285.0, 400),
    Timing("H100-class, earlier deployment", 163, 100, (1, 8), 150.0, 400),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published time beside the plan's, in seconds.

    `tflops` was fitted to the first of the series, whose prediction is therefore exact.
    """

    timing: Timing
    tflops: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """How far the plan is off, as a part of the published time; negative if too fast."""
        return self.predicted / self.timing.seconds - 1


def compare_published(parts: Parts, timings: Sequence[Timing] = TIMINGS) -> list[Comparison]:
    """Fit one sustained rate to the first timing of each series, and predict them all with it."""
    rates: dict[str, float] = {}
    comparisons = []
    for timing in timings:
        work, traffic = published_cost(timing, parts)
        fitted = timing.series not in rates
        rate = rates.setdefault(timing.series, work / (timing.seconds - traffic))
        comparisons.append(Comparison(timing, rate / TERA, work / rate + traffic, fitted))
    return comparisons


def published_cost(timing: Timing, parts: Parts) -> tuple[float, float]:
    """Operations on the critical path of a published run, and its seconds of traffic."""
    cfg, sp = timing.mesh
    setting = Setting(
        gpus=cfg * sp, mesh=timing.mesh, num_frames=timing.num_frames, link_gbs=timing.link_gbs
    )
    plan = make_plan(setting, parts)
    decode = [rank.decode_flops for rank in plan.ranks]
    work = plan.text_flops + timing.steps * plan.busiest_flops
    work += sum(decode) if timing.alone else max(decode)
    sent = max(rank.traffic.total for rank in plan.ranks)
    return work, timing.steps * sent / (timing.link_gbs * GB)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, every column as wide as its widest cell, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(lines)


def ranks_table(plan: Plan) -> str:
    """One row a GPU: where it is in the mesh, what it holds, what a step costs, what it decodes."""
    head = ["rank", "cfg", "sp", "tokens", "weights GB", "step GB", "decode GB", "peak GB"]
    head += ["TFLOP/step", "GB sent/step", "tiles", "decode TFLOP"]
    rows = [head]
    for rank in plan.ranks:
        counts = [rank.rank, rank.cfg_rank, rank.sp_rank, rank.tokens]
        held = [rank.weights, rank.step_activations, rank.decode_activations, rank.peak]
        rows.append(
            [
                *map(str, counts),
                *(f"{size / GB:.1f}" for size in held),
                f"{rank.flops / TERA:.1f}",
                f"{rank.traffic.total / GB:.2f}",
                str(rank.tiles),
                f"{rank.decode_flops / TERA:.1f}",
            ]
        )
    return align(rows)


def counts_table(plans: Sequence[Plan], preview_steps: int, enhance_steps: int) -> str:
    """One row a number of GPUs: the busiest of each figure, and predicted seconds."""
    head = ["GPUs", "cfg x sp", "tokens", "weights GB", "step GB", "decode GB", "peak GB", "fits"]
    head += ["TFLOP/step", "x N / one", "GB sent/step", "tiles", "text s", "step s", "decode s"]
    head += [f"preview s ({preview_steps})", f"enhance s ({enhance_steps})"]
    rows = [head]
    for plan in plans:
        first = plan.ranks[0]
        held = [first.weights, first.step_activations, first.decode_activations, plan.worst.peak]
        seconds = [plan.seconds(preview_steps), plan.seconds(enhance_steps)]
        rows.append(
            [
                str(len(plan.ranks)),
                "{} x {}".format(*plan.mesh),
                str(first.tokens),
                *(f"{size / GB:.1f}" for size in held),
                "yes" if plan.fits else "NO",
                f"{plan.busiest_flops / TERA:.1f}",
                f"{plan.overhead:.4f}",
                f"{max(rank.traffic.total for rank in plan.ranks) / GB:.2f}",
                str(first.tiles),
                f"{plan.text_seconds:.2f}",
                f"{plan.step_seconds:.2f}",
                f"{plan.decode_seconds:.2f}",
                *(f"{value:.1f}" for value in seconds),
            ]
        )
    return align(rows)


def published_table(comparisons: Sequence[Comparison]) -> str:
    """One row a published time, with the plan's beside it."""
    rows = [["series", "frames", "steps", "cfg x sp", "TFLOP/s", "published s", "plan s", "off"]]
    for item in comparisons:
        rows.append(
            [
                item.timing.series,
                str(item.timing.num_frames),
                str(item.timing.steps),
                "{} x {}".format(*item.timing.mesh),
                f"{item.tflops:.0f}",
                f"{item.timing.seconds:.1f}",
                f"{item.predicted:.1f}",
                "fitted" if item.fitted else f"{item.error:+.0%}",
            ]
        )
    return align(rows)


def as_record(plan: Plan, steps: Mapping[str, int]) -> dict[str, Any]:
    """A plan as plain data for JSON: bytes, operations, seconds."""
    ranks = [asdict(rank) | {"peak": rank.peak, "sent": rank.traffic.total} for rank in plan.ranks]
    predicted = {name: plan.seconds(count) for name, count in steps.items()}
    return {
        "setting": asdict(plan.setting),
        "mesh": plan.mesh,
        "fits": plan.fits,
        "verdict": plan.verdict(),
        "ranks": ranks,
        "text_flops": plan.text_flops,
        "one_process_flops": plan.one_process_flops,
        "overhead": plan.overhead,
        "seconds": {
            "text": plan.text_seconds,
            "step": plan.step_seconds,
            "decode": plan.decode_seconds,
            **predicted,
        },
    }


def parse_counts(text: str) -> list[int]:
    """`1,2,4` as numbers of GPUs."""
    return [int(count) for count in text.split(",")]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; defaults are those of `Setting`."""
    parser = argparse.ArgumentParser(
        prog="python -m mochi_app.engine.plan",
        description="Memory, work, traffic and predicted seconds of Mochi on N GPUs, on paper.",
    )
    plain = Setting()
    parser.add_argument(
        "--gpus", type=parse_counts, action="extend", help="numbers of GPUs: 4, or 1,2,4,8"
    )
    for name, text in (
        ("gpu-memory", "GB of one GPU"),
        ("height", "pixels"),
        ("width", "pixels"),
        ("num-frames", "frames of the video"),
        ("guidance-scale", "1 or less: no guidance"),
        ("text-tokens", "valid tokens of a prompt"),
        ("tflops", "sustained by one GPU"),
        ("link-gbs", "GB/s that one GPU sends"),
        ("reserve", "GB kept for context, workspaces and fragmentation"),
    ):
        value = getattr(plain, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=f"{text} (default {value:g})"
        )
    parser.add_argument(
        "--decode-tflops", type=float, help="sustained in decoding, if not the same"
    )
    for name in ("dtype", "t5-dtype", "vae-dtype"):
        value = getattr(plain, name.replace("-", "_"))
        parser.add_argument(f"--{name}", choices=tuple(DTYPES), default=value)
    parser.add_argument("--preview-steps", type=int, default=8)
    parser.add_argument("--enhance-steps", type=int, default=64)
    parser.add_argument("--model", help="a pipeline folder; default: the published Mochi 1 preview")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--published", action="store_true", help="compare with published times")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace, gpus: int) -> Setting:
    """The command line's setting for one number of GPUs."""
    names = (name for name in Setting.__dataclass_fields__ if name not in ("gpus", "mesh"))
    return replace(Setting(gpus=gpus), **{name: getattr(options, name) for name in names})


def report(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        PlanError, LayoutError: see `make_plan` and `build_parts`.
    """
    parts = build_parts(options.model)
    if options.published:
        comparisons = compare_published(parts)
        if options.json:
            return json.dumps([asdict(item) | {"error": item.error} for item in comparisons])
        return published_table(comparisons)
    plans = [make_plan(setting_of(options, gpus), parts) for gpus in options.gpus or [1]]
    steps = {"preview": options.preview_steps, "enhance": options.enhance_steps}
    if options.json:
        return json.dumps([as_record(plan, steps) for plan in plans], indent=1)
    lines = [counts_table(plans, *steps.values())]
    if len(plans) == 1:
        lines = [ranks_table(plans[0]), "", *lines]
    verdicts = [f"{len(plan.ranks)} GPUs: {plan.verdict()}" for plan in plans]
    return "\n".join([*lines, "", *verdicts])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 2 and a line on stderr for what cannot be planned."""
    try:
        sys.stdout.write(report(parse_arguments(arguments)) + "\n")
    except (PlanError, LayoutError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a step and the decoding cost on 1, 2, 4 ... ranks, beside one rank and beside the plan.

    python -m tests.benchmarks.engine [--model tiny|full] [--ranks 1,2,4] [--steps N] [--layers L]
                                      [--device cpu|cuda] [--height H --width W --num-frames F]
                                      [--unguided] [--json FILE]

Models have random weights (`random_models.py`): *tiny* is the embedded model's architecture, and
*full* is the published one, in bfloat16 on GPUs; `--layers` cuts it down for a smaller GPU. On a
CPU all is float32, and each rank has one thread.

A step is one pass of the transformer on the guided pair, whole inputs to whole output on all ranks;
all text tokens are valid. Decoding is all tiles, from latents to a video on the first rank. In
the processes of a group of ranks both are done by turns on the first rank alone, for which the
others wait, and by all together, so that both see the same machine. The first turn does not count.
Seconds are those of the slowest rank, and medians of the turns.

*share* is what the busiest rank does in operations a second, as the plan counts them, over what
the slowest rank does in a square matrix product, measured on all ranks at the same time. The
plan's seconds come from one rank's rate in these same turns, and from the bandwidth of an
all-to-all between the ranks: they show what division and traffic alone would leave. Memory is the
peak of torch's allocator on a GPU, and of the process on a CPU, Python and the lone turns included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

from mochi_app.engine.decode import decode
from mochi_app.engine.group import Ranks
from mochi_app.engine.loading import quiet_libraries
from mochi_app.engine.parallel import LayoutError, parallelize
from mochi_app.engine.plan.__main__ import parse_counts
from mochi_app.engine.plan.costs import DTYPES, GB, TERA
from mochi_app.engine.plan.fit import Parts, Plan, PlanError, Setting, build_parts, make_plan
from mochi_app.files import PROJECT_DIR
from tests.benchmarks.random_models import random_inputs, random_transformer, random_vae
from tests.benchmarks.report import Result, table
from tests.ranks import run_ranks

MODELS = {"tiny": str(PROJECT_DIR / "assets" / "tiny-mochi"), "full": None}
SIZES = {"tiny": (96, 96, 31), "full": (480, 848, 163)}  # height, width, frames
MOST_DECODES = 3  # counted turns of decoding
RATE_TURNS = 5  # of matrix products and of all-to-alls
MATRIX = {"cpu": 1024, "cuda": 4096}  # rows and columns
PRODUCTS = {"cpu": 1, "cuda": 20}  # matrix products in a turn
MESSAGE = {"cpu": 8 << 20, "cuda": 256 << 20}  # bytes that a rank has in an all-to-all
LIMIT = 3600.0  # seconds that one group of ranks may take

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Task:
    """What every rank of a group measures. `configs` are those of transformer and VAE."""

    plan: Plan
    configs: tuple[Mapping[str, Any], Mapping[str, Any]]
    steps: int


# In the process of a rank


def measure(ranks: Ranks, task: Task) -> Result:
    """All figures of one rank: seconds by turns, bytes, rates."""
    quiet_libraries()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    dtype = DTYPES[task.plan.setting.dtype]
    found: Result = {
        "device": device_name(ranks.device),
        "matmul_tflops": matmul_rate(ranks, dtype) / TERA,
        "link_gbs": link_rate(ranks) / GB,
    }
    with torch.no_grad():
        transformer = random_transformer(task.configs[0], ranks.device, dtype)
        found["step"] = time_steps(ranks, task, transformer)
        vae = random_vae(task.configs[1], ranks.device, dtype)
        found["decode"] = time_decoding(ranks, task, vae)
    return found


def time_steps(ranks: Ranks, task: Task, transformer: MochiTransformer3DModel) -> Result:
    """Seconds of steps, and the bytes that this rank sends in one."""
    setting = task.plan.setting
    samples = 2 if setting.guided else 1
    inputs = random_inputs(task.configs[0], setting.latent_shape, samples, ranks.device)
    mesh = ranks.mesh(task.plan.mesh)
    sent: list[int] = []

    def step(mesh: Any) -> None:
        handle = parallelize(transformer, mesh)
        transformer(**inputs, return_dict=False)
        sent.append(handle.bytes_sent)
        handle.remove()

    timed = by_turns(ranks, task.steps, partial(step, None), partial(step, mesh))
    return timed | {"sent": sent[-1]}


def time_decoding(ranks: Ranks, task: Task, vae: AutoencoderKLMochi) -> Result:
    """Seconds of decoding the whole video."""
    shape = (1, vae.config.latent_channels, *task.plan.setting.latent_shape)
    latents = torch.zeros(shape, device=ranks.device, dtype=vae.dtype)

    def whole(group: dist.ProcessGroup | None) -> None:
        decode(vae, latents, group, lambda done, total: None)

    turns = min(task.steps, MOST_DECODES)
    return by_turns(ranks, turns, partial(whole, None), partial(whole, ranks.group))


def by_turns(ranks: Ranks, turns: int, alone: Work, together: Work) -> Result:
    """Seconds of `alone` on the first rank and of `together` on all, and the peak of the latter.

    The first of `turns` + 1 turns does not count. A single rank only does `together`.
    """
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    peak = 0
    for _ in range(turns + 1):
        if ranks.size > 1:
            seconds["alone"].append(seconds_of(ranks, alone if ranks.first else lambda: None))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds["together"].append(seconds_of(ranks, together))
        peak = max(peak, peak_memory(ranks.device))
    return {name: values[1:] for name, values in seconds.items()} | {"peak": peak}


def seconds_of(ranks: Ranks, work: Work) -> float:
    """Seconds of this rank's work on its device; all ranks begin at the same time."""
    synchronize(ranks.device)
    ranks.agree(False)
    started = time.perf_counter()
    work()
    synchronize(ranks.device)
    return time.perf_counter() - started


def matmul_rate(ranks: Ranks, dtype: torch.dtype) -> float:
    """Operations a second in products of square matrices, while all ranks do the same."""
    kind = ranks.device.type
    size, products = MATRIX[kind], PRODUCTS[kind]
    left, right = (torch.randn(size, size, device=ranks.device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=result)

    seconds = [seconds_of(ranks, multiply) for _ in range(RATE_TURNS + 1)]
    return products * 2 * size**3 / statistics.median(seconds[1:])


def link_rate(ranks: Ranks) -> float:
    """Bytes a second that this rank sends in an all-to-all of all; 0 with nobody to send to."""
    if ranks.size == 1:
        return 0.0
    part = MESSAGE[ranks.device.type] // ranks.size
    outgoing = torch.zeros(part * ranks.size, dtype=torch.uint8, device=ranks.device)
    incoming = torch.empty_like(outgoing)

    def exchange() -> None:
        dist.all_to_all_single(incoming, outgoing)

    seconds = [seconds_of(ranks, exchange) for _ in range(RATE_TURNS + 1)]
    return part * (ranks.size - 1) / statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes: of torch's allocator since the last reset on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the kind of processor."""
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()


# In the process that asks


def measure_group(task: Task, device: str) -> Result:
    """Start the ranks, and make one record of what they found."""
    with tempfile.TemporaryDirectory(prefix="mochi-benchmark-") as folder:
        work = partial(measure, task=task)
        ranks = run_ranks(task.plan.setting.gpus, work, Path(folder), device, LIMIT)
    return summarize(task.plan, ranks)


def summarize(plan: Plan, ranks: Sequence[Result]) -> Result:
    """What all ranks found, in seconds, TFLOP/s, bytes; `plan_` is what the plan says."""
    step, decoding = (slowest([rank[name] for rank in ranks]) for name in ("step", "decode"))
    matmul = min(rank["matmul_tflops"] for rank in ranks)
    rate = plan.busiest_flops / step["together"] / TERA
    return {
        "mesh": plan.mesh,
        "device": ranks[0]["device"],
        "step": step | {"tflops": rate, "share": rate / matmul},
        "decode": decoding,
        "matmul_tflops": matmul,
        "link_gbs": min(rank["link_gbs"] for rank in ranks),
        "sent": [rank["step"]["sent"] for rank in ranks],
        "plan_sent": [rank.traffic.total for rank in plan.ranks],
        "peak": max(rank[name]["peak"] for rank in ranks for name in ("step", "decode")),
        "turns": [{name: rank[name] for name in ("step", "decode")} for rank in ranks],
    }


def slowest(ranks: Sequence[Result]) -> Result:
    """Medians of the turns, a turn as long as its slowest rank took, and how often it goes."""
    together = statistics.median(map(max, zip(*(rank["together"] for rank in ranks), strict=True)))
    alone = statistics.median(ranks[0]["alone"]) if ranks[0]["alone"] else together
    return {"together": together, "alone": alone, "speed_up": alone / together}


def add_prediction(record: Result, plan: Plan, parts: Parts) -> Result:
    """The plan's seconds, from the rates of one rank and of the links as they were measured."""
    setting = plan.setting
    one = make_plan(replace(setting, gpus=1, mesh=None), parts)
    measured = replace(
        setting,
        tflops=one.busiest_flops / record["step"]["alone"] / TERA,
        decode_tflops=one.ranks[0].decode_flops / record["decode"]["alone"] / TERA,
        link_gbs=record["link_gbs"] or setting.link_gbs,
    )
    predicted = make_plan(measured, parts)
    record["step"]["plan"] = predicted.step_seconds
    record["decode"]["plan"] = predicted.decode_seconds
    record["decode"]["tflops"] = max(rank.decode_flops for rank in plan.ranks) / (
        record["decode"]["together"] * TERA
    )
    return record


def show(records: Mapping[int, Result]) -> None:
    """Two tables: the step, and everything else."""
    table(
        "One step: seconds, TFLOP/s of the busiest rank and its share of a matrix product's",
        ("ranks", "cfg x sp", "one rank", "together", "plan", "speed-up", "TFLOP/s", "share",
         "MB sent", "MB in plan"),
        (
            (
                str(count),
                "{} x {}".format(*one["mesh"]),
                *(f"{one['step'][name]:.4g}" for name in ("alone", "together", "plan")),
                f"{one['step']['speed_up']:.2f}",
                f"{one['step']['tflops']:.4g}",
                f"{one['step']['share']:.0%}",
                *(f"{max(one[name]) / 1e6:.3f}" for name in ("sent", "plan_sent")),
            )
            for count, one in records.items()
        ),
    )  # fmt: skip
    table(
        "Decoding: seconds; and the ranks: memory, matrix products, links",
        ("ranks", "one rank", "together", "plan", "speed-up", "TFLOP/s", "peak GB",
         "matmul TFLOP/s", "link GB/s"),
        (
            (
                str(count),
                *(f"{one['decode'][name]:.4g}" for name in ("alone", "together", "plan")),
                f"{one['decode']['speed_up']:.2f}",
                f"{one['decode']['tflops']:.4g}",
                f"{one['peak'] / GB:.2f}",
                f"{one['matmul_tflops']:.4g}",
                f"{one['link_gbs']:.3g}" if one["link_gbs"] else "-",
            )
            for count, one in records.items()
        ),
    )  # fmt: skip


# Command line


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what cannot run here ends the program with a line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine")
    gpus = torch.cuda.device_count()
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--ranks", type=parse_counts, default=[1], help="groups: 1,2,4")
    parser.add_argument("--steps", type=int, default=5, help="turns that count")
    parser.add_argument("--layers", type=int, help="of the transformer; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus else "cpu")
    parser.add_argument("--height", type=int, help="pixels; default: the model's usual size")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num-frames", type=int, help="frames of the video")
    parser.add_argument("--unguided", action="store_true", help="one sample instead of the pair")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: expected 1 or more")
    if options.device == "cuda" and max(options.ranks) > gpus:
        parser.error(f"--ranks {max(options.ranks)}: there are {gpus} GPUs, one a rank")
    options.parser = parser
    return options


def tasks_of(options: argparse.Namespace, parts: Parts) -> Iterator[Task]:
    """A task for each number of ranks.

    Raises:
        PlanError, LayoutError: a size or a number of ranks that is not possible.
    """
    given = (options.height, options.width, options.num_frames)
    height, width, frames = (
        usual if value is None else value
        for value, usual in zip(given, SIZES[options.model], strict=True)
    )
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    for count in options.ranks:
        setting = Setting(
            gpus=count,
            height=height,
            width=width,
            num_frames=frames,
            guidance_scale=1.0 if options.unguided else 4.5,
            dtype=dtype,
            vae_dtype=dtype,
        )
        configs = (parts.transformer, dict(parts.vae.config))
        yield Task(make_plan(setting, parts), configs, options.steps)


def parts_of(options: argparse.Namespace) -> Parts:
    """The architecture, with as many layers as were asked for."""
    parts = build_parts(MODELS[options.model])
    layers = options.layers or parts.transformer["num_layers"]
    return replace(parts, transformer={**parts.transformer, "num_layers": layers})


def machine() -> Result:
    """What the numbers depend on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    parts = parts_of(options)
    try:
        tasks = list(tasks_of(options, parts))
    except (PlanError, LayoutError) as error:
        options.parser.error(str(error))
    before = machine()
    records = {}
    for task in tasks:
        setting = task.plan.setting
        print(f"measuring {setting.gpus} ranks", flush=True)
        record = measure_group(task, options.device)
        records[setting.gpus] = add_prediction(record, task.plan, parts)
    layers, setting = parts.transformer["num_layers"], tasks[0].plan.setting
    print(
        f"{options.model}, {layers} layers, {setting.num_frames} frames of "
        f"{setting.width}x{setting.height}, {setting.dtype}, on "
        f"{next(iter(records.values()))['device']}; medians of {options.steps} turns"
    )
    show(records)
    if options.json:
        found = {"machine": before, "layers": layers, "setting": asdict(setting), "ranks": records}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"\nload average {os.getloadavg()[0]:.2f}; written to {options.json}")


if __name__ == "__main__":
    main()

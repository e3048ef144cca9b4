"""A process that calls `MochiPipeline` as its own documentation does, and encodes what comes out.

The other side of the end-to-end comparison, started by `overhead.py`: no slot, no queue, no
history, no web. It loads the model once, then answers one JSON line on stdout for each on stdin,
one video at a time. Its first line says that the model is loaded.

    python -m tests.benchmarks.plain --model assets/tiny-mochi --folder /tmp/out --threads 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import MochiPipeline

from mochi_app.engine import encode


def main() -> None:
    """Load, then serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = MochiPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print(json.dumps({"loaded": True, "threads": torch.get_num_threads()}), file=answers)
    for line in sys.stdin:
        print(json.dumps(make_video(pipe, json.loads(line), arguments.folder)), file=answers)


def make_video(pipe: MochiPipeline, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One call and its encode. `seconds` is from the request to the files; the hash comes after.

    `request` has the pipeline's own argument names, `seed`, `fps` and `name`, that of the file.
    """
    started = time.perf_counter()
    images = pipe(
        prompt=request["prompt"],
        negative_prompt="",
        height=request["height"],
        width=request["width"],
        num_frames=request["num_frames"],
        num_inference_steps=request["num_inference_steps"],
        guidance_scale=request["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(request["seed"]),
        output_type="np",
    ).frames[0]
    frames: encode.Frames = (images * 255).round().astype(np.uint8)  # F, H, W, 3
    called = time.perf_counter()
    encode.save(
        frames,
        folder,
        request["name"],
        fps=request["fps"],
        prompt=request["prompt"],
        metadata=request,
    )
    ended = time.perf_counter()
    return {
        "seconds": ended - started,
        "call": called - started,
        "encode": ended - called,
        "frames_hash": hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest(),
    }


if __name__ == "__main__":
    main()

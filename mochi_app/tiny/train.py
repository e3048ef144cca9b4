"""Train the embedded model from scratch, or resume where it stopped, and export it: one command.

    python -m mochi_app.tiny.train --resume --output assets/tiny-mochi --work train-tiny

Stages: the text encoder alone (a minute), then the VAE's decoder and the transformer at the same
time in two processes of one core each (hours), then the export into a MochiPipeline folder. Every
stage checkpoints into the work folder every two minutes; stopping it at any moment costs at most
that. `--init FOLDER` starts from exported weights where the work folder has no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import MochiPipeline

from mochi_app.tiny import build, data, train_decoder, train_text, train_transformer
from mochi_app.tiny.checkpoints import Training
from mochi_app.tiny.curve import draw_curves

logger = logging.getLogger(__name__)

STAGES = ("text", "decoder", "transformer")
BANK = "geometry.safetensors"
PER_CLASS = 256  # geometries rendered for each shape, motion and size


def initial_pipeline(options: argparse.Namespace) -> MochiPipeline:
    """The weights that a stage without a checkpoint starts from."""
    if options.init is None:
        return build.build_pipeline(options.seed)
    pipeline = MochiPipeline.from_pretrained(options.init)
    for name in ("vae", "text_encoder", "transformer"):
        getattr(pipeline, name).float()
    return pipeline


def start_stage(name: str, pipeline: MochiPipeline, options: argparse.Namespace) -> Training:
    """The stage's state over the pipeline's own modules, from its checkpoint if there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if name == "text":
            training = train_text.start(pipeline.text_encoder, options.work)
        elif name == "decoder":
            training = train_decoder.start(pipeline.vae, options.work)
        else:
            rate = options.transformer_rate
            training = train_transformer.start(pipeline.transformer, options.work, rate)
    if training.resume():
        logger.info("%s goes on at step %d", name, training.step)
    return training


def run_stage(name: str, options: argparse.Namespace) -> None:
    """Train one stage to its number of steps."""
    pipeline = initial_pipeline(options)
    training = start_stage(name, pipeline, options)
    if name == "text":
        steps = 0 if options.init is not None else options.text_steps
        train_text.run(training, pipeline.tokenizer, seed=options.seed, steps=steps)
    elif name == "decoder":
        train_decoder.run(training, seed=options.seed, steps=options.decoder_steps)
    else:
        text = start_stage("text", pipeline, options)
        captions = train_transformer.Captions(pipeline.tokenizer, text.averaged.encoder)
        bank = data.geometry_bank(options.work / BANK, options.geometries, options.seed)
        train_transformer.run(
            training,
            captions,
            data.LatentSource(bank),
            seed=options.seed,
            steps=options.transformer_steps,
            compiled=not options.eager,
        )


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights of all stages as a pipeline folder, and their loss curves."""
    pipeline = initial_pipeline(options)
    curves = {}
    for name in STAGES:
        training = start_stage(name, pipeline, options)
        curves[name] = training.losses
        averaged = training.averaged.state_dict()
        if name == "text":
            encoder = training.averaged.encoder
            averaged = encoder.state_dict()  # type: ignore[union-attr]
            pipeline.text_encoder.load_state_dict(averaged)
        elif name == "decoder":
            pipeline.vae.decoder.load_state_dict(averaged)
        else:
            pipeline.transformer.load_state_dict(averaged)
    build.save_pipeline(pipeline, options.output, options.notice)
    draw_curves(curves).save(options.output / "loss.png")
    logger.info("%s: %.1f MiB", options.output, build.folder_mebibytes(options.output))


def run_all(options: argparse.Namespace) -> None:
    """Text, then decoder and transformer side by side, then the export."""
    run_stage("text", options)
    command = [sys.executable, "-m", "mochi_app.tiny.train", *sys.argv[1:], "--stage", "decoder"]
    decoder = subprocess.Popen([*command, "--resume"])
    try:
        run_stage("transformer", options)
        status = decoder.wait()
    finally:
        decoder.terminate()
        decoder.wait()
    if status != 0:
        raise SystemExit(f"the decoder's training ended with exit status {status}: see its log")
    export(options)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description="Train and export the embedded model.")
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-mochi"))
    parser.add_argument("--work", type=Path, default=Path("train-tiny"), help="checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints")
    parser.add_argument("--init", type=Path, default=None, help="start from an exported folder")
    parser.add_argument("--stage", choices=("all", *STAGES, "export"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--decoder-steps", type=int, default=5000)
    parser.add_argument("--transformer-steps", type=int, default=6000)
    parser.add_argument(
        "--transformer-rate",
        type=float,
        default=train_transformer.RATE,
        help="AdamW's learning rate; 4e-4 goes on best from exported weights",
    )
    parser.add_argument(
        "--geometries", type=int, default=PER_CLASS, help="of each shape, motion and size"
    )
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no C++ compiler")
    parser.add_argument("--notice", default=None, help="what the page says about the model")
    return parser.parse_args(arguments)


def check_work(options: argparse.Namespace) -> None:
    """Refuse to overwrite checkpoints without `--resume`."""
    options.work.mkdir(parents=True, exist_ok=True)
    found = [name for name in STAGES if (options.work / f"{name}.pt").exists()]
    if found and not options.resume and options.stage != "export":
        raise SystemExit(
            f"{options.work} holds checkpoints of {', '.join(found)}: "
            "pass --resume to go on from them, or another --work"
        )


def keep_memory() -> None:
    """Restart with glibc told to keep freed memory: large tensors come and go at each step."""
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.environ.update(wanted, MALLOC_TOP_PAD_="300000000")
        os.execv(sys.executable, [sys.executable, "-m", "mochi_app.tiny.train", *sys.argv[1:]])


def main() -> None:
    """Command line."""
    options = parse_arguments()
    keep_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    check_work(options)
    logger.info("options %s", json.dumps(vars(options), default=str))
    if options.stage == "all":
        run_all(options)
    elif options.stage == "export":
        export(options)
    else:
        run_stage(options.stage, options)


if __name__ == "__main__":
    main()

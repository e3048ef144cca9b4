"""The weights of a model, found, downloaded and checked on this machine before any rank starts.

A separate command, so that it can be killed and a hang blocks nothing else:

    python -m mochi_app.weights --model genmo/mochi-1-preview --dtype bfloat16

It prints events as JSON lines (`events.py`), the last of them `done` (exit status 0) or
`error` (1); the parent's side is `fetch_weights`. Neither side imports torch; only the child
imports huggingface_hub (`hub_cache.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mochi_app.child_process import die_with_parent, leave
from mochi_app.weights.events import Done, Failure, WeightsError, emit_line
from mochi_app.weights.files import DTYPES, PartTypes
from mochi_app.weights.hub_cache import PATIENCE_SECONDS, Options, provide


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="mochi_app.weights", description="Bring a model's weights onto this box."
    )
    parser.add_argument("--model", required=True, help="id on the Hub, or a folder")
    parser.add_argument("--dtype", required=True, choices=DTYPES, help="the transformer's")
    parser.add_argument("--text-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--vae-dtype", choices=DTYPES, help="that of --dtype if omitted")
    parser.add_argument(
        "--free-margin-gib", type=float, default=2, help="GiB that must stay free on the disk"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        help="seconds that a file may bring no byte, retries included",
    )
    given = parser.parse_args(argv)
    # Xet has no partial files to resume from, bars would fill the log. Read when hub is imported.
    for name in ("XET", "PROGRESS_BARS", "TELEMETRY"):
        os.environ[f"HF_HUB_DISABLE_{name}"] = "1"
    types = PartTypes(given.dtype, given.text_dtype, given.vae_dtype or given.dtype)
    options = Options(types, int(given.free_margin_gib * (1 << 30)), given.patience)
    try:
        folder = provide(given.model, options, emit_line)
    except WeightsError as error:
        emit_line(Failure(str(error), error.retry))
        leave(1)  # other files' threads may wait for the network
    emit_line(Done(str(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Start the app: `python -m mochi_app`, or `mochi-studio` if the package is installed."""

from __future__ import annotations

import argparse
import sys

from mochi_app import __version__
from mochi_app.startup import require_temporary_folder


def main() -> int:
    """Run the app; the exit code says whether it could start."""
    parser = argparse.ArgumentParser(
        prog="mochi-studio",
        description="Share Mochi, the open text-to-video model, with a team.",
        epilog="Settings are environment variables: MOCHI_MODEL, MOCHI_SLOTS, MOCHI_DATA_DIR,"
        " GRADIO_SERVER_NAME, GRADIO_SERVER_PORT and more, see docs/settings.md.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.parse_args()
    require_temporary_folder()
    from mochi_app.app import main as serve  # not earlier: importing Gradio needs the folder

    return serve()


if __name__ == "__main__":
    sys.exit(main())

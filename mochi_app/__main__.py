"""Start the app: `python -m mochi_app`, or `mochi-studio` where the package is installed."""

from __future__ import annotations

import sys

from mochi_app.startup import require_temporary_folder


def main() -> int:
    """Run the app; the exit code says whether it could start."""
    require_temporary_folder()
    from mochi_app.app import main as serve  # not before: Gradio needs the folder as it is imported

    return serve()


if __name__ == "__main__":
    sys.exit(main())

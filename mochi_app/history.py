"""The former name of `python -m mochi_app.store`, kept for one version."""

from __future__ import annotations

import sys

from mochi_app.store.__main__ import main

if __name__ == "__main__":
    sys.stderr.write("python -m mochi_app.history is python -m mochi_app.store now\n")
    sys.exit(main())

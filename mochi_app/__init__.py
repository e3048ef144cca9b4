"""A Gradio app that shares Mochi, the open text-to-video model, with a team."""

import sys

__version__ = "0.1.0"

# Checked here, before anything else that a command of the project runs: its modules import what
# only Linux and macOS have.
if sys.platform == "win32":
    sys.stderr.write(
        "cannot start: Windows is not supported; run Mochi Studio in WSL 2 or Docker\n"
    )
    raise SystemExit(2)

"""What must be there before the app's own libraries can be imported."""

from __future__ import annotations

import sys
import tempfile


def require_temporary_folder() -> None:
    """End the program, with one line, where nothing temporary can be written: Gradio asks for such
    a folder as it is imported.

    Raises:
        SystemExit: status 2.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        sys.stderr.write(
            f"cannot start: {error.strerror}: let TMPDIR name a folder that this user can write"
            " to, on a disk with room\n"
        )
        raise SystemExit(2) from None

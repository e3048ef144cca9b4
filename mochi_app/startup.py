"""Checks that must pass before the app's libraries can be imported."""

from __future__ import annotations

import sys
import tempfile


def require_temporary_folder() -> None:
    """Exit with a one-line message if there is no writable temporary folder, which Gradio needs
    when it is imported.

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

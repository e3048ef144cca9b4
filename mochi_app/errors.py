"""Errors formatted for people: on one line, bounded, and without the server's folders."""

from __future__ import annotations

import re

MAX_CHARS = 300
# An absolute path that ends in a name; not the path of a URL, nor the slash of "and/or".
FOLDERS = re.compile(r"(?<![\w:/.])(?:/[^\s/'\":,;]+)+/(?=[^\s/'\":,;])")


def without_folders(text: str) -> str:
    """The text with every absolute path cut to its last name."""
    return FOLDERS.sub("", text)


def one_line(error: BaseException, *, paths: bool = False) -> str:
    """`TypeName: message` on one line, truncated; folders are cut from paths unless `paths`."""
    text = " ".join(str(error).split())
    text = "".join(char for char in text if char.isprintable())
    if not paths:
        text = without_folders(text)
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


class MediaError(ValueError):
    """A file is not what it should be. The message names the file, without its folder, and why."""


class HistoryError(RuntimeError):
    """The store cannot be used. The message says what was found and what to do."""

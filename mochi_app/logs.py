"""The log: one line per event, as text or as JSON, with the job and the slot that it is about.

What people typed, or a library prints, cannot forge a line or control a terminal: unprintable
characters are escaped.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TextIO

log = logging.getLogger("stderr")

OURS = {"mochi_app", "tests", "__main__"}  # the first part of our loggers' names
PACKAGE = Path(__file__).parent
FORMAT = "%(asctime)s %(levelname)s %(message)s"  # a child's; `level_of` reads it
LEVEL = re.compile(r"[-\d]{10} [:\d]{8},\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
GLOG = re.compile(r"\[?([IWEF])\d{4} [:\d]{8}\.\d+ ")  # also torch's own, C++ or Python
WARNING = re.compile(r"\S+:\d+: \w*Warning: |(\w*Warning|WARNING):? ")

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 - never changed


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Add fields (`job`, `slot`) to what is logged inside, by this task and those it starts."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def printable(text: str) -> str:
    """The text with line feeds and control, bidi and other unprintable characters escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


class Lines(logging.Formatter):
    """`time LEVEL logger [slot=0 job=…]: message`; a traceback follows, line by line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        fields = " ".join(f"{name}={value}" for name, value in _about.get().items())
        head = f"{self.formatTime(record)} {record.levelname} {record.name}"
        lines = [f"{head}{f' [{fields}]' if fields else ''}: {printable(record.getMessage())}"]
        return "\n".join([*lines, *trace(record)])


class JsonLines(logging.Formatter):
    """One object per line: `time` (UTC, ISO 8601), `level`, `logger`, `message`, the fields of
    `about`, and `trace`, a list of lines, if there was an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
        }
        if lines := trace(record):
            entry["trace"] = lines
        return json.dumps(entry, default=str)


def trace(record: logging.LogRecord) -> list[str]:
    """The lines of the record's traceback, escaped; empty without one."""
    if not record.exc_info or record.exc_info[1] is None:
        return []
    text = "".join(traceback.format_exception(*record.exc_info))
    return [printable(line) for line in text.rstrip().split("\n")]


class LoggedLines(io.TextIOBase):
    """Replaces stderr: Gradio prints tracebacks there, which contain what a caller sent. Each line
    becomes a log event."""

    def __init__(self, behind: TextIO) -> None:
        self._behind = behind
        self._partial = ""
        self._busy = False

    def write(self, text: str) -> int:
        """Log the complete lines."""
        if self._busy:  # logging itself reports an error
            self._behind.write(printable(text) + "\n")
            return len(text)
        *lines, self._partial = (self._partial + text).split("\n")
        self._busy = True
        try:
            for line in lines:
                log.error("%s", line)
        finally:
            self._busy = False
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind; complete lines are logged already."""
        self._behind.flush()

    def fileno(self) -> int:
        """The descriptor of the stream behind."""
        return self._behind.fileno()


class LibraryFilter(logging.Logger):
    """A logger for a process full of libraries: each record goes to the root's handlers, whatever
    handlers the library has added, and a library's records below ERROR are moved to debug level,
    except those of packages in `heard`, named by the logger or in the message."""

    heard: ClassVar[set[str]] = set()

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Pass the record to the root's handlers."""
        if self._foreign(record):
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
            record.msg, record.args = " ".join(record.getMessage().split()), None
        logging.getLogger().callHandlers(record)

    def _foreign(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or record.name.split(".")[0] in OURS:
            return False
        text = f"{record.name} {record.getMessage()}"
        # Python's warnings name the file that they are about.
        ours = record.name == "py.warnings" and str(PACKAGE) in text
        return not ours and not any(word in text for word in self.heard)


def filter_libraries(level: str, heard: set[str]) -> None:
    """Use `LibraryFilter` for modules imported from now on, and for Python's warnings. `level` is
    that of `start_logging`."""
    LibraryFilter.heard = heard
    logging.setLoggerClass(LibraryFilter)
    logging.captureWarnings(True)
    for handler in logging.getLogger().handlers:
        handler.setLevel(level.upper())


def level_of(line: str) -> int:
    """The level of a line from a child process: the one it states; debug for information and
    warnings in the formats of glog and Python; else INFO."""
    if match := LEVEL.match(line):
        return logging.getLevelNamesMapping()[match[1]]
    if match := GLOG.match(line):
        return logging.ERROR if match[1] in "EF" else logging.DEBUG
    return logging.DEBUG if WARNING.match(line) else logging.INFO


def log_stderr() -> None:
    """Log what is written to stderr from now on; call once, after `start_logging`."""
    sys.stderr = LoggedLines(sys.stderr)


def start_logging(form: str, level: str = "info") -> None:
    """Log to stderr from now on, as `text` or `json`, at this `level` or above. The debug level
    includes the app's own events and libraries' warnings, but not libraries' debug output."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for logger in (logging.getLogger("mochi_app"), logging.getLogger("py.warnings")):
        logger.setLevel(level.upper())
    logging.getLogger("py.warnings").addFilter(at_debug_level)
    if level == "warning":
        logging.getLogger().setLevel(logging.WARNING)


def at_debug_level(record: logging.LogRecord) -> bool:
    """Filter: move a library's warning to debug level."""
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    record.msg, record.args = " ".join(record.getMessage().split()), None
    return logging.getLogger("mochi_app").isEnabledFor(logging.DEBUG)

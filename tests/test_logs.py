"""The log tells what it is about, and nobody who is quoted in it can forge a line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys

import pytest

from mochi_app import logs
from mochi_app.logs import JsonLines, Lines, about

HOSTILE = "\x1b[31mred\x1b[0m\n2026-01-01 INFO forged\r\u202eright to left\u2028"


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    trace = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("mochi_app.test", logging.INFO, "f.py", 1, message, args, trace)


@pytest.mark.parametrize("form", [Lines(), JsonLines()])
def test_a_hostile_text_stays_on_its_line_and_is_escaped(form: logging.Formatter) -> None:
    line = form.format(record("prompt %s", HOSTILE))
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_a_line_names_slot_and_job_of_its_own_task_only() -> None:
    said: list[str] = []

    async def run(slot: int, job: str) -> None:
        with about(slot=slot), about(job=job):
            await asyncio.sleep(0)
            said.append(await asyncio.to_thread(Lines().format, record("step")))

    async def both() -> None:
        await asyncio.gather(run(0, "a"), run(1, "b"))
        said.append(Lines().format(record("idle")))

    asyncio.run(both())
    assert "[slot=0 job=a]: step" in said[0]
    assert "[slot=1 job=b]: step" in said[1]
    assert "mochi_app.test: idle" in said[2]


def test_json_has_fields_and_the_traceback() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        error = sys.exc_info()[1]
    with about(slot=1, job="j"):
        told = json.loads(JsonLines().format(record("failed", error=error)))
    assert (told["slot"], told["job"], told["level"]) == (1, "j", "INFO")
    assert told["message"] == "failed"
    assert told["trace"][0].startswith("Traceback")
    assert "\x1b" not in "".join(told["trace"])


# Log
def test_what_is_written_to_stderr_becomes_lines_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = logs.LoggedLines(behind := io.StringIO())
    for part in ("Trace", "back\nValueError: \x1b[2J\n2026 ERROR forged\n", "not yet"):
        stream.write(part)
    assert caplog.messages == ["Traceback", "ValueError: \x1b[2J", "2026 ERROR forged"]
    stream._busy = True
    stream.write("\x1b[2J")
    assert behind.getvalue() == "\\x1b[2J\n"

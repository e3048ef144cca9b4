"""Checks of what callers send, and the one form in which it is refused."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request is refused. The message names the field, the value given and what is accepted."""


class NotFound(RequestError):
    """No job has this id."""


class NotYours(RequestError):
    """The job is another caller's."""


class Conflict(RequestError):
    """The request is well formed, but the job's state does not allow it."""


def safe_repr(value: Any, limit: int = 60) -> str:
    """`repr` of a caller's value, cut to `limit` characters and safe to print anywhere."""
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!a}… ({len(value)} characters)"
    try:
        whole_text = ascii(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a {type(value).__name__} too long to show"
    return whole_text if len(whole_text) <= limit else whole_text[:limit] + "…"


def refuse(name: str, value: Any, expected: str) -> RequestError:
    """The one form of a refusal: field, value, what is accepted."""
    return RequestError(f"{name}: got {safe_repr(value)}, expected {expected}")


def check_text(name: str, value: Any, *, least: int, most: int) -> str:
    """`value` trimmed, `least` to `most` characters, free of NUL and lone surrogates.

    Raises:
        RequestError: it is not such a text.
    """
    expected = f"a text of {least} to {most} characters"
    if not isinstance(value, str):
        raise refuse(name, value, expected)
    trimmed = value.strip()
    if not least <= len(trimmed) <= most:
        raise refuse(name, value, f"{expected} after trimming")
    if "\0" in trimmed:
        raise refuse(name, value, f"{expected} without NUL characters")
    if any("\ud800" <= char <= "\udfff" for char in trimmed):
        raise refuse(name, value, f"{expected} in valid Unicode, without lone surrogates")
    return trimmed


def check_number(name: str, value: Any, *, least: float, most: float) -> float:
    """`value` as a finite float from `least` to `most`.

    Raises:
        RequestError: it is not such a number.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # false for NaN, too
        raise refuse(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def check_integer(
    name: str, value: Any, *, least: int, most: int, multiple: int = 1, offset: int = 0
) -> int:
    """`value` as an int from `least` to `most` of the form `multiple`·k + `offset`.

    An integral float (a slider's 8.0) is taken; a bool or a text is not.

    Raises:
        RequestError: it is not such a number.
    """
    expected = f"a whole number from {least} to {most}"
    if multiple > 1:
        expected += (
            f" of the form {multiple}k+{offset}" if offset else f", a multiple of {multiple}"
        )
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most or value % 1 or value % multiple != offset:
        raise refuse(name, value, expected)
    return int(value)

"""Frozen dataclasses to lines of JSON and back, every field checked by its type.

What crosses a process boundary goes through here: the messages of a slot and its ranks, the events
of a download. A process that only speaks never loads pydantic, so it starts without it.
"""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = TypeVar("Kind")

MAX_ERRORS = 3  # told of one line


class ProtocolError(ValueError):
    """A line is not what its channel carries. The message names the field and what was expected."""


class Codec(Generic[Kind]):
    """The lines of one channel. `kinds` are its dataclasses by the names that the field `tag` has;
    a line has all fields of its kind, defaults as well, and no others."""

    def __init__(self, tag: str, kinds: Mapping[str, type[Kind]]) -> None:
        self.tag = tag
        self._kinds = kinds
        self._names = {kind: name for name, kind in kinds.items()}

    def encode(self, value: Kind) -> str:
        """One line of ASCII, newline included."""
        record = {self.tag: self._names[type(value)]} | asdict(value)  # type: ignore[call-overload]
        return json.dumps(record, separators=(",", ":")) + "\n"

    def decode(self, line: str | bytes) -> Kind:
        """What a line says.

        Raises:
            ProtocolError: it is no JSON object, of no known kind, or has not exactly its fields,
                each of its type.
        """
        return self.read(parse(line))

    def read(self, record: Mapping[str, Any]) -> Kind:
        """What the object of a line says. Raises ProtocolError, as `decode`."""
        name = record.get(self.tag)
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ProtocolError(
                f"{self.tag}={reprlib.repr(name)}: expected one of {', '.join(self._kinds)}"
            )
        given = {key: value for key, value in record.items() if key != self.tag}
        return kind(**checked(kind, str(name), given))


def parse(line: str | bytes) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        ProtocolError: there is none.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{line[:80]!r}: expected JSON ({error})") from error
    if not isinstance(record, dict):
        raise ProtocolError(f"{line[:80]!r}: expected a JSON object")
    return record


def checked(kind: type, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields for `kind`, which is called `name`. Raises ProtocolError."""
    from pydantic import ValidationError

    try:
        model = model_of(kind).model_validate(given)
    except ValidationError as error:
        told = [fault(name, item) for item in error.errors(include_url=False)[:MAX_ERRORS]]
        raise ProtocolError("; ".join(told)) from None
    return dict(model)


@functools.cache
def model_of(kind: type) -> type[BaseModel]:
    """What checks the fields of a dataclass: none may lack, none may be taken for what it
    resembles. (As a dataclass pydantic would let those with a default lack.)"""
    from pydantic import ConfigDict, create_model

    hints = get_type_hints(kind)
    asked: dict[str, Any] = {item.name: (hints[item.name], ...) for item in fields(kind)}
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    return create_model(kind.__name__, __config__=config, **asked)


def fault(name: str, item: Mapping[str, Any]) -> str:
    """One of pydantic's errors: whose field it is, what it had, what was expected."""
    field = ".".join(shortened(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{name} without {field}"
    expected = item["msg"].removeprefix("Input should be ")
    if item["type"] == "extra_forbidden":
        expected = "no such field"
    return f"{name}: {field}={reprlib.repr(item['input'])}: expected {expected}"


def shortened(part: object) -> str:
    """A field's or a key's name, which a stranger may have chosen."""
    name = str(part)
    return name if len(name) <= 40 else f"{name[:37]}..."

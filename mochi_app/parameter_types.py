"""How a parameter of a request is declared: its kinds, with their checks and what the page needs.

`parameters.py` has the declarations themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mochi_app.model_defaults import ModelDefaults
from mochi_app.request import check_integer, check_number, check_text, refuse

MAX_LORA_CHARS = 2000
NO_LORAS = "nothing, this server has none"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server offers: its model's defaults and limits, the steps of a preview, its LoRAs."""

    defaults: ModelDefaults
    preview_steps: int = 8
    loras: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter(ABC):
    """The declaration of one parameter, without its name and Python type, which are the field's.

    `help` is a sentence for the API's documentation. `omitted` gives the value for a request that
    leaves the parameter out; without it the parameter is required. `position` is the parameter's
    place among the API's positional arguments, from 1: a promise to callers, so a new parameter
    takes the next number; None is for what cannot be asked for.

    `label` is its name on the page; parameters with the same `row` stand side by side in the form,
    and `info` explains the field. The details of a job show it `always`, when it is not the field's
    default (`changed`), or not by themselves ("").
    """

    help: str
    omitted: Callable[[Offer], Any] | None = None
    position: int | None = None
    label: str = ""
    row: str = ""
    info: Callable[[Offer], str] | None = None
    detail: str = ""

    @abstractmethod
    def check(self, name: str, value: Any, offer: Offer) -> Any:
        """`value` as this server takes it. Raises RequestError."""

    @abstractmethod
    def read(self, name: str, value: Any) -> Any:
        """`value` as a video of any server may have it in its metadata. Raises RequestError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Parameter):
    """`least` to `most` characters after trimming."""

    most: int
    least: int = 0

    def check(self, name: str, value: Any, offer: Offer) -> str:
        """See Parameter."""
        return self.read(name, value)

    def read(self, name: str, value: Any) -> str:
        """See Parameter."""
        return check_text(name, value, least=self.least, most=self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Integer(Parameter):
    """A whole number of the form `multiple`·k + `offset`, from `least` to the server's `most`;
    `widest` are the limits over all servers."""

    least: int
    most: Callable[[Offer], int]
    widest: tuple[int, int]
    multiple: int = 1
    offset: int = 0

    def check(self, name: str, value: Any, offer: Offer) -> int:
        """See Parameter."""
        return check_integer(
            name,
            value,
            least=self.least,
            most=self.most(offer),
            multiple=self.multiple,
            offset=self.offset,
        )

    def read(self, name: str, value: Any) -> int:
        """See Parameter."""
        least, most = self.widest
        return check_integer(name, value, least=least, most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Parameter):
    """A finite number from `least` to `most`; the page moves it by `step`."""

    least: float
    most: float
    step: float

    def check(self, name: str, value: Any, offer: Offer) -> float:
        """See Parameter."""
        return self.read(name, value)

    def read(self, name: str, value: Any) -> float:
        """See Parameter."""
        return check_number(name, value, least=self.least, most=self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Parameter):
    """One of the keys of `options`, whose values are their names on the page."""

    options: Mapping[str, str]

    def check(self, name: str, value: Any, offer: Offer) -> str:
        """See Parameter."""
        return self.read(name, value)

    def read(self, name: str, value: Any) -> str:
        """See Parameter."""
        if not isinstance(value, str) or value not in self.options:
            raise refuse(name, value, " or ".join(self.options))
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraName(Parameter):
    """One of the server's LoRAs; None or an empty text is none."""

    def check(self, name: str, value: Any, offer: Offer) -> str | None:
        """See Parameter."""
        if value is None or value == "":
            return None
        if value not in offer.loras:
            raise refuse(name, value, ", ".join(sorted(offer.loras)) or NO_LORAS)
        return str(value)

    def read(self, name: str, value: Any) -> str | None:
        """See Parameter."""
        return None if value is None else check_text(name, value, least=1, most=MAX_LORA_CHARS)

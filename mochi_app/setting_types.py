"""What settings are made of: their types, and how each is read from text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode


@dataclass(frozen=True)
class SlotSpec:
    """The devices of one slot, one per rank: `("cpu",)`, `("0",)`, `("0", "1", "2", "3")`."""

    devices: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.devices)

    def __str__(self) -> str:
        if self.devices[0] == "cpu":
            return "cpu" if len(self.devices) == 1 else f"cpu*{len(self.devices)}"
        return ",".join(self.devices)


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a run may show no progress, and that a cancel may wait for its boundary."""

    step: float
    cancel: float


GPU_NUMBER = re.compile("0|[1-9][0-9]{0,2}")
SLOTS_EXPECTED = "slots separated by ';', each 'cpu', 'cpu*N' or GPU numbers such as '0' or '0,1'"


def parse_slots(value: Any) -> Any:
    """Parse `"0,1,2,3;4,5,6,7"`, `"cpu;cpu"` or `"cpu*2"` into a tuple of `SlotSpec`.

    Raises:
        ValueError: the text does not parse, or one GPU is named twice.
    """
    if not isinstance(value, str):
        return value
    slots: list[SlotSpec] = []
    for part in value.split(";"):
        name, star, count = part.strip().partition("*")
        devices = [device.strip() for device in name.split(",")]
        if star:
            if devices != ["cpu"] or not re.fullmatch(r" *[1-9][0-9]? *", count):
                raise ValueError(SLOTS_EXPECTED)
            devices *= int(count)
        elif devices != ["cpu"] and not all(GPU_NUMBER.fullmatch(device) for device in devices):
            raise ValueError(SLOTS_EXPECTED)
        slots.append(SlotSpec(tuple(devices)))
    gpus = [device for slot in slots for device in slot.devices if device != "cpu"]
    if len(set(gpus)) != len(gpus):
        raise ValueError(f"{SLOTS_EXPECTED}; every GPU in one place only")
    return tuple(slots)


Slots = Annotated[tuple[SlotSpec, ...], NoDecode, BeforeValidator(parse_slots), Field(min_length=1)]


def existing_folder(folder: Path | None) -> Path | None:
    """The folder's full path.

    Raises:
        ValueError: there is none.
    """
    if folder is None:
        return None
    full = folder.expanduser().resolve()
    if not full.is_dir():
        raise ValueError("expected a folder that exists")
    return full


def parse_origins(value: Any) -> Any:
    """Parse `"https://a.example https://b.example:8443"` into a tuple of origins, lower case.

    Raises:
        ValueError: one of them is no origin.
    """
    if not isinstance(value, str):
        return value
    origins = tuple(value.lower().replace(",", " ").split())
    if not all(ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError(
            "expected origins such as 'https://app.example' or 'http://127.0.0.1:8000',"
            " separated by blanks"
        )
    return origins


ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|(\*\.)?[a-z0-9._-]+)(:[0-9]{1,5})?")
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_origins)]


def parse_hosts(value: Any) -> Any:
    """Parse `"mochi.example *.lab.example"` into a tuple of host names, lower case, no final dot.

    Raises:
        ValueError: one of them is no host name.
    """
    if not isinstance(value, str):
        return value
    hosts = value.lower().replace(",", " ").split()
    if not all(ALLOWED_HOST.fullmatch(host) for host in hosts):
        raise ValueError(
            "expected host names such as 'mochi.example', '*.lab.example' for all below a name, or"
            " '*' for all, without scheme and port, separated by blanks"
        )
    return tuple(host.removesuffix(".") for host in hosts)


HOST_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"
ALLOWED_HOST = re.compile(rf"\*|(?:\*\.)?{HOST_NAME}\.?|\[[0-9a-f:.]+\]")
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_hosts)]


def addresses(value: str) -> str:
    """The addresses and networks, as uvicorn reads them.

    Raises:
        ValueError: one of them is none.
    """
    for part in filter(None, map(str.strip, value.split(","))):
        try:
            if part != "*":
                ip_network(part)
        except ValueError:
            expected = "expected addresses or networks such as 10.0.0.1 or 10.0.0.0/8, or *"
            raise ValueError(f"{part!r}: {expected}") from None
    return value.strip()


Dtype = Literal["auto", "float32", "bfloat16"]
Steps = Annotated[int, Field(ge=2, le=512)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

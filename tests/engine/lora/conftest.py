"""Fixtures of the tests of LoRAs: some files, and the pipeline that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import MochiPipeline

from tests.lora_files import (
    WIDE,
    latents,
    open_tiny,
    wrapped,
    write_lora,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`narrow` without metadata, `wide` with a scale of 2 in its metadata, `third`."""
    path = tmp_path_factory.mktemp("loras")
    write_lora(path, "narrow", 0)
    write_lora(path, "wide", 1, WIDE, alpha=4)
    write_lora(path, "third", 2)
    return path


@pytest.fixture(scope="module")
def pipe() -> Iterator[MochiPipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_tiny()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock(pipe: MochiPipeline) -> torch.Tensor:
    """What the pipeline makes before it ever saw a LoRA."""
    assert not wrapped(pipe)
    return latents(pipe)

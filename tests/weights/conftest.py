"""Fixtures of the weights' tests: a stand-in hub and a home of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.downloads import (
    tiny_files,
)
from tests.hub import Hub, folder_files
from tests.places import TINY


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(tiny_files()) as hub:
        yield hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which asks the stand-in hub; returns where it will be."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hf" / "hub" / "models--genmo--mochi-1-preview"


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository as mixed as the real one: two components in both variants, one in shards."""
    import torch
    from diffusers import MochiPipeline

    folder = tmp_path_factory.mktemp("variants")
    pipe = MochiPipeline.from_pretrained(TINY, dtype=torch.bfloat16)
    pipe.transformer.save_pretrained(folder / "transformer", variant="bf16", max_shard_size="3MB")
    pipe.vae.save_pretrained(folder / "vae", variant="bf16")
    others = dict.fromkeys(("dit.safetensors", "vae/model.bin"), b"not for diffusers")
    return tiny_files() | folder_files(folder) | others


# A folder
@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of a model that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))

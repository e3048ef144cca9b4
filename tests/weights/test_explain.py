"""Failures in words that say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from mochi_app.weights.explain import explain_failure, hub_name


@pytest.mark.parametrize(
    ("number", "words", "retry"),
    [(errno.ENOSPC, "full", True), (errno.EROFS, "HF_HOME", False), (errno.EIO, "disk", True)],
)
def test_a_failing_disk_is_told_with_what_to_do(number: int, words: str, retry: bool) -> None:
    error = explain_failure([OSError(number, os.strerror(number))], Path("/cache"))
    assert "/cache" in str(error)
    assert words in str(error)
    assert error.retry is retry


def test_a_token_in_the_hubs_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret@mirror.example:8443/hf")
    assert hub_name() == "https://mirror.example:8443/hf"

"""A snapshot of a repository."""

from __future__ import annotations

from pathlib import Path

from mochi_app.weights.events import (
    Progress,
)
from mochi_app.weights.snapshot import RemoteFile, Snapshot
from tests.hub import REPO


def test_files_of_the_same_content_count_once() -> None:
    files = [RemoteFile("a", 5, "x"), RemoteFile("b", 5, "x"), RemoteFile("c", 1, "y")]
    snapshot = Snapshot(Path("/nowhere"), REPO, "0", files)
    assert snapshot.total == 6
    assert snapshot.progress() == Progress(0, 6, "")

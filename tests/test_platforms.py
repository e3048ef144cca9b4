"""The app where the functions of Linux alone are missing, in real processes."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mochi_app import files, platforms
from mochi_app.web import connections
from tests.conftest import alive
from tests.serving import Served, poll

# A stand-in for macOS, in every Python process of the server.
UNLIKE_LINUX = """
import ctypes, os, signal, socket

class CDLL(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "prctl":
            {prctl}
        return super().__getattr__(name)

ctypes.CDLL = CDLL
for name in ("sched_getaffinity", "sched_setaffinity", "pidfd_open", "posix_fallocate",
             "posix_fadvise", "setxattr", "getxattr", "listxattr", "memfd_create", "O_PATH"):
    if hasattr(os, name):
        delattr(os, name)
"""
MISSING = 'raise AttributeError("dlsym: symbol not found")'
REFUSED = "return lambda *_: -1"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the app unlike Linux, with a slot of two ranks."""
    folder = tmp_path_factory.mktemp("unlike_linux")
    (folder / "sitecustomize.py").write_text(UNLIKE_LINUX.format(prctl=MISSING))
    server = Served(
        folder / "data", PYTHONPATH=str(folder), MOCHI_NUM_FRAMES="7", MOCHI_SLOTS="cpu*2"
    )
    yield server.start().ready()
    server.end()


def test_two_ranks_meet_and_make_a_preview(served: Served) -> None:
    job = served.call("submit_job", prompt="a red circle", seed=1)
    assert served.ended(job["id"])["status"] == "COMPLETED"


def test_no_rank_outlives_the_server(served: Served) -> None:
    """The last of the module to use the server, which it kills."""
    pids = served.pids()
    assert len(pids) == 2
    served.kill()
    poll(lambda: not any(alive(pid) for pid in pids), "the end of the ranks")
    assert "Traceback" not in served.log.read_text()


CHILD = """
import subprocess, sys, time
from mochi_app.child_process import die_with_parent
die_with_parent()
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE,
                         start_new_session=True, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("prctl", [MISSING, REFUSED], ids=["missing", "refused"])
def test_what_a_child_has_started_ends_with_it(tmp_path: Path, prctl: str) -> None:

    (tmp_path / "sitecustomize.py").write_text(UNLIKE_LINUX.format(prctl=prctl))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    try:
        poll(lambda: not any(alive(pid) for pid in pids), "the end of child and grandchild")
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_cores_without_an_affinity_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert platforms.usable_cores() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert platforms.usable_cores() == 1


@pytest.mark.parametrize(
    ("names", "loopback"),
    [(["lo", "eth0"], "lo"), (["lo0", "gif0", "en0"], "lo0"), (["eth0"], "lo")],
)
def test_loopback_is_named_as_the_system_names_it(
    names: list[str], loopback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(names, 1)))
    assert platforms.loopback() == loopback


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (35, "signal 35")])
def test_a_signal_without_a_name_is_a_number(number: int, name: str) -> None:
    assert platforms.signal_name(number) == name


def test_files_go_to_the_disk_where_fsync_does_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    asked: list[int] = []
    monkeypatch.setattr(files, "FULL_SYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", lambda _, command: asked.append(command))
    files.fsync(tmp_path / "file")
    assert asked == [51]

    def refuse(_: int, command: int) -> None:
        raise OSError(25, "Inappropriate ioctl for device")

    synced: list[int] = []
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    files.fsync(tmp_path / "file")
    assert len(synced) == 1


def test_files_are_allowed_as_far_as_macos_grants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    granted: list[tuple[int, int]] = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if limits[0] > 10240:
            raise ValueError("current limit exceeds maximum limit")
        granted.append(limits)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    connections.allow_files()
    assert granted == [(10240, resource.RLIM_INFINITY)]

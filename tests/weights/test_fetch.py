"""The parent's side of a download: progress, errors, cancels, deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mochi_app.files import PROJECT_DIR
from mochi_app.weights.events import (
    Progress,
    WeightsError,
)
from mochi_app.weights.fetch import fetch_weights
from tests.conftest import alive, eventually
from tests.downloads import (
    FLOAT32,
    MB,
)
from tests.hub import REPO, Hub


# The parent's side
def pid_command(path: Path) -> tuple[str, ...]:
    """The command, in a process that leaves its id in a file."""
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
        "from mochi_app.weights.__main__ import main; sys.exit(main(sys.argv[2:]))"
    )
    return (sys.executable, "-c", program, str(path))


def ignore(progress: Progress) -> None:
    pass


async def test_the_parent_hears_of_progress_and_gets_the_folder(hub: Hub, home: Path) -> None:
    heard: list[Progress] = []
    folder = await fetch_weights(REPO, FLOAT32, heard.append)
    assert folder == home / "snapshots" / hub.commit
    assert heard[-1].done == heard[-1].total > 25 * MB


async def test_the_parent_may_name_a_folder_relative_to_itself(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert await fetch_weights("model", FLOAT32, ignore) == copy


async def test_the_parent_gets_the_childs_error(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(WeightsError, match="try again later") as caught:
        await fetch_weights(REPO, FLOAT32, ignore)
    assert caught.value.retry


async def test_a_cancel_takes_the_child_along(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    seen = asyncio.Event()

    def hear(progress: Progress) -> None:
        if progress.done > 0:
            seen.set()

    pid_file = tmp_path / "pid"
    task = asyncio.create_task(fetch_weights(REPO, FLOAT32, hear, pid_command(pid_file)))
    await asyncio.wait_for(seen.wait(), 20)
    pid = int(pid_file.read_text())
    assert alive(pid)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)


async def test_a_cancel_during_the_start_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    spawn = asyncio.create_subprocess_exec

    async def slow_spawn(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await spawn(*arguments, **options))
        await asyncio.sleep(0.05)
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow_spawn)
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    task = asyncio.create_task(fetch_weights(REPO, FLOAT32, ignore, program))
    await eventually(lambda: started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(started[0].pid)


async def test_a_child_that_is_killed_is_told_by_its_signal(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    pid_file = tmp_path / "pid"

    def kill(progress: Progress) -> None:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    with pytest.raises(WeightsError, match="killed by SIGKILL") as caught:
        await fetch_weights(REPO, FLOAT32, kill, pid_command(pid_file))
    assert caught.value.retry


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; print('hello'); sys.exit('no such thing')", "code 1 .*no such thing"),
        ("pass", "code 0 and no result"),
        ('print(\'{"event": "done", "folder": "/"}\'); raise SystemExit(3)', "code 3"),
    ],
)
async def test_a_child_without_a_result_is_told_by_its_code(program: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        await fetch_weights(REPO, FLOAT32, ignore, (sys.executable, "-c", program))


async def test_the_child_dies_with_its_parent(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 1 * MB
    pid_file = tmp_path / "pid"
    program = (
        "import asyncio, sys; from mochi_app.weights.fetch import fetch_weights; "
        "from mochi_app.weights.files import PartTypes; "
        f"types, command = PartTypes(*3 * ['float32']), {pid_command(pid_file)!r}; "
        f"asyncio.run(fetch_weights({REPO!r}, types, print, command))"
    )
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), cwd=PROJECT_DIR, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    await parent.stdout.readline()
    pid = int(pid_file.read_text())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not alive(pid), "the end of the child", deadline=3)


async def test_a_child_that_says_nothing_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(3600)"
    )
    command = (sys.executable, "-c", program, str(pid_file))
    with pytest.raises(WeightsError, match="said nothing for 1 seconds") as caught:
        await fetch_weights(REPO, FLOAT32, ignore, command, silence=1)
    assert caught.value.retry
    assert not alive(int(pid_file.read_text()))

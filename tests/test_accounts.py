"""The accounts file under the command: owners, concurrent writers, kills, odd places."""

from __future__ import annotations

import io
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from mochi_app import accounts, files
from mochi_app.accounts import Account, Accounts, AccountsError
from mochi_app.files import PROJECT_DIR
from tests.people import cheap
from tests.serving import Served, poll

SERVER_UID = 1000

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def line(name: str) -> str:
    """A person's line; the password is `NAME's password`."""
    return f"{Account(name, cheap(f'{name}s password'))}\n"


def start(path: Path, *words: str, prelude: str = "", user: int = 0) -> subprocess.Popen[str]:
    """The command as a process of its own, after `prelude` has run in it."""
    become = f"os.setgroups([]); os.setgid({user}); os.setuid({user})" if user else ""
    # The user changes after the imports: a test's Python may lie where only root can read.
    code = f"{prelude}\nimport os, sys\nfrom mochi_app import accounts\n{become}\n"
    code += "sys.exit(accounts.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--file", str(path), *words],
        cwd=PROJECT_DIR,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(path: Path, *words: str, prelude: str = "", user: int = 0) -> tuple[int, str]:
    """Exit status and stderr of the command."""
    process = start(path, *words, prelude=prelude, user=user)
    _, said = process.communicate("a long password\n", timeout=60)
    return process.returncode, said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that any user can reach; the server's, if the test runs as root."""
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    made = tmp_path / "shared"
    made.mkdir()
    if os.geteuid() == 0:
        os.chown(made, SERVER_UID, SERVER_UID)
    tmp_path.chmod(0o755)
    return made


@pytest.fixture
def path(folder: Path) -> Path:
    """The accounts of ann and bob, which only the server can read, if the test runs as root."""
    path = folder / "accounts"
    path.write_text("# the team\n" + line("ann") + line("bob"))
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, SERVER_UID, SERVER_UID + 1)
    return path


def owned(path: Path) -> tuple[int, int, int]:
    """Owner, group and mode."""
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def names(path: Path) -> set[str]:
    """Whose lines there are."""
    return set(accounts.parse_accounts(path.read_text()))


def only(folder: Path) -> None:
    """Nothing but the accounts lies in the folder."""
    assert [entry.name for entry in folder.iterdir()] == ["accounts"]


@as_root
def test_owner_group_and_mode_stay_when_root_writes(path: Path) -> None:
    before = owned(path)
    assert command(path, "add", "eve")[0] == 0
    assert command(path, "remove", "ann")[0] == 0
    assert owned(path) == before
    assert names(path) == {"bob", "eve"}
    only(path.parent)


@as_root
def test_a_new_file_of_root_is_the_folders_owners(folder: Path) -> None:
    assert command(folder / "accounts", "add", "ann")[0] == 0
    assert owned(folder / "accounts") == (SERVER_UID, SERVER_UID, 0o600)
    only(folder)


def test_attributes_stay(path: Path) -> None:
    try:
        os.setxattr(path, "user.note", b"kept")
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")
    assert command(path, "add", "eve")[0] == 0
    assert os.getxattr(path, "user.note") == b"kept"


def test_twelve_at_once_lose_nobody(path: Path) -> None:
    added = {f"person-{number}" for number in range(12)}
    running = [start(path, "add", name) for name in added]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("a long password\n")
        process.stdin.close()
    assert [process.wait(120) for process in running] == [0] * 12
    for process in running:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.close()
        process.stdout.close()
    assert names(path) == added | {"ann", "bob"}
    only(path.parent)


def test_the_first_twelve_at_once_lose_nobody(folder: Path) -> None:
    running = [start(folder / "accounts", "add", f"person-{number}") for number in range(12)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("a long password\n")
        process.stdin.close()
        process.stdin = None
    assert [process.communicate(timeout=120)[1] for process in running] == [""] * 12
    assert len(names(folder / "accounts")) == 12
    only(folder)


FULL = """
import os, errno
def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.{name} = full
"""


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_file_and_folder_as_they_were(path: Path, name: str) -> None:
    before = path.read_text(), owned(path)
    status, said = command(path, "add", "eve", prelude=FULL.format(name=name))
    assert status == 2
    assert f"accounts in {path}: " in said
    assert "No space left" in said
    assert "Traceback" not in said
    assert (path.read_text(), owned(path)) == before
    only(path.parent)


KILLED = "import os, signal\nos.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("sweeper", ["command", "server"])
def test_what_a_kill_left_is_swept_by_the_next_use(path: Path, sweeper: str) -> None:
    before = path.read_text()
    assert command(path, "add", "eve", prelude=KILLED)[0] == -signal.SIGKILL
    assert path.read_text() == before
    assert len(list(path.parent.iterdir())) == 2
    if sweeper == "command":
        assert command(path, "add", "zoe")[0] == 0
    else:
        Accounts(path)
    only(path.parent)


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    assert command(link, "remove", "ann")[0] == 0
    assert link.is_symlink()
    assert names(path) == {"bob"}
    only(path.parent)


@as_root
def test_a_file_that_cannot_be_replaced_is_written_in_place(path: Path) -> None:
    os.chown(path.parent, 0, 0)
    path.parent.chmod(0o755)
    status, said = command(path, "remove", "ann", user=SERVER_UID)
    assert status == 0, said
    assert "written in place" in said
    assert names(path) == {"bob"}
    assert owned(path) == (SERVER_UID, SERVER_UID + 1, 0o640)
    only(path.parent)


@as_root
def test_a_file_of_another_owner_that_one_may_write_keeps_its_owner(path: Path) -> None:
    os.chown(path, 0, SERVER_UID)
    path.chmod(0o660)
    status, said = command(path, "remove", "ann", user=SERVER_UID)
    assert status == 0, said
    assert "written in place" in said
    assert owned(path) == (0, SERVER_UID, 0o660)
    assert names(path) == {"bob"}
    only(path.parent)


@as_root
def test_what_may_not_be_written_is_told(path: Path) -> None:
    os.chown(path, 0, SERVER_UID)
    path.parent.chmod(0o555)
    before = path.read_text()
    status, said = command(path, "remove", "ann", user=SERVER_UID)
    assert status == 2
    assert f"accounts in {path}: [Errno 13]" in said
    assert path.read_text() == before
    only(path.parent)


@as_root
def test_a_file_that_is_mounted_by_itself_is_written_in_place(path: Path, tmp_path: Path) -> None:
    """As Docker mounts one file: nothing can be renamed onto it."""
    target = tmp_path / "inside"
    target.touch()
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    words = [sys.executable, "-m", "mochi_app.accounts", "--file", str(target), "remove", "ann"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(path), str(target), *words],
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "written in place" in done.stderr
    assert names(path) == {"bob"}


def test_writing_in_place_on_a_full_disk_undoes_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    real, calls = os.pwrite, []

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            return real(descriptor, content[:20], offset)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        files.write_in_place(path, before, b"x" * 2000)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_told(folder: Path, kind: str) -> None:
    path = folder / "accounts"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    status, said = command(path, "add", "ann")
    assert status == 2
    assert said.startswith(f"accounts in {path}: ")
    assert said.count("\n") == 1


def test_a_refused_change_makes_no_file(folder: Path) -> None:
    assert command(folder / "accounts", "remove", "ann")[0] == 2
    assert command(folder / "accounts", "add", "no colon: in a name")[0] == 2
    assert list(folder.iterdir()) == []


def test_while_the_file_is_broken_nobody_new_comes_in_and_the_removed_stay_out(path: Path) -> None:
    known = Accounts(path)
    assert known.check("ann", "anns password")
    assert known.problem is None
    path.write_text(line("bob") + "eve:what is this\n")
    assert known.problem
    assert "eve" not in known.problem
    assert str(path) not in known.problem
    assert known.check("bob", "bobs password") is None
    assert known.find("bob")
    assert known.find("ann") is None
    path.write_text(line("bob"))
    assert known.problem is None
    assert known.check("bob", "bobs password")


def test_a_line_that_breaks_ends_nobodys_login(path: Path) -> None:
    known = Accounts(path)
    path.write_text(line("ann") + line("bob") + line("bob"))
    assert known.problem
    assert known.find("bob")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None], ids=["garbage", "missing"])
def test_without_a_readable_file_the_logins_of_before_hold(
    path: Path, content: bytes | None
) -> None:
    known = Accounts(path)
    kept = path.read_bytes()
    path.write_bytes(content) if content else path.unlink()
    assert known.problem
    assert known.find("ann")
    assert known.check("ann", "anns password") is None
    path.write_bytes(kept)
    assert known.check("ann", "anns password")


def test_an_emptied_file_lets_nobody_in(path: Path) -> None:
    known = Accounts(path)
    path.write_bytes(b"")
    assert known.find("ann") is None
    assert known.empty


def test_two_lines_of_one_name_are_refused() -> None:
    with pytest.raises(AccountsError, match="line 2: ann has a line already"):
        accounts.parse_accounts(line("ann") * 2)


@pytest.fixture
def served(path: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """A server over these accounts; `served()` starts it."""
    server = Served(
        tmp_path / "data",
        program=("-m", "tests.faults.server", "ok"),
        MOCHI_AUTH_FILE=str(path),
    )
    yield lambda: server.start().ready()
    server.end()


def log_in(served: Served, name: str) -> httpx.Response:
    """What /login answers a program."""
    form = {"username": name, "password": f"{name}s password"}
    return httpx.post(f"{served.url}/login", data=form)


def test_healthz_tells_of_accounts_that_cannot_be_used(
    path: Path, served: Callable[[], Served]
) -> None:
    server = served()
    assert log_in(server, "ann").status_code == 200
    cookies = log_in(server, "bob").cookies
    sound = path.read_text()
    path.write_text(line("bob") + "ann:not a hash\n")
    health = server.get("/healthz")
    assert health.status_code == 503
    assert any("accounts" in reason for reason in health.json()["reasons"])
    assert "line" not in health.text
    assert log_in(server, "ann").status_code == 503
    assert httpx.get(f"{server.url}/metrics", cookies=cookies).status_code == 200
    path.write_text(sound)
    poll(lambda: server.get("/healthz").status_code == 200, "health")
    assert log_in(server, "ann").status_code == 200
    path.write_text("# nobody any more\n")
    assert server.get("/healthz").status_code == 503
    assert httpx.get(f"{server.url}/metrics", cookies=cookies).status_code == 401


# Accounts
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ann", "expected name:hash"),
        ("ann:x:y:z", "expected name:hash"),
        ("ann:x:root", "expected name:hash"),
        (f"anon-1:{cheap('p')}", "a name of 1 to 64"),
        (f"api:{cheap('p')}", "a name of 1 to 64"),
        (f"a b:{cheap('p')}", "a name of 1 to 64"),
        (f":{cheap('p')}", "a name of 1 to 64"),
        ("ann:plain password", "the hash of ann: expected scrypt"),
        (f"ann:{str(cheap('p')).replace('$2$', '$3$', 1)}", "a power of two"),
        (f"ann:{str(cheap('p')).replace('$2$', '$1073741824$', 1)}", "up to 262144"),
        (f"ann:{str(cheap('p'))[:-8]}!!!!", "base64"),
        (f"ann:{cheap('p')}\nann:{cheap('p')}", "line 2: ann has a line already"),
    ],
)
def test_a_bad_line_is_named_and_shows_no_hash(line: str, told: str) -> None:
    with pytest.raises(AccountsError, match=re.escape(told)) as error:
        accounts.parse_accounts(line)
    assert str(error.value).startswith("line ")
    assert "plain password" not in str(error.value)


def test_accounts_are_added_changed_and_removed_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accounts"

    def command(typed: str, *words: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return accounts.main(["--file", str(path), *words])

    assert command("first password\n", "add", "ann") == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert "first" not in path.read_text()
    path.write_text("# a remark\n" + path.read_text())
    assert command("other password\n", "add", "ada", "--admin") == 0
    assert command("second password\n", "add", "ann") == 0
    known = Accounts(path)
    assert known.check("ann", "first password") is None
    assert (found := known.check("ann", "second password"))
    assert not found.admin
    assert (found := known.find("ada"))
    assert found.admin
    assert path.read_text().startswith("# a remark\n")
    assert command("", "remove", "ann") == 0
    assert known.find("ann") is None
    assert command("short\n", "add", "bob") == 2
    assert "password: got 5 characters, expected 8" in capsys.readouterr().err
    assert command("long enough\n", "add", "anon-1") == 2
    assert command("", "remove", "ann") == 2


def test_the_command_takes_the_file_of_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("long enough\n"))
    assert accounts.main(["add", "ann"]) == 2
    monkeypatch.setenv("MOCHI_AUTH_FILE", str(tmp_path / "accounts"))
    assert accounts.main(["add", "ann"]) == 0
    assert Accounts(tmp_path / "accounts").find("ann")


def test_a_file_that_goes_bad_leaves_in_force_what_was_read(
    auth_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Accounts(auth_file)
    auth_file.write_text("ann")
    assert known.find("ann")
    assert "the ones read before stay in force" in caplog.text
    auth_file.unlink()
    assert known.find("ann")
    with pytest.raises(AccountsError, match="accounts in"):
        Accounts(auth_file)

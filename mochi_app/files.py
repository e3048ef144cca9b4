"""Files that a power cut does not take: what is said to be on the disk is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

# macOS's fsync reaches no further than the drive's cache; this goes on from there to the disk.
FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)

TEMPORARY_SUFFIX = ".rewrite-tmp"
# What a rename onto a file says where it cannot be done: a file that is mounted by itself, a folder
# that takes no new names, a file system that cannot.
NO_RENAME = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}

PACKAGE_DIR = Path(__file__).resolve().parent
PROJECT_DIR = PACKAGE_DIR.parent  # the checkout, or the folder that the package is installed into


def embedded_model() -> Path:
    """The folder of the tiny model: in an installed package, or beside the one of a checkout."""
    installed = PACKAGE_DIR / "assets" / "tiny-mochi"
    return installed if installed.is_dir() else PROJECT_DIR / "assets" / "tiny-mochi"


def sync(descriptor: int) -> None:
    """Wait until what was written to an open file is on the disk."""
    if FULL_SYNC is not None:
        with contextlib.suppress(OSError):  # a network's file system may not know it
            fcntl.fcntl(descriptor, FULL_SYNC)
            return
    os.fsync(descriptor)


def fsync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> str:
    """Replace a small file's content by what `change` makes of it, one process at a time.

    Owner, group, mode, ACLs and extended attributes stay; a symbolic link stays one, and its target
    is replaced. A new file is its owner's alone (0600), and the folder's owner's when root makes
    it. The file is replaced all or nothing, by a file beside it, which no failure leaves behind and
    which is removed by the next call if a kill did. Where nothing can be put beside the file, or
    not with the same owner, it is written in place: whole unless the power fails in that moment.
    Other hard links keep the old content.

    Args:
        change: gets the content, empty for a new file. What it raises leaves the file as it was.

    Returns:
        Why the file was written in place; empty if it was replaced.

    Raises:
        OSError: it cannot be read or written; it is as it was.
    """
    path = Path(os.path.realpath(path))
    with held(path) as (descriptor, new):
        try:
            before = read_all(descriptor)
            after = change(before)
            if after == before and not new:
                remove_leftover(path)
                return ""
            try:
                replace(path, descriptor, after)
            except OSError as error:
                if error.errno not in NO_RENAME:
                    raise
                write_in_place(path, before, after)
                return error.strerror or str(error)
        except BaseException:
            if new:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
    return ""


@contextlib.contextmanager
def held(path: Path) -> Iterator[tuple[int, bool]]:
    """Open the file at `path`, made if need be, and lock it; waits for who holds it. Yields the
    descriptor and whether the file is new.

    The lock is on the file itself, so that it holds wherever the file is mounted and leaves nothing
    beside it. Who waited for a file that was replaced meanwhile begins anew with its successor.
    """
    while True:
        descriptor, new = open_or_make(path)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "expected a regular file", str(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    yield descriptor, new and not os.fstat(descriptor).st_size
                    return
        finally:
            os.close(descriptor)


def open_or_make(path: Path) -> tuple[int, bool]:
    """The file, open for reading, and whether it was made, for its owner alone."""
    with contextlib.suppress(FileNotFoundError):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), False  # a network's lock needs writing
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:  # somebody else was faster
        return open_or_make(path)
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.fchown(descriptor, folder.st_uid, folder.st_gid)
    return descriptor, True


def read_all(descriptor: int) -> bytes:
    """All of an open file."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read()


def leftover(path: Path) -> Path:
    """The file beside `path` that becomes it; whoever holds the lock owns it."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def remove_leftover(path: Path) -> None:
    """Remove what a kill left beside the file, which has the same secrets in it."""
    with contextlib.suppress(OSError):
        leftover(path).unlink(missing_ok=True)


def sweep_leftover(path: Path) -> None:
    """Remove what a kill left beside the file, unless somebody rewrites it at the moment, who
    will."""
    path = Path(os.path.realpath(path))
    if not leftover(path).exists():
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover(path).unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def replace(path: Path, like: int, content: bytes) -> None:
    """Put a file of this content in the place of `path`, like the open one in all else.

    Raises:
        OSError: it cannot be done; PermissionError also where the owner could not stay.
    """
    temporary = leftover(path)
    status = os.fstat(like)
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            made = os.fstat(descriptor)
            if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
                os.fchown(descriptor, status.st_uid, status.st_gid)
            shutil.copystat(path, temporary)  # mode, ACLs and attributes; and times
            os.utime(temporary)
            file.write(content)
            file.flush()
            sync(descriptor)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(PermissionError):  # of a folder that can be written but not read
        fsync(path.parent)


def write_in_place(path: Path, before: bytes, after: bytes) -> None:
    """Write over the file; what the disk does not take is undone.

    Raises:
        OSError: it cannot be written; it is as it was.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        try:
            write_over(descriptor, after)
        except OSError:
            write_over(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def write_over(descriptor: int, content: bytes) -> None:
    """Let the open file have this content."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    os.ftruncate(descriptor, len(content))
    sync(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)

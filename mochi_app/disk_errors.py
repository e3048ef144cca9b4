"""Which errors of the system are the data folder's, and not of the job that met them.

Imports nothing of the app: the ranks use it, too.
"""

from __future__ import annotations

import errno
import os

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Removed, remounted read-only, not allowed, replaced, a server that is gone, a disk that breaks.
# Not here: what a name or a file of the job's own can cause (ENAMETOOLONG, EINVAL, EISDIR, EFBIG).
UNUSABLE = (
    errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE,
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN, errno.EREMOTEIO, errno.ENOMEDIUM,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ETIMEDOUT, errno.EBUSY,
    errno.EXDEV,
)  # fmt: skip


def full(error: BaseException) -> bool:
    """Whether the system said that the disk is full."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def unusable(error: BaseException) -> bool:
    """Whether the system said that a folder cannot be used now, whatever is done with it."""
    return isinstance(error, OSError) and error.errno in UNUSABLE


def said(text: str, numbers: tuple[int, ...]) -> bool:
    """Whether a program tells, in the system's words, of one of these errors."""
    return any(os.strerror(number) in text for number in numbers)


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its path."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__

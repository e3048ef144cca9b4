"""Which system errors are the data folder's fault, and not that of the job that met them.

Imports nothing from the app: the ranks use it, too.
"""

from __future__ import annotations

import errno
import os

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Removed, remounted read-only, not permitted, replaced, file server gone, disk failing.
# Not here: what a job's own name or file can cause (ENAMETOOLONG, EINVAL, EISDIR, EFBIG).
UNUSABLE = (
    errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE,
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.EUCLEAN, errno.EREMOTEIO, errno.ENOMEDIUM,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ETIMEDOUT, errno.EBUSY,
    errno.EXDEV,
)  # fmt: skip


def full(error: BaseException) -> bool:
    """Whether the system reported that the disk is full."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def unusable(error: BaseException) -> bool:
    """Whether the system reported that a folder cannot be used at all now."""
    return isinstance(error, OSError) and error.errno in UNUSABLE


def mentions(text: str, numbers: tuple[int, ...]) -> bool:
    """Whether a program's output has the system's message for one of these errors."""
    return any(os.strerror(number) in text for number in numbers)


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its path."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__

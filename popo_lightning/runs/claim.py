"""Claims a folder for one run at a time: for the process that holds its lock."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
from pathlib import Path

from popo_lightning.core.errors import SettingError, reason

LOCK = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of a file system without locks

log = logging.getLogger(__name__)

_held: set[int] = set()  # descriptors of this process's locks


class Claim:
    """A folder that no other process can claim until this one ends or releases it.

    The kernel keeps the lock with the open file, so a dead process leaves no lock behind. Forked children close the
    file, so a grader or an engine that outlives its run does not keep the folder.

    Args:
        descriptor: File descriptor of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Releases the folder; a second call does nothing."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)


def claim(folder: Path, setting: str) -> Claim | None:
    """Makes the folder if needed, and claims it.

    Args:
        folder: Folder of a run, or of its checkpoints.
        setting: Setting that names the folder, for error messages.

    Returns:
        The claim, or None if another process has the folder.

    Raises:
        SettingError: The folder cannot be written to.
    """
    check_writable(folder, setting)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        log.warning("the file system of %s has no locks, so that a second run in it would not be noticed", folder)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return Claim(descriptor)


def is_claimed(folder: Path) -> bool:
    """Returns whether a process holds a folder now; writes nothing."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file releases it
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        return False
    return False


def holder(folder: Path) -> str:
    """Describes the process that holds a folder."""
    try:
        return (folder / LOCK).read_text().strip() or "another process"
    except OSError:
        return "another process"


def check_writable(folder: Path, setting: str) -> None:
    """Makes the folder if needed, and checks that it can be written to.

    Args:
        folder: Folder that will be written to.
        setting: Setting that names the folder, for error messages.

    Raises:
        SettingError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingError(
            f"{setting} is '{folder}', where nothing can be written ({reason(error)}); name a folder that can be "
            "written to"
        ) from error


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)

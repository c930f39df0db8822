"""Claims a folder for one run at a time: for the process that holds its lock."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from popo_lightning.core.errors import SettingError, reason

LOCK = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # errors of a file system without locks

log = logging.getLogger(__name__)

_held: set[int] = set()  # descriptors of the lock files that this process has open


def claim(folder: Path, setting: str, claims: ExitStack) -> bool:
    """Makes the folder if needed, and claims it, so that no other process can until this one ends or closes `claims`.

    The kernel keeps the lock with the open file, so a dead process leaves no lock behind. Forked children close the
    file, so a grader or an engine that outlives its run does not keep the folder.

    Args:
        folder: Folder of a run, or of its checkpoints.
        setting: Setting that names the folder, for error messages.
        claims: Holds the claim.

    Returns:
        Whether the folder is claimed now; otherwise another process has it.

    Raises:
        SettingError: The folder cannot be written to.
    """
    check_writable(folder, setting)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    claims.callback(_release, descriptor)
    if not locked(descriptor, folder):
        return False
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True


def locked(descriptor: int, folder: Path) -> bool:
    """Locks an open file or folder. Returns whether no other process has; a file system without locks is logged.

    Args:
        descriptor: Its file descriptor.
        folder: The folder that this process wants for itself, for the log.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("the file system of %s has no locks, so that a second writer to it would not be noticed", folder)
    return True


def is_claimed(folder: Path) -> bool:
    """Returns whether a process holds a folder now; writes nothing."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file releases it
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        pass
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


def _release(descriptor: int) -> None:
    if descriptor in _held:  # otherwise this is a child, which has let go
        _held.remove(descriptor)
        os.close(descriptor)


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)

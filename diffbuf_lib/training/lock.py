"""One run at a time in a results folder."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from diffbuf_lib.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems


def _let_go() -> None:
    """Close a forked child's copies: a reader that outlives a killed run must not hold its lock."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class FolderLock:
    """A lock that the system gives back when its process ends, however it ends.

    The file holds the owner's process id, for the message; what counts is the lock on it, so that
    a file which a killed run has left behind stops nobody.

    Args:
        folder: the results folder; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: another process has it, or the folder cannot be written.
        """
        if fcntl is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except BlockingIOError:
            raise CheckpointError(
                f"results folder {self.path.parent} is in use by another run ({self._owner()}): "
                "wait for it, stop it, or choose another --results_path"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise CheckpointError(
                f"results folder {self.path.parent} cannot be written ({error.strerror}): choose "
                "another --results_path"
            ) from error

    def release(self) -> None:
        """Give the lock back and remove its file; without a lock, do nothing."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._descriptor in _held:  # not in a forked child
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        """Lock the file; False if its last owner removed it meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists() or not os.path.samestat(
                os.fstat(descriptor), os.stat(self.path)
            ):
                os.close(descriptor)
                return False
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        _held.add(descriptor)
        return True

    def _owner(self) -> str:
        try:
            return f"process {int(self.path.read_text())}"
        except (OSError, ValueError):
            return "a process of unknown id"

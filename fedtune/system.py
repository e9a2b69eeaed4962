"""What Windows or macOS lacks of Linux, each with its stand-in; no other file asks on which system it runs.

docs/platforms.md says what a stand-in gives up.  Every stand-in refuses or does less; none lets something happen that
Linux would refuse.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sized
from pathlib import Path

effective_user: Callable[[], int] = getattr(os, "geteuid", lambda: -1)
effective_group: Callable[[], int] = getattr(os, "getegid", lambda: -1)
"""The numbers of this process's account and group.  -1 owns no file: what is for a file's owner alone is refused."""

change_mode: Callable[[int, int], None] = getattr(os, "fchmod", lambda descriptor, mode: None)
change_owner: Callable[[int, int, int], None] = getattr(os, "fchown", lambda descriptor, user, group: None)
"""Of an open file.  On Windows a new file has the permissions of its folder."""

cpu_affinity: Callable[[int], Sized] = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
"""The cores that a process may use; elsewhere than on Linux all of them."""

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
UNIX_SOCKETS: int = getattr(socket, "AF_UNIX", -1)
"""The family of Unix sockets; -1, of which no socket can be made, where Python knows none."""

PEER_CREDENTIALS: int = getattr(socket, "SO_PEERCRED", -1)
"""The option by which Linux says which account is at the other end of a Unix socket; -1 elsewhere."""

MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
"""The bytes of one unit in which `resource` counts a process's most memory."""

if sys.platform == "win32":
    import msvcrt

    grp = pwd = resource = None

    def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
        """Lock an open file for this process; it waits ten seconds at most, and no lock is shared."""
        # Windows lets nobody read a locked byte: one far behind the end of every file that is locked.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def open_to_lock(folder: Path) -> int:
        """Open a file that stands for a folder, which cannot be opened."""
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)

    def fsync_folder(folder: Path) -> None:
        """Do nothing: names in a folder are written when the file system chooses."""

    def send_signal(process: int, number: int) -> None:
        """Send a signal to the current process.  Windows' os.kill would end any other process at once.

        Raises:
            OSError: `process` is another process.
        """
        if process != os.getpid():
            raise OSError(f"process {process} cannot be sent a signal")
        signal.raise_signal(number)

else:
    import fcntl
    import grp as grp
    import pwd as pwd
    import resource as resource

    send_signal = os.kill

    def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
        """Lock an open file or folder; the lock ends with the process, even if that is killed.

        Raises:
            OSError: another process holds it, or the file system has no locks.
        """
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))

    def open_to_lock(folder: Path) -> int:
        """Open a folder, to lock it."""
        return os.open(folder, os.O_RDONLY)

    def fsync_folder(folder: Path) -> None:
        """Wait until the names in a folder are on disk."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

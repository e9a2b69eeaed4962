"""Portability layer: substitutes for Linux functions on Windows and macOS. No other module checks the platform.

docs/adding_a_site_it.md describes the limitations. A substitute may refuse or do less, but never permits an operation
that Linux would refuse.
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
"""Effective user and group id.  On Windows, -1 owns no file, so owner-only operations are refused."""

change_mode: Callable[[int, int], None] = getattr(os, "fchmod", lambda descriptor, mode: None)
change_owner: Callable[[int, int, int], None] = getattr(os, "fchown", lambda descriptor, user, group: None)
"""Change mode or owner of an open file.  On Windows, files inherit their folder's permissions and nothing changes."""

cpu_affinity: Callable[[int], Sized] = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
"""Function that returns the cores on which a process may run.  Outside of Linux, it returns all cores."""

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
UNIX_SOCKETS: int = getattr(socket, "AF_UNIX", -1)
"""Address family of Unix sockets, or the invalid family -1 if they are not supported."""

PEER_CREDENTIALS: int = getattr(socket, "SO_PEERCRED", -1)
"""Socket option that returns the user id of a Unix socket's peer, or -1 outside of Linux."""

MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
"""Unit in bytes of the peak memory in `resource.getrusage`."""

if sys.platform == "win32":
    import msvcrt

    grp = pwd = resource = None

    def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
        """Lock an open file exclusively, also if `shared`.  `wait` waits at most ten seconds."""
        # Windows makes locked bytes unreadable, so lock a byte far beyond the end of every file.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def open_to_lock(folder: Path) -> int:
        """Open a lock file inside the folder, because Windows cannot open folders."""
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)

    def fsync_folder(folder: Path) -> None:
        """Do nothing, because Windows cannot flush a folder."""

    def send_signal(process: int, number: int) -> None:
        """Send a signal to the current process, because os.kill on Windows would terminate another process.

        Raises:
            OSError: `process` is another process.
        """
        if process != os.getpid():
            raise OSError(f"signals to another process ({process}) are not supported on Windows")
        signal.raise_signal(number)

else:
    import fcntl
    import grp as grp
    import pwd as pwd
    import resource as resource

    send_signal = os.kill

    def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
        """Lock an open file or folder.  The lock is released when the process ends, even if it is killed.

        Raises:
            OSError: another process holds the lock, or the file system does not support locks.
        """
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))

    def open_to_lock(folder: Path) -> int:
        """Open a folder for locking."""
        return os.open(folder, os.O_RDONLY)

    def fsync_folder(folder: Path) -> None:
        """Flush the directory entries of a folder to disk."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

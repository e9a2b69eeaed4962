"""The TCP sockets on which somebody listens, from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LISTEN = "0A"


def listening_ports(pid: int, *, whole_network: bool) -> list[int]:
    """Ports on which the process `pid` listens, or anybody in its network."""
    inodes = _inodes(pid)
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN and (whole_network or words[9] in inodes):
                found.append(int(words[1].rpartition(":")[2], 16))
    return found


def _inodes(pid: int) -> set[str]:
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return inodes

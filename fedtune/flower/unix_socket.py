"""Unix sockets of this account: the socket of the site and its health socket.  This module imports nothing slow."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from fedtune.spec import ConfigError
from fedtune.system import UNIX_SOCKETS


def bind_socket(server: socket.socket, path: Path, *, key: str, backlog: int) -> None:
    """Listen at `path` for the same user and the group of the process; the socket of a killed process is replaced.

    At most `backlog` connections wait to be accepted.

    Raises:
        ConfigError: about `key`: `path` is another kind of file, another process listens there, or the folder is
            missing or not writable.
    """
    with suppress(OSError), socket.socket(UNIX_SOCKETS) as other:
        other.connect(str(path))
        raise ConfigError(key, str(path), "is in use: another process listens on it")
    try:
        if path.exists() and not path.is_socket():
            raise ConfigError(key, str(path), "must be the path of a socket, but it is another file")
        path.unlink(missing_ok=True)
        server.bind(str(path))
        path.chmod(0o660)
        server.listen(backlog)
    except OSError as error:
        bound = f"must be a socket path in a folder of this account ({error.strerror or error})"
        raise ConfigError(key, str(path), bound) from None

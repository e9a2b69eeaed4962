"""Unix sockets that only one user and group can open: the site's message socket and its health socket.

The module avoids slow imports.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from fedtune.spec import ConfigError
from fedtune.system import UNIX_SOCKETS


def bind_socket(server: socket.socket, path: Path, *, key: str, backlog: int) -> None:
    """Bind a socket to `path` and listen, with access for the process's user and group.

    A socket that a killed process left behind is replaced.

    Args:
        server: the unbound socket.
        path: the path of the socket.
        key: the setting or option that an error names.
        backlog: the maximum number of connections that wait to be accepted.

    Raises:
        ConfigError: `path` is not a socket, another process listens on it, or its folder is missing or not writable.
    """
    with suppress(OSError), socket.socket(UNIX_SOCKETS) as other:
        other.connect(str(path))
        raise ConfigError(key, str(path), "is in use: another process listens on it")
    try:
        if path.exists() and not path.is_socket():
            raise ConfigError(key, str(path), "is not a socket: choose another path")
        path.unlink(missing_ok=True)
        server.bind(str(path))
        path.chmod(0o660)
        server.listen(backlog)
    except OSError as error:
        bound = f"must be a socket path in a folder of this account ({error.strerror or error})"
        raise ConfigError(key, str(path), bound) from None

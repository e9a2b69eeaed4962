"""The Unix socket between Flower's processes at a site and the process that holds the records.

Flower starts an app for each message (`site_app.py`), under a separate user who cannot open any record, model or key.
The app sends the message to this socket and waits for the answer.  The process behind the socket needs no network.

Guarantee: only the same user and members of the socket's group are accepted; a message has limits on size and time; and
any invalid message results in one closed connection and one log line, which contains nothing of the message.

Each connection carries one message and its answer.  A message consists of two lengths, a JSON header, and a body with
the bytes of its records, one after the other.  A record is an array of bytes, or named texts and bytes; nothing else is
transmitted.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.codec import parse_json
from fedtune.flower.unix_socket import bind_socket
from fedtune.system import PEER_CREDENTIALS, UNIX_SOCKETS, effective_user

log = logging.getLogger(__name__)

END, INVITE, SUM = "end", "invite", "sum"
"""Flower's actions of the queries that tell a site that a run is over, ask whether it would take part in one, and
for a step of secure aggregation."""

Answering = Callable[[str, float, RecordDict], RecordDict]
"""A site's answer to a message: its kind ("train", "query.invite"), the server's time of it, and its content."""

MOST_HEAD_BYTES, MOST_BODY_BYTES = 1 << 20, 1 << 30
_TRANSFER_S = 60.0  # for a message that has begun to come, and for taking an answer
_WAITING = 8  # connections that may wait while one message is answered
_LENGTHS = struct.Struct(">IQ")  # bytes of the head and of the body
_CREDENTIALS = struct.Struct("=iII")  # process, user and group, as Linux gives them
_PEER_GROUPS, _MOST_OPTION = 59, 1024  # SO_PEERGROUPS of Linux, which Python has no name for
_BYTES = "bytes"


def record_from_bytes(data: bytes) -> ArrayRecord:
    """Return a record that holds exactly these bytes."""
    return ArrayRecord({_BYTES: Array(dtype="uint8", shape=(len(data),), stype=_BYTES, data=data)})


def read_record_bytes(record: ArrayRecord) -> bytes:
    """Return the bytes in a record made by `record_from_bytes`; raise ValueError for any other record."""
    (array,) = record.values()
    if (list(record), array.stype, array.dtype, array.shape) != ([_BYTES], _BYTES, "uint8", (len(array.data),)):
        raise ValueError("not bytes")  # whatever else it says would be no part of what is signed
    return array.data


def make_client_app(answer: Callable[[Context, str, float, RecordDict], RecordDict]) -> ClientApp:
    """Return a ClientApp that passes every type of message to `answer`; errors of `answer` must contain no text from
    the site.
    """
    app = ClientApp()

    def reply(message: Message, context: Context) -> Message:
        about = message.metadata
        return Message(answer(context, about.message_type, about.created_at, message.content), reply_to=message)

    app.train()(reply)
    app.query()(reply)
    for action in (END, INVITE, SUM):
        app.query(action)(reply)
    return app


def pack(kind: str, created_at: float, content: RecordDict) -> bytes:
    """Encode a message as the bytes that are sent over the socket.

    Raises:
        ValueError: the content does not have fedtune's own format, or is too large.
    """
    records: dict[str, Any] = {}
    body: list[bytes] = []
    if content.metric_records:
        raise ValueError("metrics")
    for key, arrays in content.array_records.items():
        body.append(read_record_bytes(arrays))
        records[key] = len(body[-1])
    for key, words in content.config_records.items():
        records[key] = {}
        for name, value in words.items():
            if not isinstance(value, str | bytes):
                raise ValueError("neither text nor bytes")
            body.append(value.encode() if isinstance(value, str) else value)
            records[key][name] = [isinstance(value, str), len(body[-1])]
    head = json.dumps({"kind": kind, "created_at": created_at, "records": records}).encode()
    sizes = len(head), sum(map(len, body))
    _check_sizes(*sizes)
    return b"".join([_LENGTHS.pack(*sizes), head, *body])


def unpack(head: bytes | bytearray, body: bytes | bytearray) -> tuple[str, float, RecordDict]:
    """Decode the output of `pack`; raises an error of varying type for any other bytes."""
    said = parse_json(bytes(head), key="message", bound="must be JSON")
    rest, taken, content = memoryview(body), 0, RecordDict()

    def take(size: object) -> bytes:
        nonlocal taken
        if type(size) is not int or not 0 <= size <= len(rest) - taken:
            raise ValueError("a length")
        taken += size
        return bytes(rest[taken - size : taken])

    for key, record in said["records"].items():
        if isinstance(record, dict):
            words = {name: (is_text, take(size)) for name, (is_text, size) in record.items()}
            content[key] = ConfigRecord({name: d.decode() if text else d for name, (text, d) in words.items()})
        else:
            content[key] = record_from_bytes(take(record))
    if taken != len(rest):
        raise ValueError("more than was announced")
    return str(said["kind"]), float(said["created_at"]), content


def unpack_whole(packed: bytes) -> tuple[str, float, RecordDict]:
    """Invert `pack`, for bytes that come whole."""
    size = _LENGTHS.unpack_from(packed)[0] + _LENGTHS.size
    return unpack(packed[_LENGTHS.size : size], packed[size:])


def ask_site(path: str, kind: str, created_at: float, content: RecordDict) -> RecordDict:
    """Send a message to the site's process at the socket `path`, and return its answer, however long training takes.

    Raises:
        OSError, EOFError: the process is not running, does not accept this user, or closed the connection.
        ValueError: the content does not have fedtune's own format.
    """
    with socket.socket(UNIX_SOCKETS) as line:
        line.connect(path)
        line.sendall(pack(kind, created_at, content))
        return unpack(*_receive(line, most_s=None))[2]


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """Listen at `path` while the block runs, for the same user and the group of the process.

    Raises:
        ConfigError: `path` is another kind of file, another process listens there, or the folder is missing or not
            writable.
    """
    with socket.socket(UNIX_SOCKETS) as server:
        bind_socket(server, path, key="socket", backlog=_WAITING)
        try:
            yield server
        finally:
            path.unlink(missing_ok=True)


def serve_one(server: socket.socket, answer: Answering, *, wait_s: float) -> None:
    """Answer one message, if one arrives within `wait_s` seconds."""
    server.settimeout(wait_s)
    try:
        line, _ = server.accept()
    except TimeoutError:
        return
    with line:
        try:
            _check_peer(line, group=os.stat(server.getsockname()).st_gid)
            asked = unpack(*_receive(line, most_s=_TRANSFER_S))
        except Exception as error:  # anybody in the group may send anything
            log.warning("a connection to the socket was closed (%s)", type(error).__name__)
            return
        reply = answer(*asked)
        try:
            line.settimeout(_TRANSFER_S)
            line.sendall(pack(*asked[:2], reply))
        except OSError as error:  # the lead asks again, and the ledger has the bytes
            log.info("nobody is waiting for this answer any more (%s)", type(error).__name__)


def _check_peer(line: socket.socket, *, group: int) -> None:
    """Check that the connected process has the same user, or is in the socket's group; raises PermissionError
    otherwise.
    """
    credentials = line.getsockopt(socket.SOL_SOCKET, PEER_CREDENTIALS, _CREDENTIALS.size)
    _, user, first = _CREDENTIALS.unpack(credentials)
    groups = array("I")
    with suppress(OSError):  # more groups than fit: the first one counts alone
        groups.frombytes(line.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _MOST_OPTION))
    if user != effective_user() and group not in (first, *groups):
        raise PermissionError


def _receive(line: socket.socket, *, most_s: float | None) -> tuple[bytearray, bytearray]:
    """Receive a message within `most_s` seconds (None: no limit), and return its header and body."""
    until = None if most_s is None else time.monotonic() + most_s

    def exactly(size: int) -> bytearray:
        data = bytearray()  # it grows as bytes come: an announced length alone takes no memory
        while len(data) < size:
            line.settimeout(None if until is None else max(1e-3, until - time.monotonic()))
            piece = line.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
            if until is not None and time.monotonic() > until:
                raise TimeoutError
        return data

    head, body = _LENGTHS.unpack(exactly(_LENGTHS.size))
    _check_sizes(head, body)
    return exactly(head), exactly(body)


def _check_sizes(head: int, body: int) -> None:
    if head > MOST_HEAD_BYTES or body > MOST_BODY_BYTES:
        raise ValueError("too large")

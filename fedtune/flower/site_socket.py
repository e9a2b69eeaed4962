"""The Unix socket between Flower's processes at a site and the process with the records.

Flower starts an app for each message (`site_app.py`), under a separate user without access to records, model or keys.
The app sends the message to this socket and waits for the answer.  The process behind the socket needs no network.

Guarantee: the socket accepts only its own user and members of its group, and limits the size and duration of a message.
An invalid message closes its connection and writes one log line without any content of the message.

Each connection carries one message and its answer.  A message consists of the lengths of header and body, a JSON
header, and a body with the concatenated bytes of its records.  A record is either an array of bytes, or a mapping from
names to texts or bytes.
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
"""Actions of Flower queries: the end of a run, an invitation, and a step of secure aggregation."""

Answering = Callable[[str, float, RecordDict], RecordDict]
"""Function that answers a message; its arguments are the kind ("train", "query.invite"), server time and content."""

MAX_HEAD_BYTES, MAX_BODY_BYTES = 1 << 20, 1 << 30
_TRANSFER_S = 60.0  # timeout for receiving a message, and for sending an answer
_WAITING = 8  # connections in the backlog
_LENGTHS = struct.Struct(">IQ")  # bytes of the header and of the body
_CREDENTIALS = struct.Struct("=iII")  # pid, uid and gid, as in Linux's struct ucred
_PEER_GROUPS, _MAX_OPTION = 59, 1024  # Linux's SO_PEERGROUPS, which Python does not define
_BYTES = "bytes"


def record_from_bytes(data: bytes) -> ArrayRecord:
    """Wrap bytes in a Flower record."""
    return ArrayRecord({_BYTES: Array(dtype="uint8", shape=(len(data),), stype=_BYTES, data=data)})


def read_record_bytes(record: ArrayRecord) -> bytes:
    """Unwrap the bytes of a record made by `record_from_bytes`; raise ValueError for any other record."""
    (array,) = record.values()
    if (list(record), array.stype, array.dtype, array.shape) != ([_BYTES], _BYTES, "uint8", (len(array.data),)):
        raise ValueError("the record is not a single byte array")  # a signature covers only the bytes
    return array.data


def make_client_app(answer: Callable[[Context, str, float, RecordDict], RecordDict]) -> ClientApp:
    """Create a ClientApp that passes messages of every type to `answer`.

    The exceptions of `answer` must not contain text from the site, because Flower sends them to the server.
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
    """Serialize a message for the socket.

    Raises:
        ValueError: the content is not in fedtune's message format, or is too large.
    """
    records: dict[str, Any] = {}
    body: list[bytes] = []
    if content.metric_records:
        raise ValueError("metric records are not supported")
    for key, arrays in content.array_records.items():
        body.append(read_record_bytes(arrays))
        records[key] = len(body[-1])
    for key, words in content.config_records.items():
        records[key] = {}
        for name, value in words.items():
            if not isinstance(value, str | bytes):
                raise ValueError("a value is neither text nor bytes")
            body.append(value.encode() if isinstance(value, str) else value)
            records[key][name] = [isinstance(value, str), len(body[-1])]
    head = json.dumps({"kind": kind, "created_at": created_at, "records": records}).encode()
    sizes = len(head), sum(map(len, body))
    _check_sizes(*sizes)
    return b"".join([_LENGTHS.pack(*sizes), head, *body])


def unpack(head: bytes | bytearray, body: bytes | bytearray) -> tuple[str, float, RecordDict]:
    """Deserialize header and body of a message from `pack`; raise an exception of any type for invalid bytes."""
    header = parse_json(bytes(head), key="message", bound="must be JSON")
    rest, taken, content = memoryview(body), 0, RecordDict()

    def take(size: object) -> bytes:
        nonlocal taken
        if type(size) is not int or not 0 <= size <= len(rest) - taken:
            raise ValueError("the length of a record is invalid")
        taken += size
        return bytes(rest[taken - size : taken])

    for key, record in header["records"].items():
        if isinstance(record, dict):
            words = {name: (is_text, take(size)) for name, (is_text, size) in record.items()}
            content[key] = ConfigRecord({name: d.decode() if text else d for name, (text, d) in words.items()})
        else:
            content[key] = record_from_bytes(take(record))
    if taken != len(rest):
        raise ValueError("the body is longer than its records")
    return str(header["kind"]), float(header["created_at"]), content


def unpack_message(packed: bytes) -> tuple[str, float, RecordDict]:
    """Deserialize a complete message from `pack`, including the lengths of header and body."""
    size = _LENGTHS.unpack_from(packed)[0] + _LENGTHS.size
    return unpack(packed[_LENGTHS.size : size], packed[size:])


def ask_site(path: str, kind: str, created_at: float, content: RecordDict) -> RecordDict:
    """Send a message to the site's process at the Unix socket `path`, and wait for the answer without a timeout.

    Raises:
        OSError, EOFError: the process is not running, does not accept this user, or closed the connection.
        ValueError: the content is not in fedtune's message format.
    """
    with socket.socket(UNIX_SOCKETS) as line:
        line.connect(path)
        line.sendall(pack(kind, created_at, content))
        return unpack(*_receive(line, most_s=None))[2]


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """Listen on the Unix socket `path` inside the block; only the process's user and group may connect.

    Raises:
        ConfigError: `path` is not a socket, another process listens on it, or its folder is missing or not writable.
    """
    with socket.socket(UNIX_SOCKETS) as server:
        bind_socket(server, path, key="socket", backlog=_WAITING)
        try:
            yield server
        finally:
            path.unlink(missing_ok=True)


def serve_connection(server: socket.socket, answer: Answering, *, wait_s: float) -> None:
    """Accept one connection and answer its message; return if no client connects within `wait_s` seconds."""
    server.settimeout(wait_s)
    try:
        line, _ = server.accept()
    except TimeoutError:
        return
    with line:
        try:
            _check_peer(line, group=os.stat(server.getsockname()).st_gid)
            request = unpack(*_receive(line, most_s=_TRANSFER_S))
        except Exception as error:  # every member of the group can send arbitrary bytes
            log.warning("a connection to the socket was closed (%s)", type(error).__name__)
            return
        reply = answer(*request)
        try:
            line.settimeout(_TRANSFER_S)
            line.sendall(pack("", 0.0, reply))  # without the request's values, which could exceed the header's limit
        except (OSError, ValueError) as error:  # the lead will repeat the question, and the ledger stores the answer
            log.info("the connection was closed before the answer was sent (%s)", type(error).__name__)


def _check_peer(line: socket.socket, *, group: int) -> None:
    """Check that the peer has this process's user or the socket's group; raise PermissionError otherwise."""
    credentials = line.getsockopt(socket.SOL_SOCKET, PEER_CREDENTIALS, _CREDENTIALS.size)
    _, user, first = _CREDENTIALS.unpack(credentials)
    groups = array("I")
    with suppress(OSError):  # too many groups for the buffer: only the primary group counts
        groups.frombytes(line.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _MAX_OPTION))
    if user != effective_user() and group not in (first, *groups):
        raise PermissionError


def _receive(line: socket.socket, *, most_s: float | None) -> tuple[bytearray, bytearray]:
    """Receive a message within `most_s` seconds (None: no limit); return its header and body."""
    until = None if most_s is None else time.monotonic() + most_s

    def receive_exactly(size: int) -> bytearray:
        data = bytearray()  # grows with the received bytes, so that a declared length allocates no memory
        while len(data) < size:
            line.settimeout(None if until is None else max(1e-3, until - time.monotonic()))
            piece = line.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
            if until is not None and time.monotonic() > until:
                raise TimeoutError
        return data

    head, body = _LENGTHS.unpack(receive_exactly(_LENGTHS.size))
    _check_sizes(head, body)
    return receive_exactly(head), receive_exactly(body)


def _check_sizes(head: int, body: int) -> None:
    if head > MAX_HEAD_BYTES or body > MAX_BODY_BYTES:
        raise ValueError("the message exceeds the size limits")

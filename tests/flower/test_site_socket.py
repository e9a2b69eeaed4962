"""The socket between Flower's app process and the site's process: format, access control and hostile input."""

import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedtune.federation.protocol import Signed
from fedtune.federation.transport import Question
from fedtune.flower import flower_records, site_app, site_socket
from fedtune.flower.client import make_node_context
from fedtune.flower.internals import set_metadata, set_sender_ids
from fedtune.flower.site_socket import ask_site, listen_at, pack, record_from_bytes, serve_connection, unpack
from fedtune.model.adapter import Adapter
from fedtune.spec import ConfigError

QUESTION = Question(
    site="a", signed=Signed(text="{}", signature="ab"), settings='{"name": "é"}', parts=[b"\0\xff", b""]
)
CONTENTS = {
    "nothing": lambda adapter: RecordDict(),
    "a round": lambda adapter: flower_records.from_question(QUESTION, flower_records.from_adapter(adapter)),
    "no parts": lambda adapter: RecordDict({flower_records.PARTS: ConfigRecord({})}),
    "no receipt": lambda adapter: flower_records.from_receipt(None),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_round_trip_through_the_socket_format(name: str, adapter: Adapter) -> None:
    content, lengths = CONTENTS[name](adapter), site_socket._LENGTHS
    data = pack("query.sum", 12.5, content)
    head, body = lengths.unpack_from(data)
    rest = data[lengths.size :]
    assert len(rest) == head + body
    assert unpack(rest[:head], rest[head:]) == ("query.sum", 12.5, content)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"m": MetricRecord({"a": 1.0})}),
        RecordDict({"a": ArrayRecord([np.ones(2, np.float32)])}),
        RecordDict({"c": ConfigRecord({"a": 1.0})}),
        RecordDict({"c": ConfigRecord({"a": ["x"]})}),
    ],
    ids=["metrics", "numeric array", "a number", "a list"],
)
def test_unsupported_record_contents_are_refused(content: RecordDict) -> None:
    with pytest.raises(ValueError, match=r"^(metric records are|the record is not|a value is neither) "):
        pack("train", 0.0, content)


def test_oversized_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_socket, "MAX_BODY_BYTES", 10)
    pack("train", 0.0, RecordDict({"a": record_from_bytes(bytes(10))}))
    with pytest.raises(ValueError, match="exceeds the size limits"):
        pack("train", 0.0, RecordDict({"a": record_from_bytes(bytes(11))}))


class Site:
    """A site's process at a socket, in a thread, which echoes each message."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked = path, list[str]()
        self._stop, self._up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def answer(self, kind: str, created_at: float, content: RecordDict) -> RecordDict:
        self.asked.append(kind)
        return content

    def _serve(self) -> None:
        with listen_at(self.path) as server:
            self._up.set()
            while not self._stop.is_set():
                serve_connection(server, self.answer, wait_s=0.05)

    def __enter__(self) -> "Site":
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def is_answering(self) -> bool:
        content = RecordDict({"a": record_from_bytes(b"hello")})
        return ask_site(str(self.path), "train", 1.0, content) == content


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path / "site.sock") as socket_site:
        yield socket_site


def test_message_is_answered_over_a_socket_open_to_user_and_group(site: Site) -> None:
    assert site.is_answering()
    assert stat.S_IMODE(site.path.stat().st_mode) == 0o660
    large = RecordDict({"a": record_from_bytes(os.urandom(5 << 20))})
    assert ask_site(str(site.path), "query.end", 1.0, large) == large, "it must exceed the socket's buffer"
    assert site.asked == ["train", "query.end"]


def frame(head: bytes, body: bytes = b"") -> bytes:
    return site_socket._LENGTHS.pack(len(head), len(body)) + head + body


def build_message(records: str, **changed: str) -> bytes:
    words = {"kind": '"train"', "created_at": "1.0", "records": records} | changed
    return ("{" + ", ".join(f'"{key}": {value}' for key, value in words.items()) + "}").encode()


HOSTILE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "an endless head": struct.pack(">IQ", (1 << 32) - 1, 0),
    "an endless body": struct.pack(">IQ", 2, (1 << 64) - 1) + b"{}",
    "a head cut off": struct.pack(">IQ", 100, 0) + b"{",
    "a body cut off": struct.pack(">IQ", 2, 100) + b"{}",
    "no JSON": frame(b"\xff\xfe"),
    "a list": frame(b"[]"),
    "deep JSON": frame(b"[" * 100_000),
    "a key is missing": frame(b'{"kind": "train"}'),
    "records that are none": frame(build_message("3")),
    "more than there is": frame(build_message('{"a": 10}'), b"123"),
    "less than there is": frame(build_message('{"a": 1}'), b"123"),
    "a negative length": frame(build_message('{"a": -1, "b": 2}'), b"1"),
    "a length that is a truth": frame(build_message('{"a": true}'), b"1"),
    "a length that is a fraction": frame(build_message('{"a": 1.0}'), b"1"),
    "a text that is none": frame(build_message('{"a": {"b": [true, 1]}}'), b"\xff"),
    "a field without a length": frame(build_message('{"a": {"b": [true]}}')),
    "a time that is none": frame(build_message("{}", created_at='"soon"')),
    "HTTP": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_bytes_close_one_connection_with_one_log_line(
    site: Site, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(site.path))
        line.settimeout(10)
        line.sendall(HOSTILE[name])
        line.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # part of the input was not read
            assert line.recv(1) == b"", "the connection must close without an answer"
    assert site.is_answering(), "the next connection must be answered"
    assert site.asked == ["train"]
    (record,) = caplog.records
    assert record.getMessage().startswith("a connection to the socket was closed (")
    assert record.exc_info is None


def test_answer_repeats_nothing_of_the_request(site: Site) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(site.path))
        line.sendall(frame(build_message("{}", kind=f'"{"é" * 500_000}"')))  # in ASCII, too long for a header
        assert len(line.recv(100)) < 100
    assert site.is_answering()


def test_silent_peer_does_not_block_the_socket(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(site_socket, "_TRANSFER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(site.path))
        silent.sendall(b"\0")
        assert site.is_answering()
    assert "closed (TimeoutError)" in caplog.text


def test_disconnected_client_loses_only_its_own_answer(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    message = pack("train", 1.0, RecordDict({"a": record_from_bytes(bytes(4 << 20))}))
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(site.path))
        line.sendall(message)
    assert site.is_answering()
    assert "the connection was closed before the answer was sent" in caplog.text
    assert site.asked == ["train", "train"]


def test_other_users_are_accepted_only_as_group_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the peer's user and groups as reported by Linux."""
    line, peer = socket.socketpair(socket.AF_UNIX)
    with line, peer:
        site_socket._check_peer(line, group=54321)  # the same user
        monkeypatch.setattr(site_socket, "effective_user", lambda: os.geteuid() + 1)
        for group in {os.getegid(), *os.getgroups()}:
            site_socket._check_peer(line, group=group)
        with pytest.raises(PermissionError):
            site_socket._check_peer(line, group=54321)


_AS_NOBODY = """
import os, socket, sys
os.setgroups([int(group) for group in sys.argv[2:]])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as line:
    line.connect(sys.argv[1])
    try:
        line.sendall(bytes.fromhex(sys.stdin.read()))
        print(len(line.recv(1)))
    except (BrokenPipeError, ConnectionResetError):
        print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_unprivileged_user_is_accepted_only_with_the_group(caplog: pytest.LogCaptureFixture) -> None:
    def ask_as_nobody(site: Site, *groups: int) -> str:
        words = [sys.executable, "-c", _AS_NOBODY, str(site.path), *map(str, groups)]
        sent = pack("train", 1.0, RecordDict()).hex()
        process = subprocess.run(words, input=sent, capture_output=True, text=True, timeout=60, check=False)
        return process.stdout.strip() or process.stderr.strip().splitlines()[-1]

    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # so that another user can reach the socket
        with Site(Path(folder) / "site.sock") as site:
            assert "PermissionError" in ask_as_nobody(site, 4321), "the file mode alone must keep other users out"
            os.chmod(site.path, 0o666)
            os.chown(site.path, -1, 4321)
            assert (ask_as_nobody(site, 4321), site.asked) == ("1", ["train"])
            assert (ask_as_nobody(site, 99), site.asked) == ("0", ["train"])
    assert "closed (PermissionError)" in caplog.text


def test_invalid_socket_path_is_refused(tmp_path: Path, site: Site) -> None:
    (tmp_path / "notes").write_text("x")
    for place, bound in (
        (tmp_path / "notes", "is not a socket: choose another path"),
        (tmp_path / "missing" / "site.sock", r"must be a socket path in a folder .*No such file"),
        (tmp_path / ("x" * 200), r"must be a socket path .*too long"),
        (site.path, "another process listens on it"),
    ):
        with pytest.raises(ConfigError, match=bound), listen_at(place):
            pass
    assert (tmp_path / "notes").read_text() == "x"
    assert site.is_answering()


def test_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "site.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Site(path) as site:
        assert site.is_answering()
    assert not path.exists()


def ask_app(path: Path, content: RecordDict, kind: str = "train") -> Message:
    """Return the answer of a SuperNode's ClientApp at a site whose operator configured this socket."""
    set_sender_ids(run_id=7, node_id=0, task_id=0)
    message = Message(content, 5, kind)
    set_metadata(message, message_id="m-1")
    context = make_node_context(7, 5, {})
    context.node_config = {"fedtune-socket": str(path)}
    return site_app.app(message, context)


@pytest.mark.parametrize("kind", ["train", "query", "query.invite", "query.sum", "query.end"])
def test_app_forwards_every_kind_of_message(site: Site, kind: str) -> None:
    content = RecordDict({"a": record_from_bytes(b"hello")})
    reply = ask_app(site.path, content, kind)
    assert (reply.content, site.asked) == (content, [kind])


def test_app_error_contains_only_the_exception_class(tmp_path: Path, site: Site) -> None:
    foreign = RecordDict({"canary-31": MetricRecord({"canary-31": 1.0})})
    for path, name in ((tmp_path / "canary-31.sock", "FileNotFoundError"), (site.path, "ValueError")):
        with pytest.raises(site_app.SiteUnavailable) as raised:
            ask_app(path, foreign)
        assert str(raised.value) == name
        assert raised.value.__cause__ is None


def test_app_uses_only_the_socket_configured_by_the_operator(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(site_app, "ask_site", lambda path, *asked: RecordDict({"at": ConfigRecord({"path": path})}))
    context = make_node_context(7, 5, {})
    context.run_config = {"fedtune-socket": "/run/docker.sock"}
    answered = site_app.forward_message(context, "train", 0.0, RecordDict())
    assert answered.config_records["at"]["path"] == "/run/fedtune/site.sock"

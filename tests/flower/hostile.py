"""A malicious server of the federation, which answers with arbitrary bytes."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

from fedtune.ops.wire.identity import Tls

from .certificates import LOOPBACK

Answer = Callable[[ssl.SSLSocket, str], None]
"""A function that answers a request, given the connection and the path."""


def make_server_context(files: Tls, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """Create the TLS context of a fedtune server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = newest
    return context


class Hostile:
    """A server on loopback that answers each request with `answer`.

    Attributes:
        asked: paths of requests, in order.
        connections: number of accepted connections, including those without a handshake.
    """

    def __init__(self, context: ssl.SSLContext, answer: Answer) -> None:
        self.context, self.answer = context, answer
        self.asked: list[str] = []
        self.connections = 0
        self._listening = socket.create_server((LOOPBACK, 0))
        self.address = f"{LOOPBACK}:{self._listening.getsockname()[1]}"
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._listening.close()

    def pause(self, seconds: float) -> None:
        """Wait, at most for the lifetime of the server."""
        if self._closed.wait(seconds):
            raise ConnectionError("closed")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), self.context.wrap_socket(connection, server_side=True) as encrypted:
            while path := _request(encrypted):
                self.asked.append(path)
                self.answer(encrypted, path)


def _request(connection: ssl.SSLSocket) -> str:
    head = b""
    while b"\r\n\r\n" not in head:
        if not (part := connection.recv(1 << 16)):
            return ""
        head += part
    head, _, body = head.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head.split(b" ")[1].decode()


def build_response(body: bytes, *, headers: str = "", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body


@contextlib.contextmanager
def serve_answer(answer: bytes, *, tunnel: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Start a plain TCP server that reads once, writes `answer` and closes, or forwards to the destination as a proxy.

    Yields its address and the requests.
    """
    requests: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer_connection, args=(listening.accept()[0],), daemon=True).start()

    def answer_connection(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            requests.append(connection.recv(1 << 16))
            connection.sendall(answer)
            if tunnel:
                host, _, port = requests[-1].split()[1].decode().rpartition(":")
                with socket.create_connection((host, int(port))) as onward:
                    backward = threading.Thread(target=_pour, args=(onward, connection), daemon=True)
                    backward.start()
                    _pour(connection, onward)
                    backward.join()

    with socket.create_server((LOOPBACK, 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"{LOOPBACK}:{listening.getsockname()[1]}", requests
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def _pour(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # so that the other thread ends, too

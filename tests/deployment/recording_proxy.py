"""TLS-terminating proxy between a site and its server that records every request: `python recording_proxy.py FILE`.

FILE is JSON: `listen` and `server` (host:port), `proxy` and `site` (PEM files of the proxy towards the site, and of the
site towards the server), and `records`, a file that gets one JSON line for each request before it is forwarded.
"""

import base64
import http.client
import json
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedtune.ops.wire.identity import Tls
from tests.flower.hostile import make_server_context

_TIMEOUT_S = 60.0
_SETTINGS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_bytes())
_SITE = Tls(**{name: Path(path) for name, path in _SETTINGS["site"].items()})
_LOCK = threading.Lock()
_HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "keep-alive", "date", "server")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S

    def _forward(self) -> None:
        if self.headers.get("transfer-encoding"):
            raise ValueError("a body without a length, which this proxy would not record")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        _record(method=self.command, path=self.path, headers=self.headers.items(), body=body)
        try:
            status, headers, content = self._ask_server(body)
        except OSError:
            status, headers, content = 502, [], b""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _ask_server(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Forward a request over a new connection, because the server closes idle connections."""
        host, _, port = _SETTINGS["server"].rpartition(":")
        server = http.client.HTTPSConnection(host, int(port), timeout=_TIMEOUT_S, context=_SITE.create_client_context())
        with closing(server):
            server.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
            response = server.getresponse()
            return response.status, response.getheaders(), response.read()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _forward

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _record(**fields: Any) -> None:
    line = json.dumps({**fields, "headers": list(fields["headers"]), "body": base64.b64encode(fields["body"]).decode()})
    with _LOCK, Path(_SETTINGS["records"]).open("a") as file:
        file.write(line + "\n")


context = make_server_context(Tls(**_SETTINGS["proxy"]))
host, _, port = _SETTINGS["listen"].rpartition(":")
server = ThreadingHTTPServer((host, int(port)), _Handler)
# Each connection's own thread does the handshake, so that a hanging one does not block the others.
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("the proxy listens", flush=True)
server.serve_forever()

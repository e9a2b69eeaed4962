"""Stub of the Hugging Face hub's upload API on a loopback address."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_token_of_a_test"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class StandInHub:
    """State of the hub: repositories, received requests, and injected failures."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path of each request
    tokens: set[str | None] = field(default_factory=set)
    refusals: dict[str, int] = field(default_factory=dict)  # status by the end of a request's path
    has_large_files: bool = False  # all files go to a large file storage, which there is none of
    ignores_private: bool = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and JSON of the response."""
        if status := next((code for end, code in self.refusals.items() if path.endswith(end)), None):
            return status, {"error": "refused by the stand-in"}
        match method, path.strip("/").split("/"):
            case "POST", ["api", "repos", "create"]:
                request = json.loads(body)
                name = f"{request['organization']}/{request['name']}"
                if name in self.repositories:
                    return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
                private = request.get("visibility") == "private" and not self.ignores_private
                self.repositories[name] = Repository(private)
                return 200, {"url": f"{self.address}/{name}", "name": name}
            case "GET", ["api", "models", owner, name] if f"{owner}/{name}" in self.repositories:
                repository = self.repositories[f"{owner}/{name}"]
                siblings = [{"rfilename": file} for file in (".gitattributes", *repository.files)]
                return 200, {"id": f"{owner}/{name}", "private": repository.private, "siblings": siblings}
            case "POST", ["api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}
            case "POST", ["api", "models", _, _, "preupload", "main"]:
                mode = {"shouldIgnore": False, "uploadMode": "lfs" if self.has_large_files else "regular"}
                return 200, {"files": [{"path": entry["path"], **mode} for entry in json.loads(body)["files"]]}
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                files = self.repositories[f"{owner}/{name}"].files
                for entry in map(json.loads, body.splitlines()):
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                return 200, {"commitUrl": f"{self.address}/{owner}/{name}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": "the stand-in has no such call"}


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Serve an empty hub, and configure huggingface_hub in this process to use it with a token."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def _answer(self) -> None:
            path = self.path.partition("?")[0]
            if path != "/api/agent-harnesses":  # the client's own, about who calls it
                hub.asked.append((self.command, path))
                hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, reply = hub.answer(self.command, path, body)
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    client_settings = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    try:
        with patch.multiple(constants, **client_settings), patch.dict("os.environ", HF_TOKEN=TOKEN):
            close_session()
            yield hub
    finally:
        close_session()
        server.shutdown()
        thread.join()
        server.server_close()

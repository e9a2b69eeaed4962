"""A run's live page as a server on this machine: one page, and the state that its script asks for."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from fedtune.report.watch.watch_folder import WatchedFolder
from fedtune.report.watch.watch_guard import Access, Guard, page_policy
from fedtune.report.watch.watch_page import Shown, WatchPage
from fedtune.spec import ConfigError

_READING = ["GET", "HEAD"]
_STOP_S = 2  # for answers that are under way when the server is stopped
_MOST_AT_ONCE = 32


class WatchServer:
    """Serves a folder's page, once it is run.

    Args:
        folder: the run's, which is only read.
        page: draws it.
        host: a loopback address, or localhost.
        port: 0 takes one that is free.

    Raises:
        ConfigError: the host is another, or host and port cannot be had.
    """

    def __init__(self, folder: WatchedFolder, page: WatchPage, *, host: str, port: int) -> None:
        self._folder, self._page, self._drawing = folder, page, threading.Lock()
        self._socket = _listening(host, port)
        bound, port = self._socket.getsockname()[:2]
        self._access = Access.to(bound, port)
        self._origin = f"http://[{bound}]:{port}" if ":" in bound else f"http://{bound}:{port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                Guard(self._app(), self._access),
                access_log=False,  # it would show the token
                http="h11",
                interface="asgi3",
                lifespan="off",
                limit_concurrency=_MOST_AT_ONCE,
                log_config=None,
                loop="asyncio",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_STOP_S,
                ws="none",
            )
        )

    @property
    def address(self) -> str:
        """What to open: with the token, which is as good as the page."""
        return f"{self._origin}/?token={self._access.token}"

    def run(self) -> None:
        """Serve until `stop`, or until a signal that uvicorn listens to."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End `run` soon, or keep it from starting; any thread and any signal may call it."""
        self._server.should_exit = True

    def _shown(self) -> tuple[Shown, str]:
        """The run as it stands, and the page of it; one at a time, since matplotlib draws one at a time."""
        with self._drawing:
            shown, nonce = self._page.shown(self._folder.now()), secrets.token_urlsafe(16)
            return shown, nonce

    def _app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

        @app.api_route("/", methods=_READING)
        def page() -> Response:
            shown, nonce = self._shown()
            headers = {"Content-Security-Policy": page_policy(nonce)}
            return HTMLResponse(self._page.html(shown, nonce=nonce), headers=headers)

        @app.api_route("/state", methods=_READING)
        def state(request: Request) -> Response:
            shown, _ = self._shown()
            headers = {"ETag": shown.tag}
            if request.headers.get("if-none-match") == shown.tag:
                return Response(status_code=304, headers=headers)
            return Response(shown.state, media_type="application/json", headers=headers)

        @app.exception_handler(HTTPException)
        def nothing_there(request: Request, error: HTTPException) -> Response:
            return PlainTextResponse("There is nothing here.\n", status_code=error.status_code)

        return app


def _listening(host: str, port: int) -> socket.socket:
    """A socket that only this machine reaches."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback or getattr(address, "ipv4_mapped", None) is not None:
        raise ConfigError("--host", host, "must be an address of this machine alone: 127.0.0.1, ::1 or localhost")
    if not 0 <= port < 1 << 16:
        raise ConfigError("--port", port, "must be from 0 (any that is free) to 65535")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((str(address), port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ConfigError("--port", port, f"cannot be listened on at {address} ({error.strerror})") from None
    return listening

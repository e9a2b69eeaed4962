"""A run's live page as a server on this machine: one page, the state that its script asks for, and who may read them.

A person at this machine may who has the address that `fedtune watch` printed.  Another account of the machine, a page
of another origin in the same browser (also under a name that was made to point to this machine), and a program that
guesses get nothing: every request needs a secret of this start, and the answers to requests under other names, or with
other methods than reading, tell nothing.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedtune.report.watch_page import Shown, WatchedFolder, WatchPage
from fedtune.spec import ConfigError

_METHODS = ("GET", "HEAD")
_NO_CONTENT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": _NO_CONTENT,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STOP_S = 2  # for answers that are under way when the server is stopped
_MOST_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a request needs; the secrets are new with every start.

    Attributes:
        hosts: what may stand in `Host`.
        port: that is listened on.
        token: stands in the printed address, and nowhere else.
        session: what a browser that had the token shows from then on.
    """

    hosts: frozenset[str]
    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    @classmethod
    def to(cls, host: str, port: int) -> Access:
        """To a server at a loopback address, which a browser may also know by its other names."""
        names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}
        with_port = {f"{name}:{port}" for name in names}
        return cls(hosts=frozenset(with_port | names if port == 80 else with_port), port=port)

    @property
    def cookie(self) -> str:
        """Its name: browsers send a cookie to every port of a host, so that two pages must not share one."""
        return f"fedtune-watch-{self.port}"


def page_policy(nonce: str) -> str:
    """The policy of a page whose one script and one style bear the nonce, and which asks its own origin alone."""
    return f"{_NO_CONTENT}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"


class Guard:
    """Lets through to an application what has access, and puts the same headers on every answer.

    Args:
        app: what answers; it sees requests to read alone, from who has access.
        access: what they need.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to speak nothing else"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._answer(Request(scope)) or self._app
        await answer(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """The answer to a request that goes no further."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._access.hosts:
            return _line(400, "This server answers under names of this machine alone.")
        if request.method not in _METHODS:
            return _line(405, "This page can only be read.", {"Allow": ", ".join(_METHODS)})
        if (
            _same(request.cookies.get(self._access.cookie), self._access.session)
            and "token" not in request.query_params
        ):
            return None
        if request.url.path == "/" and _same(request.query_params.get("token"), self._access.token):
            return self._welcome()
        return _line(401, "Open the address that 'fedtune watch' printed; its token is needed.")

    def _welcome(self) -> Response:
        """Gives the browser its cookie, and takes the token out of the address that it shows and remembers."""
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self._access.cookie, self._access.session, path="/", httponly=True, samesite="strict")
        return answer


def _same(said: str | None, secret: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return said is not None and hmac.compare_digest(said.encode("utf-8", "replace"), secret.encode())


def _line(status: int, text: str, headers: Mapping[str, str] | None = None) -> PlainTextResponse:
    return PlainTextResponse(text + "\n", status_code=status, headers=headers)


class WatchServer:
    """Serves a folder's page, once it is run.

    Args:
        folder: the run's, which is only read.
        page: draws it.
        host: a loopback address, or localhost.
        port: 0 takes one that is free.

    Raises:
        ConfigError: the host is not a loopback address, or the port is taken.
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
        """The run as it stands, and the page of it; one request at a time: the page keeps what it drew last."""
        with self._drawing:
            shown, nonce = self._page.shown(self._folder.now()), secrets.token_urlsafe(16)
            return shown, nonce

    def _app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

        @app.api_route("/", methods=list(_METHODS))
        def page() -> Response:
            shown, nonce = self._shown()
            headers = {"Content-Security-Policy": page_policy(nonce)}
            return HTMLResponse(self._page.html(shown, nonce=nonce), headers=headers)

        @app.api_route("/state", methods=list(_METHODS))
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

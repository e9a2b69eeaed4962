"""Who may read a run's live page: a person at this machine who has the address that `fedtune watch` printed.

Another account of the machine, a page of another origin in the same browser (also under a name that was made to point
to this machine), and a program that guesses get nothing: every request needs a secret of this start, and the answers
to requests under other names, or with other methods than reading, tell nothing.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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

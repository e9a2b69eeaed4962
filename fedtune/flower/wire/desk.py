"""Calls of fedtune's own about the federation's members: the newest roster, and requests for new certificates.

The server passes on what others have signed: it can hold a roster or a request back, and change neither.  A site makes
its calls as it says hello; the lead signs each of its own.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Protocol

import httpx

from fedtune.flower.wire.bounded_http import bounded
from fedtune.flower.wire.fleet import in_our_words, reason_in, signed_headers
from fedtune.flower.wire.identity import NotAllowed, Tls, lead_headers
from fedtune.privacy.keys import SigningKey
from fedtune.spec import RunError

ROSTER, RENEWALS = "/v1/fedtune/roster", "/v1/fedtune/renewals"
MOST_ROSTER_BYTES, MOST_REQUEST_BYTES = 2 << 20, 4 << 10
LEAD = "lead"
"""In place of a site's name."""
_CALL_TIMEOUT_S = 15.0


class Desk(Protocol):
    """What the server does with these calls; any thread may call it."""

    def roster(self) -> bytes:
        """The newest roster, as the lead signed it, once it is applied."""
        ...

    def known(self) -> bytes:
        """It, as it was some seconds ago; this costs nothing."""
        ...

    def take_roster(self, data: bytes) -> None:
        """Keep a newer one.

        Raises:
            ConfigError: it is not the lead's, or not newer.
        """
        ...

    def ask(self, name: str, request: bytes) -> int:
        """Keep the request of a member; the number of the newest roster.

        Raises:
            ConfigError: it is not this member's, or the lead would refuse it.
        """
        ...

    def requests(self) -> list[bytes]:
        """Those that were made since the newest roster came."""
        ...


def at_desk(desk: Desk, call: tuple[str, str], *, site: str | None, body: bytes) -> bytes:
    """What the server answers to a call, its method and path, of a member or of the lead (`site` is None).

    Raises:
        NotAllowed: it is not this caller's to make.
        ConfigError: `desk` does not take what it brings.
    """
    if call == ("GET", ROSTER):
        return desk.roster() if site is None else desk.known()
    if call == ("POST", RENEWALS) and len(body) <= MOST_REQUEST_BYTES:
        return json.dumps({"number": desk.ask(site or LEAD, body)}).encode()
    if call == ("POST", ROSTER) and site is None:
        desk.take_roster(body)
        return b"{}"
    if call == ("GET", RENEWALS) and site is None:
        return json.dumps({"requests": [base64.b64encode(one).decode() for one in desk.requests()]}).encode()
    raise NotAllowed(403, "not this caller's to make")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeskLine:
    """A site's, or the lead's, line to the server for these calls.

    Attributes:
        server: host:port.
        lead: the lead's key; None: a site calls.

    Raises:
        Unreachable: by each of its calls: no connection.
        RunError: by each of its calls: the server refuses it, or is of a version that does not know it.
    """

    server: str
    tls: Tls
    lead: SigningKey | None = None

    def roster(self) -> bytes:
        """The newest roster that the server has."""
        return self._call("GET", ROSTER)

    def send_roster(self, data: bytes) -> None:
        """Have the server take a newer roster; the lead's call."""
        self._call("POST", ROSTER, data)

    def ask(self, request: bytes) -> int:
        """Leave a request for a new certificate; the number of the newest roster that the server has."""
        answer = self._call("POST", RENEWALS, request)
        with in_our_words():  # which holds for whatever else a server may answer
            return int(json.loads(answer)["number"])

    def requests(self) -> list[bytes]:
        """The requests that were left; the lead's call."""
        answer = self._call("GET", RENEWALS)
        with in_our_words():
            return [base64.b64decode(one) for one in json.loads(answer)["requests"]]

    def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        headers = signed_headers(self.tls) if self.lead is None else lead_headers(self.lead, path, body)
        with in_our_words(), httpx.Client(verify=self.tls.client_context(), timeout=_CALL_TIMEOUT_S) as client:
            bounded(client)
            answer = client.request(method, f"https://{self.server}{path}", content=body, headers=headers)
        if answer.status_code != httpx.codes.OK:
            raise RunError(f"the server refused: {reason_in(answer, self.server)}")
        return answer.content

"""Who is at either end of a connection: certificates of the federation's own authority, on both sides."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.supercore.protobuf.client import ProtobufClient

_Client = TypeVar("_Client", bound=ProtobufClient)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """PEM files of one end.

    Attributes:
        ca: certificate of the federation's authority, the only one that is trusted.
        certificate: this end's own.
        key: its private key; a site's and a lead's is EC P-384, and a site signs its Flower calls with it too.
    """

    ca: Path
    certificate: Path
    key: Path

    def client_context(self) -> ssl.SSLContext:
        """For a client: trusts this authority alone, checks the server's name, and shows its own certificate."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context


def staying(client: _Client) -> _Client:
    """The same client, calling no address but its own: Flower's would follow a redirect with its signed headers.

    Whoever runs the server could so make a site or a lead call any address in its network, also without TLS.
    """
    client._client.follow_redirects = False
    return client


def refusal(error: BaseException) -> str | None:
    """Which end does not accept the other's certificate, and why; None where that is not what went wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted here: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and "_ALERT_" in (cause.reason or ""):
            said = cause.reason.rpartition("_ALERT_")[2].replace("_", " ").lower()
            return f"it does not accept this site's certificate: {said}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.RemoteProtocolError):
        return "it hung up, as it does where it does not accept this site's certificate"
    return None

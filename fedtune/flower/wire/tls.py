"""Who is at either end of a connection: certificates of the federation's own authority, on both sides."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flwr.supercore.protobuf.client import ProtobufClient

from fedtune.flower.wire.bounded_http import HungUp, bounded

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
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        return context


def staying(client: _Client) -> _Client:
    """The same client, whose calls are bounded, and which calls no address but its own.

    Flower's would follow a redirect with its signed headers: whoever runs the server could so make a site or a lead
    call any address in its network, also without TLS.
    """
    bounded(client._client)
    return client


_OF_CERTIFICATES = (
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_REQUIRED",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
)
"""TLS alerts that are about the certificate that this end showed; others are about protocols and ciphers."""


def refusal(error: BaseException) -> str | None:
    """Which end does not accept the other's certificate, and why; None where that is not what went wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted here: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and "_ALERT_" in (cause.reason or ""):
            alert = cause.reason.rpartition("_ALERT_")[2]
            said = alert.replace("_", " ").lower()
            if alert in _OF_CERTIFICATES:
                return f"it does not accept this site's certificate: {said}"
            return f"it ended the encryption: {said}"
        if isinstance(cause, HungUp):  # as asyncio's servers do, which send no alert
            return "it hung up right after the handshake; if this goes on, it does not accept this site's certificate"
        cause = cause.__cause__ or cause.__context__
    return None

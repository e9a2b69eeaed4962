"""Who is at either end of a connection: certificates of the federation's own authority, on both sides."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


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

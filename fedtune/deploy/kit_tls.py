"""A kit's files as one end of a connection."""

from __future__ import annotations

from fedtune.deploy.kits import Kit
from fedtune.flower.wire.tls import Tls


def tls_of(kit: Kit) -> Tls:
    """The kit's certificates and key."""
    return Tls(ca=kit.ca, certificate=kit.certificate, key=kit.key)

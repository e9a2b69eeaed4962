"""Where a server is reached: a name or an IP address, and a port."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from fedtune.spec import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_BOUND = "must be host:port, as the sites reach it: a name or an IP address ([v6]:port too), and a port up to 65535"


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A host and a port.

    Attributes:
        host: a DNS name in lower case, or an IP address in its shortest form, without brackets.
    """

    host: str
    port: int

    @classmethod
    def of(cls, text: str, *, key: str = "server") -> Address:
        """The address that `text` spells.

        Raises:
            ConfigError: it is not host:port, or names no single machine (0.0.0.0, a wildcard).
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        if not (colon and _PORT.fullmatch(port) and int(port) < 1 << 16 and bracketed == (":" in host)):
            raise ConfigError(key, text, _BOUND)
        if not is_host(host):
            raise ConfigError(key, text, _BOUND)
        address = ip_address(host)
        return cls(host=host.lower() if address is None else address.compressed, port=int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_host(text: str) -> bool:
    """Whether `text` names one machine: a DNS name without wildcards, or an IP address."""
    address = ip_address(text)
    if address is not None:
        return not address.is_unspecified and not address.is_multicast
    labels = text.split(".")
    # An all-numeric last label is an IP address with a mistake in it, such as 10.0.0.300.
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `text` spells, or None: then it is a name.  A zone (fe80::1%eth0) has no place here."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None

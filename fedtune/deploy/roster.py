"""roster.json: the sites of a federation, as its server and its lead know them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedtune.deploy.certificates import UNREADABLE, common_name, is_p384, public_pem
from fedtune.deploy.kit_file import VERSION
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import check_public_key
from fedtune.spec import ConfigError, check_name, check_one_of

_MOST_UNITS = 1 << 53  # what a float still counts exactly
_KINDS = {str: "a text", int: "a whole number", list: "a list"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A site of the federation, as the server and the lead know it.

    Attributes:
        site_key: public key of its ledger, 64 hex digits.
        datasets: id -> declared size.
        revoked: when it was shut out, in ISO form; None: it takes part.
    """

    site: str
    site_key: str
    datasets: Mapping[str, int]
    certificate: x509.Certificate
    revoked: str | None

    @property
    def node_key(self) -> bytes:
        """Public key of its connection (EC P-384): SubjectPublicKeyInfo in PEM form, as Flower registers nodes."""
        return public_pem(self.certificate)


def read_roster(path: Path) -> tuple[Member, ...]:
    """All sites of the federation, revoked ones too, in the order in which they joined.

    Raises:
        ConfigError: the file is missing or no roster; it names what is wrong.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError("roster", str(path), f"must be a readable file ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError("roster", str(path), "must be JSON") from None
    try:
        check_keys(fields, {"version", "federation", "sites"})
        check_one_of("version", typed("version", fields["version"], int), (VERSION,))
        members = tuple(_member(entry) for entry in typed("sites", fields["sites"], list))
        _check_distinct(members)
    except ConfigError as error:
        raise error.in_file(path) from None
    return members


def write_roster(path: Path, members: Collection[Member], *, federation: str) -> None:
    """Replace the roster at `path`; a server that reads it meanwhile sees the old one or the new one."""
    sites = [
        {
            "site": member.site,
            "certificate": member.certificate.public_bytes(serialization.Encoding.PEM).decode(),
            "site_key": member.site_key,
            "datasets": [{"id": name, "declared_size": size} for name, size in member.datasets.items()],
            "revoked": member.revoked,
        }
        for member in members
    ]
    text = json.dumps({"version": VERSION, "federation": federation, "sites": sites}, indent=1)
    write_durably(path, text.encode() + b"\n")


def read_datasets(entries: object) -> dict[str, int]:
    """The declared size of each data set, from the list in a roster or in a join request.

    Raises:
        ConfigError: it is empty, or an entry is not of that form, or an id repeats.
    """
    datasets: dict[str, int] = {}
    for entry in typed("datasets", entries, list):
        check_keys(entry, {"id", "declared_size"}, key="datasets")
        check_name("datasets.id", typed("datasets.id", entry["id"], str))
        size = typed("datasets.declared_size", entry["declared_size"], int)
        if not 1 <= size < _MOST_UNITS:
            raise ConfigError("datasets.declared_size", size, "must be from 1 to fewer than 2^53")
        if entry["id"] in datasets:
            raise ConfigError("datasets.id", entry["id"], "must not repeat")
        datasets[entry["id"]] = size
    if not datasets:
        raise ConfigError("datasets", [], "must declare at least one data set")
    return datasets


def check_keys(fields: object, keys: Collection[str], *, key: str = "file") -> None:
    """Require `fields` to be an object with exactly these `keys`."""
    if not (isinstance(fields, dict) and set(fields) == set(keys)):
        found = "other keys" if isinstance(fields, dict) else type(fields).__name__  # a file is not quoted
        raise ConfigError(key, found, f"must be an object with the keys {', '.join(sorted(keys))}")


def _member(entry: Any) -> Member:
    check_keys(entry, {"site", "certificate", "site_key", "datasets", "revoked"}, key="sites")
    check_name("site", typed("site", entry["site"], str))
    check_public_key("site_key", typed("site_key", entry["site_key"], str))
    try:
        certificate = x509.load_pem_x509_certificate(typed("certificate", entry["certificate"], str).encode())
        named, connection_key = common_name(certificate.subject), certificate.public_key()  # parsed only now
    except UNREADABLE:
        raise ConfigError("certificate", entry["site"], "must be one in PEM form") from None
    if named != entry["site"] or not is_p384(connection_key):
        raise ConfigError("certificate", entry["site"], "must be the site's own, for an EC P-384 key")
    revoked = entry["revoked"]
    return Member(
        site=entry["site"],
        site_key=entry["site_key"],
        datasets=read_datasets(entry["datasets"]),
        certificate=certificate,
        revoked=None if revoked is None else _moment(revoked),
    )


def _check_distinct(members: Collection[Member]) -> None:
    names: set[str] = set()
    for member in members:
        # A file system may take North for north, and so may a person.
        if not names.isdisjoint((member.site.casefold(), member.node_key.decode())):
            raise ConfigError("site", member.site, "must not repeat another site's name or connection key")
        names |= {member.site.casefold(), member.node_key.decode()}


def _moment(text: Any) -> str:
    """`text`, which must be a time."""
    try:
        datetime.fromisoformat(typed("revoked", text, str))
    except ValueError:
        raise ConfigError("revoked", text, "must be a time in ISO form, or null") from None
    return str(text)


def typed(key: str, value: Any, kind: type) -> Any:
    """`value`, which must be of `kind` itself: true is no whole number."""
    if type(value) is not kind:
        raise ConfigError(key, value, f"must be {_KINDS[kind]}")
    return value

"""Startup kits of a server, a lead or a site: the kit's folder and its kit.toml."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fedtune.codec import decode, parse_json, read_toml, to_toml
from fedtune.extras import require_extra
from fedtune.ops.kits.certificates import (
    Certificate,
    check_issued,
    check_private,
    check_validity,
    encode_public_pem,
    list_certificate_host_names,
    parse_ip_address,
    read_certificate,
    read_connection_key,
)
from fedtune.privacy.keys import SigningKey, check_public_key
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import KIT_SCHEMA, NOT_GIVEN, ConfigError, check_name, check_schema, name_file_in_errors, spec

if TYPE_CHECKING:
    from fedtune.ops.wire.identity import Tls

log = logging.getLogger(__name__)

T = TypeVar("T")
DATABASE = "server.db"  # name of the database file in a server's kit
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_BOUND = "must be the server's address for the sites as host:port: a DNS name or IP address (or [v6]:port)"
_MISSING = {
    "connection_key.pem": "unzip the kit into the folder in which `fedtune site init` made it",
    "site.pem": "unzip the kit that the lead sent into this folder",
}
_RENEWAL = {
    "server": "ask for `fedtune provision renew-server`, and copy the new server.pem here",
    "lead": "run `fedtune provision renew-lead`",
    "site": "ask the lead for a new kit (`fedtune provision renew-site`), and unzip it here",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A host name or IP address with a port."""

    host: str  # a DNS name in lower case, or a normalized IP address without brackets
    port: int

    @classmethod
    def parse_address(cls, text: str) -> Address:
        """Parse an address of the form host:port.

        Raises:
            ConfigError: `text` is not host:port, or does not name a single machine (0.0.0.0, a wildcard).
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        has_port = colon and _PORT.fullmatch(port) and int(port) < 1 << 16
        if not (has_port and bracketed == (":" in host) and is_host(host)):
            raise ConfigError("server", text, _BOUND)
        address = parse_ip_address(host)
        return cls(host=host.lower() if address is None else address.compressed, port=int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_host(text: str) -> bool:
    """Return True if `text` names a single machine: a DNS name without wildcards, or an IP address."""
    address = parse_ip_address(text)
    if address is not None:
        return not address.is_unspecified and not address.is_multicast
    labels = text.split(".")
    # An all-numeric last label indicates an invalid IP address, such as 10.0.0.300.
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def read_spec(cls: type[T], path: Path) -> T:
    """Read the dataclass `cls` from a TOML file; unknown keys are rejected.

    Raises:
        ConfigError: a key is missing, unknown or invalid; the error names the file, the key and the accepted values.
    """
    table = read_toml(path, key="file")
    with name_file_in_errors(path):
        return _check_kit_version(cls, table)


def read_json(cls: type[T], data: bytes, *, key: str) -> T:
    """Read the dataclass `cls` from JSON, as strictly as `read_spec` reads TOML.

    Raises:
        ConfigError: a key is missing, unknown or invalid; `key` is the name of the data in the error.
    """
    return _check_kit_version(cls, parse_json(data, key=key, bound="must be one complete JSON object"))


def _check_kit_version(cls: type[T], table: dict[str, Any]) -> T:
    # Check the version first, because other versions may have other keys.
    if "version" in {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        check_schema("version", table.get("version"), KIT_SCHEMA, of="file")
    return decode(cls, table)


@spec
class KitModel:
    """A base model that runs may use, installed at sites by its hash.

    Attributes:
        sha256: hash of the model's weights, 64 hex digits.
        license: the name of the model's license.
    """

    name: str
    sha256: str
    license: str

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError("sha256", self.sha256, "must be 64 lower-case hex digits")
        if not (self.license.strip() and self.license.isprintable()):
            raise ConfigError("license", self.license, "must name the model's license on one line")


def check_model_names(models: tuple[KitModel, ...]) -> None:
    """Check that all models have distinct names."""
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError("model", names, "must not repeat a name")


@spec
class KitFile:
    """Content of kit.toml.

    Attributes:
        server: the server's address for the sites, as host:port.
        lead: the lead's public key, 64 hex digits.
        key_command: command that prints the lead's private key in PEM format, as a replacement for lead_key.pem; only
            in a lead's kit.
        site: name of the site; None in other kits.
        model: base models that runs may use.
    """

    version: int
    kind: Literal["server", "lead", "site"]
    federation: str
    server: str
    lead: str
    key_command: tuple[str, ...] = ()
    site: str | None = None
    model: tuple[KitModel, ...] = ()

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        Address.parse_address(self.server)
        check_public_key("lead", self.lead)
        if self.key_command and self.kind != "lead":  # a site must not execute a command that its lead chose
            raise ConfigError("key_command", list(self.key_command), "is allowed only in the lead's kit")
        check_model_names(self.model)
        if self.kind == "site":
            if self.site is None:
                raise ConfigError("site", NOT_GIVEN, "is required in a site's kit")
            check_name("site", self.site)
        elif self.site is not None:
            raise ConfigError("site", self.site, "is allowed only in a site's kit")

    def to_toml(self) -> str:
        """Serialize the fields to the text of kit.toml."""
        return to_toml({name: value for name, value in asdict(self).items() if value != ()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit(KitFile):
    """Kit of a server, a lead or a site: the content of kit.toml, and the folder that contains all files."""

    folder: Path

    @classmethod
    def read(cls, folder: Path, *, kind: str) -> Kit:
        """Read the kit in `folder`, which must be of the given kind.

        The method checks that all files exist and that only the owner can read the secret files.  The certificate is
        validated separately, by `check_certificate`.

        Raises:
            ConfigError: a file is missing, a key in kit.toml is invalid, or a secret is readable by others.
        """
        file = folder / "kit.toml"
        if not os.path.isfile(file):  # unlike Path.is_file, False for an inaccessible folder
            raise ConfigError("kit", str(folder), f"must be the folder of a {kind}'s kit; it has no kit.toml")
        read = read_spec(KitFile, file)
        if read.kind != kind:
            bound = f"must be {kind!r}, because this command needs a {kind}'s kit"
            raise ConfigError("kind", read.kind, bound).in_file(file)
        kit = cls(folder=folder, **{field.name: getattr(read, field.name) for field in fields(read)})
        secrets = [kit.key, *([kit.lead_key] if kind == "lead" and not kit.key_command else [])]
        for path in (kit.ca, kit.certificate, *secrets, *([] if kind == "site" else [kit.roster])):
            if not os.path.isfile(path):
                remedy = _MISSING.get(path.name, "")
                bound = "is missing" if remedy else f"is missing from the {kind}'s kit"
                raise ConfigError(str(path), NOT_GIVEN, bound, remedy=remedy)
        for path in secrets:
            check_private(path)
        if kind == "lead" and (public := kit.load_key().public) != kit.lead:
            source = "the key from key_command" if kit.key_command else kit.lead_key
            raise ConfigError("lead", kit.lead, f"must be the public key of {source}, {public}").in_file(file)
        return kit

    def find_site_files(self, site_toml: Path) -> SiteFiles:
        """Return the file paths in the policy `site_toml`, after checking that policy and kit name the same site.

        Raises:
            ConfigError: `site_toml` is not a policy, or belongs to another site.
        """
        files = SiteFiles.from_site_toml(site_toml)
        if files.policy.site != self.site:
            raise ConfigError("site", files.policy.site, f"must be {self.site}, as in the kit").in_file(site_toml)
        return files

    @property
    def ca(self) -> Path:
        """The path of the authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The path of this machine's certificate."""
        return self.folder / f"{self.kind}.pem"

    @property
    def key(self) -> Path:
        """The path of the private EC P-384 key of this machine's certificate; for a site, also Flower's node key."""
        return self.folder / ("server_key.pem" if self.kind == "server" else "connection_key.pem")

    @property
    def lead_key(self) -> Path:
        """The path of the lead's private Ed25519 signing key; only in a lead's kit."""
        return self.folder / "lead_key.pem"

    def load_key(self) -> SigningKey:
        """Load the lead's signing key from its file or its command.

        Raises:
            ConfigError: the key cannot be read.
        """
        return SigningKey.load(self.lead_key, command=self.key_command, named_in=self.folder / "kit.toml")

    @property
    def roster(self) -> Path:
        """The path of the roster; only in a server's or a lead's kit."""
        return self.folder / "roster.json"

    def tls(self) -> Tls:
        """Return the paths of the certificates and the key for TLS connections."""
        from fedtune.ops.wire.identity import Tls

        return Tls(ca=self.ca, certificate=self.certificate, key=self.key)

    def check_certificate(self, now: datetime) -> Certificate:
        """Validate this machine's certificate at the time `now` (with a time zone), and return its properties.

        Raises:
            ConfigError: the certificate has another key, issuer or name, or is not valid at `now`.
        """
        ca, certificate = read_certificate(self.ca), read_certificate(self.certificate)
        key, issued = str(self.certificate), Certificate.from_x509(certificate)
        if encode_public_pem(certificate) != encode_public_pem(read_connection_key(self.key)):
            raise ConfigError(key, issued.name, f"must match the key in {self.key.name}; it was issued for another key")
        check_issued(certificate, ca=ca, key=key)
        expected = self.site if self.kind == "site" else self.kind
        if issued.name != expected:
            raise ConfigError(key, issued.name, f"must be a certificate for {expected}")
        if self.kind == "server":
            host, names = Address.parse_address(self.server).host, list_certificate_host_names(certificate)
            if host not in names:
                raise ConfigError(key, host, f"must be one of the names in the certificate: {names}")
        check_validity(ca, now=now, key=str(self.ca), renewal="provision the federation again")
        check_validity(certificate, now=now, key=key, renewal=_RENEWAL[self.kind])
        return issued


def read_signing_key(path: Path) -> SigningKey:
    """Read a signing key from a PEM file, or the signing key of a site.toml or a kit.toml.

    Raises:
        ConfigError: the key is missing or unreadable.
    """
    if path.name == "kit.toml":
        return Kit.read(path.parent, kind="lead").load_key()
    return SiteFiles.from_site_toml(path).load_key() if path.suffix == ".toml" else SigningKey.load(path)


def find_model_store_path(kit_folder: Path, sha256: str) -> Path:
    """Return the path of a base model's folder in the model store; the folder may not exist."""
    return kit_folder / "models" / sha256


def require_model_reader(kit_folder: Path, sha256: str) -> None:
    """Check that the extra `gguf` is installed if the model with hash `sha256` is a GGUF file."""
    if any(find_model_store_path(kit_folder, sha256).glob("*.gguf")):
        require_extra("base model", sha256, "gguf")


class KitCertificate:
    """Watcher that detects a renewed certificate in the kit while a process is running.

    Raises:
        ConfigError: the kit's certificate cannot be used.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit, self._mark, self._said = kit, stat_signature(kit.certificate), ""
        self.certificate = kit.check_certificate(datetime.now(UTC))

    def is_new(self) -> bool:
        """Return True if the kit's certificate was replaced by another valid certificate since the last call."""
        try:
            mark = stat_signature(self._kit.certificate)
            if mark == self._mark:
                return False
            certificate = self._kit.check_certificate(datetime.now(UTC))
        except Exception as error:  # the file may be only partly copied
            if str(error) != self._said:
                log.warning("the kit's new certificate is ignored: %s", error)
            self._said = str(error)
            return False
        self._mark = mark
        if certificate == self.certificate:
            return False
        self.certificate = certificate
        log.info("the certificate was replaced", extra={"certificate_until": certificate.not_after.isoformat()})
        return True


def stat_signature(path: Path) -> tuple[int, int, int]:
    """Return a file's inode, modification time and size, which change when the file is replaced or written."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size

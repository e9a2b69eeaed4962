"""Startup kits: the folder that a server, a lead or a site starts from, and its kit.toml."""

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
    check_in_force,
    check_issued,
    check_private,
    ip_address,
    names_of,
    public_pem,
    read_certificate,
    read_connection_key,
)
from fedtune.privacy.keys import SigningKey, check_public_key
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import KIT_SCHEMA, NOT_GIVEN, ConfigError, check_name, check_schema, errors_in, spec

if TYPE_CHECKING:
    from fedtune.ops.wire.identity import Tls

log = logging.getLogger(__name__)

T = TypeVar("T")
DATABASE = "server.db"  # in the folder of a server's kit
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_BOUND = "must be host:port, as the sites reach it: a name or an IP address ([v6]:port too), and a port up to 65535"
_MISSING = {
    "connection_key.pem": "unzip the kit into the folder in which `fedtune site init` made it",
    "site.pem": "unzip the kit that the lead sent into this folder",
}
_RENEWAL = {
    "server": "ask for `fedtune provision renew-server`, and put the new server.pem here",
    "lead": "run `fedtune provision renew-lead`",
    "site": "ask the lead for a new kit (`fedtune provision renew-site`), and unzip it here",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A host and a port."""

    host: str  # a DNS name in lower case, or an IP address in its shortest form, without brackets
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
    """`text` names one machine: a DNS name without wildcards, or an IP address."""
    address = ip_address(text)
    if address is not None:
        return not address.is_unspecified and not address.is_multicast
    labels = text.split(".")
    # An all-numeric last label is an IP address with a mistake in it, such as 10.0.0.300.
    return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def read_spec(cls: type[T], path: Path) -> T:
    """An instance of the spec `cls` from a TOML file, strictly.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    table = read_toml(path, key="file")
    with errors_in(path):
        return _of_this_version(cls, table)


def read_json(cls: type[T], data: bytes, *, key: str) -> T:
    """An instance of the spec `cls` from JSON, as strictly.

    Raises:
        ConfigError: names the key, its value and what would be accepted; `key` is what a person calls the file.
    """
    return _of_this_version(cls, parse_json(data, key=key, bound="must be JSON: one object, whole"))


def _of_this_version(cls: type[T], table: dict[str, Any]) -> T:
    # First: another version's file may have other keys, too.
    if "version" in {one.name for one in fields(cls)}:  # type: ignore[arg-type]
        check_schema("version", table.get("version"), KIT_SCHEMA, of="file")
    return decode(cls, table)


@spec
class KitModel:
    """A base model that runs may name; a site installs it by its hash.

    Attributes:
        sha256: of the model's weights, 64 hex digits.
        licence: its licence, for people.
    """

    name: str
    sha256: str
    licence: str

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError("sha256", self.sha256, "must be 64 lower-case hex digits")
        if not (self.licence.strip() and self.licence.isprintable()):
            raise ConfigError("licence", self.licence, "must name the model's licence on one line")


def check_models(models: tuple[KitModel, ...]) -> None:
    """Require names that do not repeat."""
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError("model", names, "must not repeat a name")


@spec
class KitFile:
    """The content of kit.toml.

    Attributes:
        server: host:port as the sites reach it.
        lead: public key of the lead, 64 hex digits.
        key_command: command that prints the lead's private key in PEM, in place of lead_key.pem; in a lead's kit alone.
        site: name of the site; None in other kits.
        model: base models that runs may name.
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
        Address.of(self.server)
        check_public_key("lead", self.lead)
        if self.key_command and self.kind != "lead":  # a site runs no command that its lead names
            raise ConfigError("key_command", list(self.key_command), "has no place in a kit that is not the lead's")
        check_models(self.model)
        if self.kind == "site":
            if self.site is None:
                raise ConfigError("site", NOT_GIVEN, "is required in a site's kit")
            check_name("site", self.site)
        elif self.site is not None:
            raise ConfigError("site", self.site, "has no place in a kit that is not a site's")

    def to_toml(self) -> str:
        """The text of the file."""
        return to_toml({name: value for name, value in asdict(self).items() if value != ()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit(KitFile):
    """A server's, a lead's or a site's kit: what its kit.toml says, and its folder with the other files."""

    folder: Path

    @classmethod
    def read(cls, folder: Path, *, kind: str) -> Kit:
        """The kit in `folder`, which must be one of `kind`.

        Every file that such a kit needs is there, and its secrets are readable by their owner alone; whether the
        certificate is in force is `check_certificate`'s question.

        Raises:
            ConfigError: names the file, or the key in kit.toml, that is missing or wrong.
        """
        file = folder / "kit.toml"
        if not os.path.isfile(file):  # unlike Path.is_file, it takes a folder that is closed to us for an empty one
            raise ConfigError("kit", str(folder), f"must be the folder of a {kind}'s kit; it holds no kit.toml")
        read = read_spec(KitFile, file)
        if read.kind != kind:
            raise ConfigError("kind", read.kind, f"must be {kind!r} here").in_file(file)
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
            found = "the command's key" if kit.key_command else kit.lead_key
            raise ConfigError("lead", kit.lead, f"must be the public key of {found}, {public}").in_file(file)
        return kit

    def site_files(self, site_toml: Path) -> SiteFiles:
        """The files that `site_toml` names, which must be those of the site whose kit this is.

        Raises:
            ConfigError: it is no policy, or another site's.
        """
        files = SiteFiles.of(site_toml)
        if files.policy.site != self.site:
            raise ConfigError("site", files.policy.site, f"must be {self.site}, as in the kit").in_file(site_toml)
        return files

    @property
    def ca(self) -> Path:
        """Certificate of the federation's authority."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """Certificate of this machine."""
        return self.folder / f"{self.kind}.pem"

    @property
    def key(self) -> Path:
        """Private key of this machine's certificate, EC P-384; a site's is its node key for Flower, too."""
        return self.folder / ("server_key.pem" if self.kind == "server" else "connection_key.pem")

    @property
    def lead_key(self) -> Path:
        """Private Ed25519 key of the lead, which signs requests; only a lead's kit has it."""
        return self.folder / "lead_key.pem"

    def load_key(self) -> SigningKey:
        """Load the lead's signing key from its file or its command.

        Raises:
            ConfigError: it cannot be read.
        """
        return SigningKey.load(self.lead_key, command=self.key_command, named_in=self.folder / "kit.toml")

    @property
    def roster(self) -> Path:
        """The federation's sites; in a server's and a lead's kit."""
        return self.folder / "roster.json"

    def tls(self) -> Tls:
        """Its files as one end of a connection."""
        from fedtune.ops.wire.identity import Tls

        return Tls(ca=self.ca, certificate=self.certificate, key=self.key)

    def check_certificate(self, now: datetime) -> Certificate:
        """The certificate of this machine, fit for use at `now` (with a time zone).

        Raises:
            ConfigError: it belongs to another key, another authority or another name, or is not in force.
        """
        ca, certificate = read_certificate(self.ca), read_certificate(self.certificate)
        key, found = str(self.certificate), Certificate.of(certificate)
        if public_pem(certificate) != public_pem(read_connection_key(self.key)):
            raise ConfigError(key, found.name, f"must belong to the key in {self.key.name}; it was made for another")
        check_issued(certificate, ca=ca, key=key)
        expected = self.site if self.kind == "site" else self.kind
        if found.name != expected:
            raise ConfigError(key, found.name, f"must be the certificate of {expected}")
        if self.kind == "server" and (host := Address.of(self.server).host) not in names_of(certificate):
            raise ConfigError(key, host, f"must be in the certificate, which names {names_of(certificate)}")
        check_in_force(ca, now=now, key=str(self.ca), renewal="provision the federation again")
        check_in_force(certificate, now=now, key=key, renewal=_RENEWAL[self.kind])
        return found


def read_signing_key(path: Path) -> SigningKey:
    """The signing key in a PEM file, or that of the site or the lead whose site.toml or kit.toml `path` is.

    Raises:
        ConfigError: it is missing, or cannot be read.
    """
    if path.name == "kit.toml":
        return Kit.read(path.parent, kind="lead").load_key()
    return SiteFiles.of(path).key() if path.suffix == ".toml" else SigningKey.load(path)


def model_place(kit_folder: Path, sha256: str) -> Path:
    """Return the folder of an installed base model, which may be missing."""
    return kit_folder / "models" / sha256


def require_model_reader(kit_folder: Path, sha256: str) -> None:
    """Require the extra that reads an installed GGUF model; a model that is missing or of safetensors needs none."""
    if any(model_place(kit_folder, sha256).glob("*.gguf")):
        require_extra("base model", sha256, "gguf")


class KitCertificate:
    """The certificate in a kit while a process runs: one that is copied there is used within seconds.

    Raises:
        ConfigError: the kit's certificate is not fit for use.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit, self._mark, self._said = kit, file_mark(kit.certificate), ""
        self.certificate = kit.check_certificate(datetime.now(UTC))

    def is_new(self) -> bool:
        """The kit has another certificate than at the last look, fit for use."""
        try:
            mark = file_mark(self._kit.certificate)
            if mark == self._mark:
                return False
            certificate = self._kit.check_certificate(datetime.now(UTC))
        except Exception as error:  # it may be in the middle of being copied
            if str(error) != self._said:
                log.warning("the kit's certificate is not used: %s", error)
            self._said = str(error)
            return False
        self._mark = mark
        if certificate == self.certificate:
            return False
        self.certificate = certificate
        log.info("a new certificate is used", extra={"certificate_until": certificate.not_after.isoformat()})
        return True


def file_mark(path: Path) -> tuple[int, int, int]:
    """Inode, size and time of a file: they change when it is replaced or written."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size

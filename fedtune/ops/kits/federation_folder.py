"""The federation folder that `fedtune provision init` creates, with federation.toml, authority, kits and roster."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.codec import read_regular_file
from fedtune.formatting import group_hex
from fedtune.ops.files import translate_write_errors
from fedtune.ops.kits.certificates import (
    Authority,
    Certificate,
    check_common_name,
    check_days,
    encode_certificate_pem,
    list_certificate_host_names,
    read_certificate,
)
from fedtune.ops.kits.kit_file import Address, KitFile, KitModel, check_model_names, is_host, read_json, read_spec
from fedtune.ops.kits.members import Member, Roster
from fedtune.privacy.durable import lock_folder, write_durably
from fedtune.privacy.keys import SigningKey
from fedtune.spec import KIT_SCHEMA, ConfigError, spec
from fedtune.system import fsync_folder

SETTINGS, CHANGE = "federation.toml", "change.json"
Kind = Literal["server", "lead", "site"]
_RETIRED = "retired_keys.json"
_TEMPLATES = Path(__file__).with_name("templates")


@spec
class CertificateDays:
    """Validity of each type of certificate, in days, limited by the expiry of the authority's certificate."""

    authority_days: int = 3650
    server_days: int = 365
    lead_days: int = 365
    site_days: int = 365

    def __post_init__(self) -> None:
        for key in ("authority_days", "server_days", "lead_days", "site_days"):
            check_days(key, getattr(self, key))


@spec
class FederationFile:
    """Content of federation.toml.

    Attributes:
        server: the server's address for the sites, as host:port.
        also_known_as: additional names or IP addresses of the server, to include in its certificate.
        key_command: command that prints the lead's private key in PEM format, as a replacement for lead/lead_key.pem.
        model: base models that runs may use.
    """

    name: str
    server: str
    key_command: tuple[str, ...] = ()
    also_known_as: tuple[str, ...] = ()
    certificates: CertificateDays = CertificateDays()
    model: tuple[KitModel, ...] = ()

    def __post_init__(self) -> None:
        check_common_name("name", self.name)
        Address.parse_address(self.server)
        for host in self.also_known_as:
            if not is_host(host):
                raise ConfigError("also_known_as", host, "must be a DNS name or an IP address, without a port")
        check_model_names(self.model)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The distinct names and addresses of the server, beginning with the address that the kits contain."""
        first = Address.parse_address(self.server).host
        return tuple(dict.fromkeys((first, *(host.lower() for host in self.also_known_as))))


@spec
class _RetiredKeys:
    """Content of retired_keys.json: fingerprints of connection keys, and site keys."""

    version: int
    keys: tuple[str, ...]


@spec
class _Change:
    """Content of change.json: a committed change, some files of which may not be written yet.

    Attributes:
        files: path in the federation folder -> content in base64.
    """

    version: int
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationFolder:
    """The folder of a federation and its current settings.

    The lead may edit the settings in federation.toml; changes apply to kits that are created later.
    """

    folder: Path
    settings: FederationFile
    lead_key: str  # public key of the lead, 64 hex digits

    @classmethod
    def open(cls, folder: Path) -> FederationFolder:
        """Open the federation in `folder`; first complete a committed change if a killed command left one.

        Raises:
            ConfigError: the folder contains no federation, its settings are invalid, or an interrupted change cannot be
                written.
        """
        if (folder / CHANGE).exists():
            with lock_folder(folder):
                _complete_change(folder)
        if not all(map(os.path.isfile, (folder / SETTINGS, folder / "server" / "roster.json"))):
            bound = "must be the folder that `fedtune provision init` made; name it with --federation"
            raise ConfigError("--federation", str(folder), bound)
        settings = read_spec(FederationFile, folder / SETTINGS)
        made_for = read_spec(KitFile, folder / "lead" / "kit.toml")
        if settings.name != made_for.federation:
            bound = f"must stay {made_for.federation!r}, the name in the certificates"
            raise ConfigError("name", settings.name, bound).in_file(folder / SETTINGS)
        return cls(folder=folder, settings=settings, lead_key=made_for.lead)

    @classmethod
    @contextmanager
    def open_locked(cls, folder: Path) -> Iterator[FederationFolder]:
        """Open the federation in `folder`, and lock it against changes by other commands during the block."""
        cls.open(folder)
        with lock_folder(folder):
            _complete_change(folder)
            yield cls.open(folder)

    @property
    def certificates(self) -> dict[str, Certificate]:
        """The certificates of the authority, the server and the lead's connection, by name."""
        files = {"authority": "server/ca.pem", "server": "server/server.pem", "lead": "lead/lead.pem"}
        return {name: Certificate.from_x509(read_certificate(self.folder / file)) for name, file in files.items()}

    def issue(
        self, kind: Kind, public: ec.EllipticCurvePublicKey, *, name: str, days: int | None, now: datetime
    ) -> x509.Certificate:
        """Issue a certificate that is valid for `days` days (None: the default in federation.toml).

        Raises:
            ConfigError: the authority's key is missing or belongs to another federation, or the server's certificate
                does not cover the address in a site's kit.
        """
        if kind == "site":
            names = list_certificate_host_names(read_certificate(self.folder / "server" / "server.pem"))
            if self.settings.hosts[0] not in names:
                bound = f"is not in the server's certificate ({', '.join(names)}): run renew-server first"
                raise ConfigError("server", self.settings.server, bound).in_file(self.folder / SETTINGS)
        if days is not None:
            check_days("--days", days)
        days = days or int(getattr(self.settings.certificates, f"{kind}_days"))
        authority = Authority.load(self.folder / "authority")
        if authority.certificate != read_certificate(ca := self.folder / "server" / "ca.pem"):
            bound = f"must be the authority of this federation, with the certificate {ca}"
            raise ConfigError("authority", str(self.folder / "authority"), bound)
        hosts = self.settings.hosts if kind == "server" else ()
        return authority.issue(public, kind=kind, name=name, hosts=hosts, days=days, now=now)

    @property
    def roster(self) -> Roster:
        """The current roster."""
        return Roster.read(self.folder / "server" / "roster.json")

    def apply_change(self, members: Collection[Member], files: Mapping[str, bytes]) -> None:
        """Atomically write `files` (path in the folder -> content) and both signed rosters with `members`.

        The change is committed when change.json is on disk.  After that, the next process that opens the folder
        completes an interrupted change.  Before that, no part of the change is visible, so that a failed change cannot
        reach the server in part.  The number of the roster is the current time, so that a folder restored from a backup
        does not reuse a number.

        Raises:
            ConfigError: the folder cannot be written.
        """
        before = self.roster.number if (self.folder / "server" / "roster.json").exists() else 0
        roster = Roster(
            version=KIT_SCHEMA,
            federation=self.settings.name,
            sites=tuple(members),
            number=max(before + 1, int(time.time())),
        ).sign_roster(self._load_signing_key())
        both = {f"{kind}/roster.json": roster.to_bytes() for kind in ("lead", "server")}
        encoded = {path: base64.b64encode(data).decode() for path, data in {**files, **both}.items()}
        with translate_write_errors(self.folder, key="--federation"):
            write_durably(self.folder / CHANGE, _to_json_bytes(_Change(version=KIT_SCHEMA, files=encoded)))
        _complete_change(self.folder)

    def _load_signing_key(self) -> SigningKey:
        command, file = self.settings.key_command, self.folder / SETTINGS
        key = SigningKey.load(self.folder / "lead" / "lead_key.pem", command=command, named_in=file)
        if key.public != self.lead_key:  # the server would reject a roster signed with this key
            raise ConfigError("lead key", key.public, f"must be the federation's lead key, {self.lead_key}")
        return key

    def read_retired_keys(self) -> frozenset[str]:
        """Read the replaced site keys, and the fingerprints of replaced connection keys, which Flower never accepts
        again.
        """
        path = self.folder / _RETIRED
        try:
            return frozenset(read_json(_RetiredKeys, read_regular_file(path), key="file").keys)
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise ConfigError("file", str(path), f"must be a readable file ({error.strerror})") from None
        except ConfigError as error:
            raise error.in_file(path) from None

    def retire_keys(self, replaced: set[str]) -> dict[str, bytes]:
        """Return the file of retired keys with `replaced` added, as `files` for `apply_change`."""
        keys = tuple(sorted(self.read_retired_keys() | replaced))
        return {_RETIRED: _to_json_bytes(_RetiredKeys(version=KIT_SCHEMA, keys=keys))}

    def list_kit_files(self, kind: Kind, certificate: x509.Certificate, *, site: str | None = None) -> dict[str, bytes]:
        """Build the public files of a kit, except the roster, as a mapping from file name to content."""
        kit = KitFile(
            version=KIT_SCHEMA,
            kind=kind,
            federation=self.settings.name,
            server=self.settings.server,
            lead=self.lead_key,
            key_command=self.settings.key_command if kind == "lead" else (),
            site=site,
            model=self.settings.model,
        )
        ca = read_certificate(self.folder / "authority" / "ca.pem")
        return {
            "kit.toml": kit.to_toml().encode(),
            "ca.pem": encode_certificate_pem(ca),
            "README.md": _render_readme(kit, certificate, ca=ca).encode(),
            f"{kind}.pem": encode_certificate_pem(certificate),
        }


def _complete_change(folder: Path) -> None:
    """Write all files of a committed change if change.json exists; the operation is idempotent."""
    path = folder / CHANGE
    if not path.exists():
        return
    try:
        change = read_json(_Change, read_regular_file(path), key="file")
        for name, encoded in change.files.items():
            write_durably(folder / name, base64.b64decode(encoded))
        path.unlink()
        fsync_folder(folder)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        bound = f"has a partly written change: {error.strerror or error}{where}"
        raise ConfigError("--federation", str(folder), f"{bound}. Fix this; the next command completes it") from None
    except ConfigError as error:
        raise error.in_file(path) from None
    except ValueError:
        raise ConfigError("files", "invalid base64", "must be base64-encoded bytes").in_file(path) from None


def _to_json_bytes(what: _Change | _RetiredKeys) -> bytes:
    return json.dumps(dataclasses.asdict(what), indent=1).encode() + b"\n"


def _render_readme(kit: KitFile, certificate: x509.Certificate, *, ca: x509.Certificate) -> str:
    """Render the README.md of a kit, which describes its files, its secrets and the commands to run."""
    details = Certificate.from_x509(certificate)
    template = (_TEMPLATES / f"{kit.kind}.md").read_text(encoding="utf-8")
    return template.format(
        federation=kit.federation,
        server=kit.server,
        port=Address.parse_address(kit.server).port,
        hosts=", ".join(list_certificate_host_names(certificate)),
        site=kit.site,
        fingerprint=group_hex(details.fingerprint),
        ends=f"{details.not_after:%Y-%m-%d}",
        lead_key=kit.lead,
        lead=group_hex(kit.lead),
        authority=group_hex(Certificate.from_x509(ca).fingerprint),
    )

"""Provisioning a federation: its authority, and the kits of its server and its lead; `membership` lets sites in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.authority import Authority, certificate_pem, make_key, private_pem
from fedtune.deploy.certificates import Certificate, check_days, p384_of, read_certificate
from fedtune.deploy.federation_file import read_federation
from fedtune.deploy.federation_folder import SETTINGS, FederationFolder
from fedtune.deploy.folders import new_folder, write_secret, writing
from fedtune.deploy.roster import Member
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """A federation as it stands.

    Attributes:
        server: host:port.
        lead_key: public key of the lead, 64 hex digits.
        members: its sites, revoked ones too.
    """

    folder: Path
    federation: str
    server: str
    lead_key: str
    authority: Certificate
    server_certificate: Certificate
    lead_certificate: Certificate
    members: tuple[Member, ...]


def init(file: Path, *, out: Path | None, now: datetime) -> Overview:
    """Make a federation from its federation.toml, in the new folder `out` (None: one that is named after it).

    Raises:
        ConfigError: the file is wrong, or the folder exists or cannot be written.
    """
    settings = read_federation(file)
    target = out or Path(settings.name)
    with new_folder(target, key="--out") as building:
        authority = Authority.make(settings.name, days=settings.certificates.authority_days, now=now)
        server, lead = make_key(), make_key()
        for name in ("authority", "server", "lead", "sites"):
            (building / name).mkdir(mode=0o700)
        write_secret(building / "authority" / "ca_key.pem", private_pem(authority.key))
        write_secret(building / "server" / "server_key.pem", private_pem(server))
        write_secret(building / "lead" / "connection_key.pem", private_pem(lead))
        lead_key = SigningKey.load_or_make(building / "lead" / "lead_key.pem").public
        write_durably(building / SETTINGS, file.read_bytes())
        write_durably(building / "authority" / "ca.pem", certificate_pem(authority.certificate))
        federation = FederationFolder(folder=building, settings=settings, lead_key=lead_key)
        _certify_server(federation, authority, public=server.public_key(), days=None, now=now)
        _certify_lead(federation, authority, public=lead.public_key(), days=None, now=now)
        federation.write_members(())
    return overview(target)


def renew_server(folder: Path, *, days: int | None, now: datetime) -> Overview:
    """Make a new certificate for the server's key, for the names that federation.toml now gives it.

    Raises:
        ConfigError: the authority's key is not at hand.
    """
    with FederationFolder.held(folder) as federation, writing(folder, key="--federation"):
        public = p384_of(read_certificate(federation.server / "server.pem"), key="server.pem")
        _certify_server(federation, federation.authority(), public=public, days=days, now=now)
    return overview(folder)


def renew_lead(folder: Path, *, days: int | None, now: datetime) -> Overview:
    """Make a new certificate for the lead's connection key.

    Raises:
        ConfigError: the authority's key is not at hand.
    """
    with FederationFolder.held(folder) as federation, writing(folder, key="--federation"):
        public = p384_of(read_certificate(federation.lead / "lead.pem"), key="lead.pem")
        _certify_lead(federation, federation.authority(), public=public, days=days, now=now)
    return overview(folder)


def overview(folder: Path) -> Overview:
    """The federation in `folder` as it stands.

    Raises:
        ConfigError: the folder holds none.
    """
    federation = FederationFolder.open(folder)
    return Overview(
        folder=folder,
        federation=federation.settings.name,
        server=federation.settings.server,
        lead_key=federation.lead_key,
        authority=Certificate.of(federation.ca()),
        server_certificate=Certificate.of(read_certificate(federation.server / "server.pem")),
        lead_certificate=Certificate.of(read_certificate(federation.lead / "lead.pem")),
        members=federation.members(),
    )


def _certify_server(
    federation: FederationFolder,
    authority: Authority,
    *,
    public: ec.EllipticCurvePublicKey,
    days: int | None,
    now: datetime,
) -> None:
    settings = federation.settings
    days = settings.certificates.server_days if days is None else days
    check_days("--days", days)
    certificate = authority.issue_server(public, hosts=settings.hosts, days=days, now=now)
    federation.write_server(certificate, ca=authority.certificate)


def _certify_lead(
    federation: FederationFolder,
    authority: Authority,
    *,
    public: ec.EllipticCurvePublicKey,
    days: int | None,
    now: datetime,
) -> None:
    days = federation.settings.certificates.lead_days if days is None else days
    check_days("--days", days)
    certificate = authority.issue_client(public, kind="lead", name="lead", days=days, now=now)
    federation.write_lead(certificate, ca=authority.certificate)

"""Provisioning of a federation: creation of authority, server and lead; addition, renewal and revocation of sites.

All changes of a `FederationFolder` are atomic: a failed or killed command has made either its complete change or no
change.  No command changes the kits of other sites.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.codec import read_regular_file
from fedtune.ops.files import create_folder, make_zip, write_secret
from fedtune.ops.kits.certificates import (
    Authority,
    Certificate,
    compute_key_fingerprint,
    encode_certificate_pem,
    encode_private_pem,
    extract_p384_public_key,
    generate_connection_key,
    read_certificate,
)
from fedtune.ops.kits.federation_folder import SETTINGS, FederationFile, FederationFolder
from fedtune.ops.kits.kit_file import read_spec
from fedtune.ops.kits.members import JoinRequest, Member
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey
from fedtune.spec import ConfigError, name_file_in_errors

OwnKind = Literal["server", "lead"]


def init_federation(file: Path, *, out: Path | None, now: datetime) -> FederationFolder:
    """Create the folder of a federation from its federation.toml.

    `out` is the new folder; if it is None, the folder has the name of the federation.

    Raises:
        ConfigError: the file is invalid, or the folder exists or cannot be written.
    """
    settings = read_spec(FederationFile, file)
    target = out or Path(settings.name)
    with create_folder(target, key="--out") as building:
        authority = Authority.create_authority(settings.name, days=settings.certificates.authority_days, now=now)
        server, lead = generate_connection_key(), generate_connection_key()
        for name in ("authority", "server", "lead", "sites"):
            (building / name).mkdir(mode=0o700)
        write_secret(building / "authority" / "ca_key.pem", encode_private_pem(authority.key))
        write_secret(building / "server" / "server_key.pem", encode_private_pem(server))
        write_secret(building / "lead" / "connection_key.pem", encode_private_pem(lead))
        command, lead_key = settings.key_command, building / "lead" / "lead_key.pem"
        public = SigningKey.load_or_create(lead_key, command=command, named_in=file).public
        write_durably(building / SETTINGS, read_regular_file(file))
        for name in ("authority", "server"):
            write_durably(building / name / "ca.pem", encode_certificate_pem(authority.certificate))
        federation = FederationFolder(folder=building, settings=settings, lead_key=public)
        kits = _build_public_kit(federation, "server", server.public_key(), days=None, now=now)
        kits |= _build_public_kit(federation, "lead", lead.public_key(), days=None, now=now)
        federation.apply_change((), kits)
    return FederationFolder.open(target)


def renew_own_certificate(folder: Path, kind: OwnKind, *, days: int | None, now: datetime) -> Certificate:
    """Issue a new certificate for the existing key of the server or the lead.

    A server certificate contains the names in federation.toml.

    Raises:
        ConfigError: the authority's key is missing.
    """
    path = folder / kind / f"{kind}.pem"
    with FederationFolder.open_locked(folder) as federation:
        public = extract_p384_public_key(read_certificate(path), key=path.name)
        kit = _build_public_kit(federation, kind, public, days=days, now=now)
        federation.apply_change(federation.roster.sites, kit)
    return Certificate.from_x509(read_certificate(path))


def _build_public_kit(
    federation: FederationFolder, kind: OwnKind, public: ec.EllipticCurvePublicKey, *, days: int | None, now: datetime
) -> dict[str, bytes]:
    """Build the public files of the server's or the lead's kit, except the roster: path in the folder -> content."""
    certificate = federation.issue(kind, public, name=kind, days=days, now=now)
    return {f"{kind}/{name}": data for name, data in federation.list_kit_files(kind, certificate).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinResult:
    """Result of adding or renewing a site."""

    member: Member
    archive: Path  # the zip to send to the site
    changes: tuple[str, ...] = ()  # sentences that describe all changes except that of the certificate


Asked = tuple[JoinRequest, Callable[[], JoinResult]]
"""A valid request, and the function that repeats the checks and admits the site after people have compared the keys."""


def check_join_request(folder: Path, *, request: Path, days: int | None, now: datetime) -> Asked:
    """Read and validate a site's request to join the federation in `folder`.

    Raises:
        ConfigError: the request is invalid, or another site has its name or one of its keys.
    """

    def find_replaced(federation: FederationFolder, asked: JoinRequest) -> None:
        with name_file_in_errors(request):
            for member in federation.roster.sites:
                if member.site.casefold() == asked.site.casefold():  # case-insensitive file systems
                    again = f"`renew-site {member.site} REQUEST`"
                    bound = f"is the name of another site; for a new request from the same site, use {again}"
                    if member.revoked:
                        bound = f"was revoked on {member.revoked}: add it again with {again}"
                    raise ConfigError("site", asked.site, bound)
            _check_keys(federation, asked)

    return _check_request(folder, request, find_replaced, days=days, now=now)


def check_renewal_request(
    folder: Path, name: str, *, request: Path, days: int | None, new_site_key: bool, now: datetime
) -> Asked:
    """Read and validate a site's new request, which may contain new keys or other declared data sets.

    Args:
        folder: the federation's folder.
        name: name of the site.
        request: the file with the request.
        days: validity of the new certificate in days; None: the default in federation.toml.
        new_site_key: whether the request may contain a new site key, and thus a new ledger.
        now: the current time, with a time zone.

    Raises:
        ConfigError: the site is unknown or was revoked without a new connection key, or the request is invalid.
    """

    def find_replaced(federation: FederationFolder, asked: JoinRequest) -> Member:
        old = _find_member(name, federation.roster.sites)
        with name_file_in_errors(request):
            if asked.site != old.site:
                raise ConfigError("site", asked.site, f"must be {old.site!r}, the name of the site to renew")
            if asked.node_key == old.node_key:
                _check_not_revoked(old)
            _check_keys(federation, asked, old)
            if asked.site_key != old.site_key and not new_site_key:
                bound = (
                    f"differs from the site's current key, {old.site_key}. A new key means a new ledger, in which the "
                    "budget of the same people starts over. If you and the site agreed on that, add --new-site-key"
                )
                raise ConfigError("site_key", asked.site_key, bound)
        return old

    return _check_request(folder, request, find_replaced, days=days, now=now)


def _check_request(
    folder: Path,
    request: Path,
    find_replaced: Callable[[FederationFolder, JoinRequest], Member | None],
    *,
    days: int | None,
    now: datetime,
) -> Asked:
    """Read a join request and validate it; `find_replaced` returns the member to replace, or None for a new site."""
    join = JoinRequest.read(request)

    def check_member(federation: FederationFolder) -> tuple[Member | None, Member]:
        old = find_replaced(federation, join)
        return old, Member(
            site=join.site,
            certificate=_issue_site_certificate(federation, join.signing_request, site=join.site, days=days, now=now),
            site_key=join.site_key,
            datasets=join.datasets,
            revoked=None,
        )

    def admit() -> JoinResult:
        with FederationFolder.open_locked(folder) as federation:
            return _admit(federation, *check_member(federation))

    check_member(FederationFolder.open(folder))
    return join, admit


def renew_site(folder: Path, name: str, *, days: int | None, now: datetime) -> JoinResult:
    """Issue a new certificate and kit for a site with its existing keys and data sets.

    Raises:
        ConfigError: the site is unknown or was revoked.
    """
    with FederationFolder.open_locked(folder) as federation:
        old = _find_member(name, federation.roster.sites)
        _check_not_revoked(old)
        certificate = _issue_site_certificate(federation, old.x509_certificate, site=name, days=days, now=now)
        return _admit(federation, old, replace(old, certificate=certificate))


def _admit(federation: FederationFolder, old: Member | None, member: Member) -> JoinResult:
    """Replace the roster entry `old` with `member`, or append `member`, and write the site's kit and its zip."""
    members = (*(member if entry == old else entry for entry in federation.roster.sites), *([] if old else [member]))
    kit = federation.list_kit_files("site", member.x509_certificate, site=member.site)
    files = {f"sites/{member.site}/{name}": data for name, data in kit.items()}
    archive = f"sites/{member.site}-kit.zip"
    files[archive] = make_zip(kit, moment=member.x509_certificate.not_valid_before_utc)
    if old and (replaced := _list_keys(old) - _list_keys(member)):
        files |= federation.retire_keys(replaced)
    federation.apply_change(members, files)
    changes = _list_changes(old, member) if old else ()
    return JoinResult(member=member, archive=federation.folder / archive, changes=changes)


def revoke_site(folder: Path, name: str, *, now: datetime) -> Member:
    """Revoke a site permanently; its connection key cannot be used again.

    Raises:
        ConfigError: the site is unknown or was already revoked.
    """
    with FederationFolder.open_locked(folder) as federation:
        members = federation.roster.sites
        old = _find_member(name, members)
        if old.revoked:
            raise ConfigError("site", name, f"was already revoked on {old.revoked}")
        revoked = replace(old, revoked=now.isoformat(timespec="seconds"))
        federation.apply_change(tuple(revoked if member is old else member for member in members), {})
        return revoked


def _issue_site_certificate(
    federation: FederationFolder,
    holder: x509.Certificate | x509.CertificateSigningRequest,
    *,
    site: str,
    days: int | None,
    now: datetime,
) -> str:
    """Issue a site certificate for the public key in `holder`, and return it in PEM format."""
    issued = federation.issue("site", extract_p384_public_key(holder, key="csr"), name=site, days=days, now=now)
    return encode_certificate_pem(issued).decode()


def _list_keys(member: Member | JoinRequest) -> set[str]:
    """Return the fingerprint of a site's connection key, and its site key."""
    return {compute_key_fingerprint(member.node_key), member.site_key}


def _check_keys(federation: FederationFolder, join: JoinRequest, old: Member | None = None) -> None:
    """Check that nobody else uses, or has used, the keys in the request of a new site, or of the site `old`.

    Flower rejects removed connection keys forever; a site key names one site and its ledger.
    """
    fingerprint = compute_key_fingerprint(join.node_key)
    again = "generate a new key with `fedtune site init --out NEW`"
    for retired in _list_keys(join) & federation.read_retired_keys():
        key = "site_key" if retired == join.site_key else "connection key"
        raise ConfigError(key, retired, f"was replaced and can never be used again: {again}")
    if join.site_key == federation.lead_key:
        raise ConfigError("site_key", join.site_key, f"is the lead's key: {again}")
    for member in (other for other in federation.roster.sites if other != old):
        if member.node_key == join.node_key:
            state = "was the key of the revoked" if member.revoked else "belongs to"
            raise ConfigError("connection key", fingerprint, f"{state} site {member.site}: {again}")
        if member.site_key == join.site_key:
            bound = f"belongs to site {member.site}: every site has its own ledger and site key"
            raise ConfigError("site_key", join.site_key, bound)


def _check_not_revoked(member: Member) -> None:
    if member.revoked:
        bound = (
            f"was revoked on {member.revoked}, and its connection key can never be used again: ask the site for a new "
            f"request (`fedtune site init --out NEW`), then `renew-site {member.site} REQUEST`"
        )
        raise ConfigError("site", member.site, bound)


def _find_member(name: str, members: Collection[Member]) -> Member:
    for member in members:
        if member.site == name:
            return member
    known = ", ".join(member.site for member in members) or "none yet"
    raise ConfigError("site", name, f"must be a site of the federation: {known}")


def _list_changes(old: Member, new: Member) -> tuple[str, ...]:
    """Describe all changes of a renewal except that of the certificate, one sentence for each."""
    changes = []
    if old.revoked:
        changes.append("The site was revoked and now takes part again.")
    if new.node_key != old.node_key:
        changes.append("The site has a new connection key; the old key can never be used again.")
    if new.site_key != old.site_key:
        changes.append(
            "The site has a new site key and a new ledger, which does not count the spending of the old ledger."
        )
    for name in sorted(old.datasets.keys() | new.datasets.keys()):
        before, after = old.datasets.get(name), new.datasets.get(name)
        if before is None:
            changes.append(f"Data set {name} was added, with a declared size of {after:,}.")
        elif after is None:
            changes.append(f"Data set {name} was removed.")
        elif before != after:
            changes.append(f"Data set {name} has a declared size of {after:,} instead of {before:,}.")
    return tuple(changes)

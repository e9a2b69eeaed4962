"""The sites of a federation: the request with which one asks to join, and the roster in which it then stands.

A site makes two keys and a request, and the lead checks the request.  Server and lead know the sites by roster.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.deploy.files import new_folder, write_secret, writing
from fedtune.deploy.kits.certificates import (
    UNREADABLE,
    certificate_pem,
    check_common_name,
    check_private,
    common_name,
    fingerprint_of,
    is_p384,
    key_fingerprint,
    make_key,
    p384_of,
    private_pem,
    public_pem,
    spoken,
)
from fedtune.deploy.kits.kit import VERSION, read_json
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, check_public_key, is_signed
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, check_name, check_one_of, spec

PURPOSE = "join request"
"""Of the site's signature."""
REQUEST = "join_request.json"
_MOST_BYTES = 1 << 16
_MOST_UNITS = 1 << 53  # what a float still counts exactly


@spec
class _DataSet:
    """A data set, as a site declares it in its request and as the roster keeps it."""

    id: str
    declared_size: int

    def __post_init__(self) -> None:
        check_name("id", self.id)
        if not 1 <= self.declared_size < _MOST_UNITS:
            raise ConfigError("declared_size", self.declared_size, "must be from 1 to fewer than 2^53")


@spec
class _Entry:
    """A site in roster.json."""

    site: str
    certificate: str
    site_key: str
    datasets: tuple[_DataSet, ...]
    revoked: str | None

    def __post_init__(self) -> None:
        check_name("site", self.site)
        check_public_key("site_key", self.site_key)
        if self.revoked is not None:
            try:
                datetime.fromisoformat(self.revoked)
            except ValueError:
                raise ConfigError("revoked", self.revoked, "must be a time in ISO form, or null") from None

    def member(self) -> Member:
        """The site, with its certificate read."""
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate.encode())
            named, connection_key = common_name(certificate.subject), certificate.public_key()  # parsed only now
        except UNREADABLE:
            raise ConfigError("certificate", self.site, "must be one in PEM form") from None
        if named != self.site or not is_p384(connection_key):
            raise ConfigError("certificate", self.site, "must be the site's own, for an EC P-384 key")
        return Member(
            site=self.site,
            site_key=self.site_key,
            datasets=_sizes(self.datasets),
            certificate=certificate,
            revoked=self.revoked,
        )


@spec
class _RosterFile:
    """What roster.json says."""

    version: int
    federation: str
    sites: tuple[_Entry, ...]

    def __post_init__(self) -> None:
        check_one_of("version", self.version, (VERSION,))


@spec
class _RequestFile:
    """What join_request.json says; the signature covers the rest."""

    version: int
    site: str
    csr: str
    site_key: str
    datasets: tuple[_DataSet, ...]
    signature: str = ""

    def __post_init__(self) -> None:
        check_one_of("version", self.version, (VERSION,))
        check_site_name(self.site)
        check_public_key("site_key", self.site_key)

    def signed_bytes(self) -> bytes:
        """What the site signs."""
        fields = dataclasses.asdict(self)
        del fields["signature"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


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
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError("roster", str(path), f"must be a readable file ({error.strerror})") from None
    try:
        members = tuple(entry.member() for entry in read_json(_RosterFile, data, key="roster").sites)
        _check_distinct(members)
    except ConfigError as error:
        raise error.in_file(path) from None
    return members


def write_roster(path: Path, members: Collection[Member], *, federation: str) -> None:
    """Replace the roster at `path`; a server that reads it meanwhile sees the old one or the new one."""
    entries = tuple(
        _Entry(
            site=member.site,
            certificate=certificate_pem(member.certificate).decode(),
            site_key=member.site_key,
            datasets=tuple(_DataSet(id=name, declared_size=size) for name, size in member.datasets.items()),
            revoked=member.revoked,
        )
        for member in members
    )
    _write(path, _RosterFile(version=VERSION, federation=federation, sites=entries))


def _write(path: Path, file: _RosterFile | _RequestFile) -> None:
    write_durably(path, json.dumps(dataclasses.asdict(file), indent=1).encode() + b"\n")


def _sizes(datasets: Collection[_DataSet]) -> dict[str, int]:
    """The declared size of each data set."""
    sizes = {one.id: one.declared_size for one in datasets}
    if not sizes:
        raise ConfigError("datasets", [], "must declare at least one data set")
    if len(sizes) < len(datasets):
        raise ConfigError("datasets.id", [one.id for one in datasets], "must not repeat")
    return sizes


def _check_distinct(members: Collection[Member]) -> None:
    names: set[str] = set()
    for member in members:
        # A file system may take North for north, and so may a person.
        if not names.isdisjoint((member.site.casefold(), member.node_key.decode())):
            raise ConfigError("site", member.site, "must not repeat another site's name or connection key")
        names |= {member.site.casefold(), member.node_key.decode()}


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinRequest:
    """A site's request that was checked: it holds both keys, and signed what it declares.

    Whether the site is who it says is for people to compare: over the telephone, by the fingerprints.

    Attributes:
        csr: a certificate signing request for its connection key, EC P-384, which it proves to hold.
        site_key: public key of its ledger, 64 hex digits.
        datasets: id -> declared size.
    """

    site: str
    csr: x509.CertificateSigningRequest
    site_key: str
    datasets: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> JoinRequest:
        """The request in the file `path`.

        Raises:
            ConfigError: the file is none, or was changed after the site signed it.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise ConfigError("request", str(path), f"must be a readable file ({error.strerror})") from None
        try:
            return cls.of(data)
        except ConfigError as error:
            raise error.in_file(path) from None

    @classmethod
    def of(cls, data: bytes) -> JoinRequest:
        """The request in `data`, a file's bytes."""
        if len(data) > _MOST_BYTES:
            raise ConfigError("request", f"more than {_MOST_BYTES} bytes", f"must have at most {_MOST_BYTES} bytes")
        file = read_json(_RequestFile, data, key="request")
        if not is_signed(file.site_key, PURPOSE, file.signed_bytes(), file.signature):
            bound = "must be the site's: the request was changed after it was made; ask the site for it again"
            raise ConfigError("signature", file.signature, bound)
        csr = _checked_csr(file.csr, site=file.site)
        return cls(site=file.site, csr=csr, site_key=file.site_key, datasets=_sizes(file.datasets))

    @property
    def node_key(self) -> bytes:
        """Public key of its connection: SubjectPublicKeyInfo in PEM form."""
        return public_pem(self.csr)


def check_site_name(name: str) -> None:
    """Require a name that a site may have in a federation."""
    check_common_name("site", name)
    if name.casefold() in ("server", "lead", "authority"):
        raise ConfigError("site", name, "must not be the name of a part of every federation")


def _checked_csr(text: str, *, site: str) -> x509.CertificateSigningRequest:
    """The certificate signing request in `text`: the site's, for an EC P-384 key that its maker holds."""
    try:
        csr = x509.load_pem_x509_csr(text.encode())
        signed, name = csr.is_signature_valid, common_name(csr.subject)
    except UNREADABLE:
        raise ConfigError("csr", "unreadable", "must be a certificate signing request in PEM form") from None
    p384_of(csr, key="csr")
    if not signed:
        raise ConfigError("csr", name, "must be signed with the key that it names")
    if name != site:
        raise ConfigError("csr", name, f"must have the site's name, {site!r}, as its common name")
    return csr


def site_init(site_toml: Path, *, out: Path | None) -> Path:
    """Make a site's connection key and its request to join, from its policy; return their folder.

    The site's key, which signs its ledger, is made too where it is missing.

    Args:
        site_toml: the site's policy.
        out: a new folder; None: `kit` beside the policy.

    Raises:
        ConfigError: the policy is wrong, the folder exists or cannot be written, or a key is not fit for use.
    """
    files = SiteFiles.of(site_toml)
    try:
        check_site_name(files.policy.site)
    except ConfigError as error:
        raise error.in_file(site_toml) from None
    folder = out or site_toml.parent / "kit"
    with new_folder(folder, key="folder") as building:
        connection = make_key()
        _write(building / REQUEST, _request(files, connection))
        JoinRequest.of((building / REQUEST).read_bytes())  # what the lead would refuse is refused here
        write_secret(building / "connection_key.pem", private_pem(connection))
    return folder


def next_steps(folder: Path) -> str:
    """What the site does with what `site_init` made in `folder`, to be printed."""
    request = JoinRequest.read(folder / REQUEST)
    declared = ", ".join(f"{name} ({size:,} declared)" for name, size in request.datasets.items())
    return f"""\
Site {request.site}: data sets {declared}.

1. Send this file to the lead; it holds no secret:
     {folder / REQUEST}
2. When the lead calls you, or you the lead, read these out, so that nobody's request is taken for yours:
     connection key  {spoken(fingerprint_of(request.node_key))}
     site key        {spoken(key_fingerprint(request.site_key))}
3. Unzip the kit that the lead sends back into the same folder, and follow its README.md:
     unzip {request.site}-kit.zip -d {folder}

{folder / "connection_key.pem"} is secret: it never leaves this machine, and nobody will ever ask for it.
Keep a backup of the site key that site.toml names; without it the ledger cannot go on.
"""


def _request(files: SiteFiles, connection: ec.EllipticCurvePrivateKey) -> _RequestFile:
    policy, site_key = files.policy, _site_key(files)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, policy.site)])
    csr = x509.CertificateSigningRequestBuilder(name).sign(connection, hashes.SHA384())
    unsigned = _RequestFile(
        version=VERSION,
        site=policy.site,
        csr=csr.public_bytes(serialization.Encoding.PEM).decode(),
        site_key=site_key.public,
        datasets=tuple(_DataSet(id=one.id, declared_size=one.declared_size) for one in policy.dataset),
    )
    return dataclasses.replace(unsigned, signature=site_key.sign(PURPOSE, unsigned.signed_bytes()))


def _site_key(files: SiteFiles) -> SigningKey:
    if files.ledger.is_file() and not files.site_key.is_file():
        bound = f"is missing, and ledger {files.ledger} needs the key that it was made with: restore it from its backup"
        raise ConfigError("site_key", str(files.site_key), bound)
    with writing(files.site_key, key="site_key"):
        key = SigningKey.load_or_make(files.site_key)
    check_private(files.site_key)
    return key

"""Members of a federation: a site's join request, and the roster of all sites.

A site generates two keys and a join request, which the lead checks.  roster.json contains all sites, for the server and
for the lead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.codec import read_bounded_file, read_regular_file
from fedtune.formatting import group_hex
from fedtune.ops.files import create_folder, translate_write_errors, write_secret
from fedtune.ops.kits.certificates import (
    UNREADABLE,
    check_common_name,
    check_private,
    compute_key_fingerprint,
    encode_private_pem,
    encode_public_pem,
    extract_p384_public_key,
    generate_connection_key,
    get_common_name,
    is_p384,
)
from fedtune.ops.kits.kit_file import KitFile, read_json
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, check_public_key, is_signed
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import KIT_SCHEMA, ConfigError, check_name, name_file_in_errors, spec

PURPOSE, ROSTER = "join request", "roster"  # purposes of the site's and the lead's signatures
REQUEST = "join_request.json"
_T = TypeVar("_T")
_MAX_BYTES = 1 << 16
_MAX_UNITS = 1 << 53  # limit of exact integers in a float


@spec
class Member:
    """Entry of a site in roster.json.

    Attributes:
        certificate: the site's certificate for its EC P-384 connection key, in PEM format.
        site_key: the public key for verifying the ledger's signatures, 64 hex digits.
        datasets: data set id -> declared size.
        revoked: the time of the revocation in ISO 8601; None: the site is active.
    """

    site: str
    certificate: str
    site_key: str
    datasets: Mapping[str, int]
    revoked: str | None

    def __post_init__(self) -> None:
        check_name("site", self.site)
        check_public_key("site_key", self.site_key)
        if self.revoked is not None:
            try:
                datetime.fromisoformat(self.revoked)
            except ValueError:
                raise ConfigError("revoked", self.revoked, "must be a time in ISO 8601 format, or null") from None
        try:
            issued = self.x509_certificate
            named, connection_key = get_common_name(issued.subject), issued.public_key()  # parsed on access
        except UNREADABLE:
            raise ConfigError("certificate", self.site, "must be a certificate in PEM format") from None
        if named != self.site or not is_p384(connection_key):
            bound = "must be a certificate for this site's name and an EC P-384 key"
            raise ConfigError("certificate", self.site, bound)
        _check_datasets(self.datasets)

    @property
    def x509_certificate(self) -> x509.Certificate:
        """The certificate as a parsed X.509 object."""
        return x509.load_pem_x509_certificate(self.certificate.encode())

    @property
    def node_key(self) -> bytes:
        """The site's public EC P-384 connection key in PEM format (SubjectPublicKeyInfo), its node key in Flower."""
        return _extract_node_key(self.certificate)


@lru_cache(maxsize=1024)  # the server calls it for every request
def _extract_node_key(certificate: str) -> bytes:
    return encode_public_pem(x509.load_pem_x509_certificate(certificate.encode()))


@spec
class Roster:
    """Content of roster.json: all sites of a federation, signed by the lead.

    Because of the signature, the roster can be sent over an untrusted channel.

    Attributes:
        sites: all sites in the order of joining, including revoked sites.
        number: the version number of the roster, its Unix time in seconds; higher than every previous number.
        signature: the lead's signature over all other fields.
    """

    version: int
    federation: str
    sites: tuple[Member, ...]
    number: int
    signature: str = ""

    def __post_init__(self) -> None:
        names: set[str] = set()
        for member in self.sites:
            # Names must not differ only in case, because file systems and people may confuse them.
            identifiers = {member.site.casefold(), member.node_key.decode(), member.site_key}
            if not names.isdisjoint(identifiers):
                raise ConfigError("site", member.site, "has the name or a key of another site")
            names |= identifiers

    @classmethod
    def read(cls, path: Path) -> Roster:
        """Read the roster from a file.

        Raises:
            ConfigError: the file is missing or invalid.
        """
        return _parse_file(path, lambda data: read_json(cls, data, key="roster"), key="roster")

    @classmethod
    def read_signed(cls, path: Path, *, kit: KitFile) -> Roster:
        """Read a roster and verify that it is signed by the lead of `kit` and belongs to its federation."""
        roster = cls.read(path)
        with name_file_in_errors(path):
            roster.check_lead_signature(kit.lead)
            if roster.federation != kit.federation:
                raise ConfigError("roster.federation", roster.federation, f"must be {kit.federation!r}")
        return roster

    def sign_roster(self, key: SigningKey) -> Roster:
        """Return a copy of the roster with the lead's signature."""
        return dataclasses.replace(self, signature=key.sign(ROSTER, encode_for_signature(dataclasses.asdict(self))))

    def check_lead_signature(self, lead: str) -> None:
        """Verify the signature with the lead's public key; raise ConfigError if it is invalid."""
        if not is_signed(lead, ROSTER, encode_for_signature(dataclasses.asdict(self)), self.signature):
            bound = "is not the signature of the federation's lead, so another party created or changed the roster"
            raise ConfigError("roster.signature", self.signature[:16], bound)

    def to_bytes(self) -> bytes:
        """Serialize the roster to the content of roster.json."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"


def _parse_file(path: Path, parse: Callable[[bytes], _T], *, key: str) -> _T:
    """Parse a file with `parse`; an error in the content names the file."""
    data = read_bounded_file(path, key=key)
    with name_file_in_errors(path):
        return parse(data)


def _check_datasets(datasets: Mapping[str, int]) -> None:
    if not datasets:
        raise ConfigError("datasets", {}, "must declare at least one data set")
    for name, declared_size in datasets.items():
        check_name("datasets", name)
        if not 1 <= declared_size < _MAX_UNITS:
            raise ConfigError(f"datasets.{name}", declared_size, "must be at least 1 and below 2^53")


@spec
class JoinRequest:
    """Content of a site's join_request.json: the site's declaration, with proof of possession of both keys.

    The staff of site and lead confirm the identities by comparing fingerprints over the telephone.

    Attributes:
        csr: a certificate signing request in PEM format, which proves possession of the EC P-384 connection key.
        site_key: the public key for verifying the ledger's signatures, 64 hex digits.
        datasets: data set id -> declared size.
        signature: the site key's signature over all other fields.
    """

    version: int
    site: str
    csr: str
    site_key: str
    datasets: Mapping[str, int]
    signature: str = ""

    def __post_init__(self) -> None:
        check_site_name(self.site)
        check_public_key("site_key", self.site_key)
        if not is_signed(self.site_key, PURPOSE, encode_for_signature(dataclasses.asdict(self)), self.signature):
            bound = "does not match the request, which was changed after signing: ask the site to send it again"
            raise ConfigError("signature", self.signature, bound)
        _check_csr(self.csr, site=self.site)
        _check_datasets(self.datasets)

    @classmethod
    def read(cls, path: Path) -> JoinRequest:
        """Read a join request from a file.

        Raises:
            ConfigError: the file is not a join request, or was changed after the site signed it.
        """
        return _parse_file(path, cls.parse_request, key="request")

    @classmethod
    def parse_request(cls, data: bytes) -> JoinRequest:
        """Parse a join request from the bytes of its file."""
        if len(data) > _MAX_BYTES:
            raise ConfigError("request", f"more than {_MAX_BYTES} bytes", f"must have at most {_MAX_BYTES} bytes")
        return read_json(cls, data, key="request")

    @property
    def signing_request(self) -> x509.CertificateSigningRequest:
        """The parsed certificate signing request."""
        return x509.load_pem_x509_csr(self.csr.encode())

    @property
    def node_key(self) -> bytes:
        """The site's public connection key as SubjectPublicKeyInfo in PEM format."""
        return encode_public_pem(self.signing_request)


def check_site_name(name: str) -> None:
    """Check that `name` is valid for a site of a federation; raise ConfigError otherwise."""
    check_common_name("site", name)
    if name.casefold() in ("server", "lead", "authority"):
        raise ConfigError("site", name, "is a reserved name")


def _check_csr(text: str, *, site: str) -> None:
    """Check that `text` is a certificate signing request of the site, signed with its EC P-384 key."""
    try:
        csr = x509.load_pem_x509_csr(text.encode())
        signed, name = csr.is_signature_valid, get_common_name(csr.subject)
    except UNREADABLE:
        raise ConfigError("csr", "unreadable", "must be a certificate signing request in PEM format") from None
    extract_p384_public_key(csr, key="csr")
    if not signed:
        raise ConfigError("csr", name, "must be signed with the key that it contains")
    if name != site:
        raise ConfigError("csr", name, f"must have the site's name, {site!r}, as its common name")


def initialize_site(site_toml: Path, *, out: Path | None, new_ledger: bool = False) -> Path:
    """Create the folder with a site's connection key and join request, and return its path.

    If the site key, which signs the ledger, does not exist yet, it is generated as well.

    Args:
        site_toml: the site's policy.
        out: the folder to create; None: `kit` in the policy's folder.
        new_ledger: whether an existing site key may start a ledger.

    Guarantee: without `new_ledger`, an existing site key cannot start a second ledger, not even with a new kit.

    Raises:
        ConfigError: the policy is invalid, the folder exists or cannot be written, or a key cannot be used.
    """
    files = SiteFiles.from_site_toml(site_toml)
    with name_file_in_errors(site_toml):
        check_site_name(files.policy.site)
    folder = out or site_toml.parent / "kit"
    with create_folder(folder, key="folder") as building:
        connection = generate_connection_key()
        fields = _build_request_fields(files, connection, new_ledger=new_ledger)
        write_durably(building / REQUEST, json.dumps(fields, indent=1).encode() + b"\n")
        JoinRequest.parse_request(read_regular_file(building / REQUEST))  # run the checks of the lead
        write_secret(building / "connection_key.pem", encode_private_pem(connection))
    return folder


def describe_next_steps(folder: Path) -> str:
    """Return the instructions that `fedtune site init` prints after `initialize_site`."""
    request = JoinRequest.read(folder / REQUEST)
    declared = ", ".join(f"{name} ({size:,} declared)" for name, size in request.datasets.items())
    return f"""\
Site {request.site}: data sets {declared}.

1. Send this file to the lead; it holds no secret:
     {folder / REQUEST}
2. When the lead calls you, or you the lead, read these aloud, so that no other request passes for yours. Write down the
   fingerprints of lead and authority that the lead reads out:
     connection key  {group_hex(compute_key_fingerprint(request.node_key))}
     site key        {group_hex(request.site_key)}
3. Unzip the kit that the lead sends back into the same folder, and follow its README.md. It starts with comparing what
   you wrote down:
     unzip {request.site}-kit.zip -d {folder}

{folder / "connection_key.pem"} is secret: it never leaves this machine, and nobody will ever ask for it.
Keep a backup of the site key that site.toml names; the ledger cannot continue without it.
"""


def _build_request_fields(
    files: SiteFiles, connection: ec.EllipticCurvePrivateKey, *, new_ledger: bool
) -> dict[str, Any]:
    """Build the fields of a `JoinRequest`; generate the site key if it is missing.

    A missing site key is an error if a ledger exists, because the ledger can be continued only with its original key;
    a missing ledger is an error if the key exists, because a new ledger would start with the full budget.
    """
    policy, path, has_ledger = files.policy, files.site_key, files.ledger.is_file()
    has_key = bool(policy.key_command) or path.is_file()
    if has_ledger and not has_key:
        bound = f"is missing, but ledger {files.ledger} requires its original key"
        raise ConfigError("site_key", str(path), bound, remedy="restore it from its backup")
    if has_key and not (has_ledger or new_ledger):
        remedy = "restore the ledger (fedtune site restore); if this key never had one, add --new-ledger"
        raise ConfigError("site_key", str(path), f"exists, but its ledger {files.ledger} is missing", remedy=remedy)
    with translate_write_errors(path, key="site_key"):
        site_key = files.load_key(make=True)
    if path.is_file():
        check_private(path)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, policy.site)])
    csr = x509.CertificateSigningRequestBuilder(name).sign(connection, hashes.SHA384())
    fields = {
        "version": KIT_SCHEMA,
        "site": policy.site,
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "site_key": site_key.public,
        "datasets": {dataset.id: dataset.declared_size for dataset in policy.dataset},
    }
    return {**fields, "signature": site_key.sign(PURPOSE, encode_for_signature(fields))}


def encode_for_signature(fields: Mapping[str, Any]) -> bytes:
    """Encode all fields except the signature as canonical JSON, the content to sign."""
    signed = {key: value for key, value in fields.items() if key != "signature"}
    return json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()

"""Joining a federation: a site makes its keys and a request, and the lead checks the request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedtune.deploy.authority import make_key, private_pem
from fedtune.deploy.certificates import (
    UNREADABLE,
    check_common_name,
    check_private,
    common_name,
    fingerprint_of,
    key_fingerprint,
    p384_of,
    public_pem,
    spoken,
)
from fedtune.deploy.folders import new_folder, write_secret, writing
from fedtune.deploy.kit_file import VERSION
from fedtune.deploy.roster import check_keys, read_datasets, typed
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, check_public_key, is_signed
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, check_one_of

PURPOSE = "join request"
"""Of the site's signature."""
REQUEST = "join_request.json"
_MOST_BYTES = 1 << 16
_KEYS = ("version", "site", "csr", "site_key", "datasets", "signature")


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
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise ConfigError("request", "no JSON", "must be the join_request.json of `fedtune site init`") from None
        check_keys(fields, _KEYS, key="request")
        check_one_of("version", typed("version", fields["version"], int), (VERSION,))
        check_site_name(typed("site", fields["site"], str))
        check_public_key("site_key", typed("site_key", fields["site_key"], str))
        signature = typed("signature", fields.pop("signature"), str)
        if not is_signed(fields["site_key"], PURPOSE, _canonical(fields), signature):
            bound = "must be the site's: the request was changed after it was made; ask the site for it again"
            raise ConfigError("signature", signature, bound)
        return cls(
            site=fields["site"],
            csr=_checked_csr(typed("csr", fields["csr"], str), site=fields["site"]),
            site_key=fields["site_key"],
            datasets=read_datasets(fields["datasets"]),
        )

    @property
    def node_key(self) -> bytes:
        """Public key of its connection: SubjectPublicKeyInfo in PEM form."""
        return public_pem(self.csr)


def check_site_name(name: str) -> None:
    """Require a name that a site may have in a federation."""
    check_common_name("site", name)
    if name.casefold() in ("server", "lead", "authority"):
        raise ConfigError("site", name, "must not be the name of a part of every federation")


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
        request = _request(files, connection)
        JoinRequest.of(request)  # what the lead would refuse is refused here
        write_secret(building / "connection_key.pem", private_pem(connection))
        write_durably(building / REQUEST, request)
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


def _request(files: SiteFiles, connection: ec.EllipticCurvePrivateKey) -> bytes:
    policy, site_key = files.policy, _site_key(files)
    fields: dict[str, Any] = {
        "version": VERSION,
        "site": policy.site,
        "csr": _csr(connection, site=policy.site),
        "site_key": site_key.public,
        "datasets": [{"id": one.id, "declared_size": one.declared_size} for one in policy.dataset],
    }
    signature = site_key.sign(PURPOSE, _canonical(fields))
    return json.dumps({**fields, "signature": signature}, indent=1).encode() + b"\n"


def _site_key(files: SiteFiles) -> SigningKey:
    if files.ledger.is_file() and not files.site_key.is_file():
        bound = f"is missing, and ledger {files.ledger} needs the key that it was made with: restore it from its backup"
        raise ConfigError("site_key", str(files.site_key), bound)
    with writing(files.site_key, key="site_key"):
        key = SigningKey.load_or_make(files.site_key)
    check_private(files.site_key)
    return key


def _csr(connection: ec.EllipticCurvePrivateKey, *, site: str) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    csr = x509.CertificateSigningRequestBuilder(name).sign(connection, hashes.SHA384())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


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


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

"""Startup kits: the folder that a server, a lead or a site starts from, and the roster of the federation's sites."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedtune.deploy.address import Address
from fedtune.deploy.certificates import (
    Certificate,
    check_in_force,
    check_issued,
    check_private,
    names_of,
    public_pem,
    read_certificate,
    read_connection_key,
)
from fedtune.deploy.kit_file import KitFile, KitModel, read_spec
from fedtune.deploy.roster import Member, read_roster
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError

__all__ = ["Certificate", "Kit", "KitModel", "Member", "read_roster"]

_MISSING = {
    "connection_key.pem": "is missing: unzip the kit into the folder in which `fedtune site init` made it",
    "site.pem": "is missing: unzip the kit that the lead sent into this folder",
}
_RENEWAL = {
    "server": "ask for `fedtune provision renew-server`, and put the new server.pem here",
    "lead": "run `fedtune provision renew-lead`",
    "site": "ask the lead for a new kit (`fedtune provision renew-site`), and unzip it here",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit:
    """A server's, a lead's or a site's kit.

    Attributes:
        kind: "server", "lead" or "site".
        server: host:port as the sites reach it; `host` and `port` are its parts.
        lead: public key of the lead, 64 hex digits.
        site: name of the site; None in other kits.
    """

    folder: Path
    kind: str
    federation: str
    server: str
    lead: str
    site: str | None
    models: tuple[KitModel, ...]

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
        kit = cls(
            folder=folder,
            kind=kind,
            federation=read.federation,
            server=read.server,
            lead=read.lead,
            site=read.site,
            models=read.model,
        )
        kit._check_files()
        return kit

    def _check_files(self) -> None:
        secrets = [self.key, *([self.lead_key] if self.kind == "lead" else [])]
        rosters = [] if self.kind == "site" else [self.roster]
        for path in (self.ca, self.certificate, *secrets, *rosters):
            if not os.path.isfile(path):
                raise ConfigError(str(path), None, _MISSING.get(path.name, f"is missing from the {self.kind}'s kit"))
        for path in secrets:
            check_private(path)
        if self.kind == "lead" and (public := SigningKey.load(self.lead_key).public) != self.lead:
            bound = f"must be the public key of {self.lead_key}, {public}"
            raise ConfigError("lead", self.lead, bound).in_file(self.folder / "kit.toml")

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

    @property
    def roster(self) -> Path:
        """The federation's sites; in a server's and a lead's kit."""
        return self.folder / "roster.json"

    @property
    def host(self) -> str:
        """The server's name or IP address, without brackets."""
        return Address.of(self.server).host

    @property
    def port(self) -> int:
        """The server's port."""
        return Address.of(self.server).port

    def check_certificate(self, now: datetime) -> Certificate:
        """The certificate of this machine, fit for use at `now` (with a time zone).

        Raises:
            ConfigError: it belongs to another key, another authority or another name, or is not in force.
        """
        certificate, ca = read_certificate(self.certificate), read_certificate(self.ca)
        key, found = str(self.certificate), Certificate.of(certificate)
        if public_pem(certificate) != public_pem(read_connection_key(self.key)):
            raise ConfigError(key, found.name, f"must belong to the key in {self.key.name}; it was made for another")
        check_issued(certificate, ca=ca, key=key)
        expected = self.site if self.kind == "site" else self.kind
        if found.name != expected:
            raise ConfigError(key, found.name, f"must be the certificate of {expected}")
        if self.kind == "server" and self.host not in names_of(certificate):
            raise ConfigError(key, self.host, f"must be in the certificate, which names {names_of(certificate)}")
        check_in_force(ca, now=now, key=str(self.ca), renewal="the federation has to be provisioned anew")
        check_in_force(certificate, now=now, key=key, renewal=_RENEWAL[self.kind])
        return found

"""The folder that `fedtune provision init` makes: where the lead keeps the authority, the kits and the roster."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedtune.deploy.authority import Authority, certificate_pem
from fedtune.deploy.certificates import Certificate, fingerprint_of, names_of, read_certificate
from fedtune.deploy.federation_file import FederationFile, read_federation
from fedtune.deploy.folders import locked
from fedtune.deploy.kit_file import VERSION, KitFile, read_spec
from fedtune.deploy.kit_readme import lead_readme, server_readme, site_readme
from fedtune.deploy.roster import Member, check_keys, read_roster, typed, write_roster
from fedtune.privacy.durable import write_durably
from fedtune.spec import ConfigError

SETTINGS = "federation.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationFolder:
    """A federation's folder and the settings in it, which the lead may edit: new certificates and kits follow them."""

    folder: Path
    settings: FederationFile
    lead_key: str

    @classmethod
    def open(cls, folder: Path) -> FederationFolder:
        """The federation in `folder`.

        Raises:
            ConfigError: it holds none, or its settings are wrong.
        """
        if not all(map(os.path.isfile, (folder / SETTINGS, folder / "server" / "roster.json"))):
            bound = "must be the folder that `fedtune provision init` made; name it with --federation"
            raise ConfigError("--federation", str(folder), bound)
        settings = read_federation(folder / SETTINGS)
        made_for = read_spec(KitFile, folder / "lead" / "kit.toml")
        if settings.name != made_for.federation:
            bound = f"must stay {made_for.federation!r}: certificates are made out to it"
            raise ConfigError("name", settings.name, bound).in_file(folder / SETTINGS)
        return cls(folder=folder, settings=settings, lead_key=made_for.lead)

    @classmethod
    @contextmanager
    def held(cls, folder: Path) -> Iterator[FederationFolder]:
        """The federation in `folder`, which no other command changes meanwhile."""
        cls.open(folder)
        with locked(folder):
            yield cls.open(folder)

    @property
    def server(self) -> Path:
        """The server's kit."""
        return self.folder / "server"

    @property
    def lead(self) -> Path:
        """The lead's kit."""
        return self.folder / "lead"

    @property
    def sites(self) -> Path:
        """The sites' kits and their zip archives."""
        return self.folder / "sites"

    def authority(self) -> Authority:
        """The authority with its key, which only issuing needs.

        Raises:
            ConfigError: the key is not at hand, or is another federation's.
        """
        authority = Authority.load(self.folder / "authority")
        if authority.certificate != self.ca():
            bound = f"must be the authority of this federation, whose certificate is {self.server / 'ca.pem'}"
            raise ConfigError("authority", str(self.folder / "authority"), bound)
        return authority

    def ca(self) -> x509.Certificate:
        """The authority's certificate."""
        return read_certificate(self.server / "ca.pem")

    def members(self) -> tuple[Member, ...]:
        """The sites.  The server's roster is written last, and so is the one that counts."""
        return read_roster(self.server / "roster.json")

    def write_members(self, members: Collection[Member]) -> None:
        """Write both rosters."""
        for folder in (self.lead, self.server):
            write_roster(folder / "roster.json", members, federation=self.settings.name)

    def retired(self) -> frozenset[str]:
        """Fingerprints of connection keys that a site had and has no more: Flower takes none of them back."""
        path = self.folder / "retired_keys.json"
        try:
            fields = json.loads(path.read_bytes())
            check_keys(fields, ("version", "fingerprints"))
            return frozenset(
                typed("fingerprints", one, str) for one in typed("fingerprints", fields["fingerprints"], list)
            )
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise ConfigError("file", str(path), f"must be a readable file ({error.strerror})") from None
        except ConfigError as error:
            raise error.in_file(path) from None
        except (ValueError, RecursionError):
            raise ConfigError("file", str(path), "must be JSON") from None

    def retire(self, node_key: bytes) -> None:
        """Remember a connection key that must never be used again."""
        fingerprints = sorted(self.retired() | {fingerprint_of(node_key)})
        text = json.dumps({"version": VERSION, "fingerprints": fingerprints}, indent=1)
        write_durably(self.folder / "retired_keys.json", text.encode() + b"\n")

    def check_served(self) -> None:
        """Require that the server's certificate is for the address that new kits name."""
        host, names = self.settings.hosts[0], names_of(read_certificate(self.server / "server.pem"))
        if host not in names:
            bound = f"is not in the server's certificate, which is for {', '.join(names)}: renew-server first"
            raise ConfigError("server", self.settings.server, bound).in_file(self.folder / SETTINGS)

    def site_files(self, certificate: x509.Certificate, *, site: str) -> dict[str, bytes]:
        """What a site gets: names and bytes of its kit's files."""
        kit = self._kit("site", site=site)
        readme = site_readme(kit, certificate=Certificate.of(certificate), authority=Certificate.of(self.ca()))
        return _files(kit, certificate, ca=self.ca(), readme=readme)

    def write_server(self, certificate: x509.Certificate, *, ca: x509.Certificate) -> None:
        """Write what is not secret in the server's kit, but for the roster."""
        kit, named = self._kit("server"), tuple(names_of(certificate))
        readme = server_readme(kit, certificate=Certificate.of(certificate), authority=Certificate.of(ca), hosts=named)
        write_files(self.server, _files(kit, certificate, ca=ca, readme=readme).items())

    def write_lead(self, certificate: x509.Certificate, *, ca: x509.Certificate) -> None:
        """Write what is not secret in the lead's kit, but for the roster."""
        kit = self._kit("lead")
        readme = lead_readme(kit, certificate=Certificate.of(certificate), authority=Certificate.of(ca))
        write_files(self.lead, _files(kit, certificate, ca=ca, readme=readme).items())

    def _kit(self, kind: Literal["server", "lead", "site"], *, site: str | None = None) -> KitFile:
        return KitFile(
            version=VERSION,
            kind=kind,
            federation=self.settings.name,
            server=self.settings.server,
            lead=self.lead_key,
            site=site,
            model=self.settings.model,
        )


def write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files durably, one after the other."""
    for name, data in files:
        write_durably(folder / name, data)


def _files(kit: KitFile, certificate: x509.Certificate, *, ca: x509.Certificate, readme: str) -> dict[str, bytes]:
    return {
        "kit.toml": kit.to_toml().encode(),
        "ca.pem": certificate_pem(ca),
        "README.md": readme.encode(),
        f"{kit.kind}.pem": certificate_pem(certificate),
    }

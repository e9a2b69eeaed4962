"""federation.toml, strictly: what the lead decides before anything is provisioned."""

from __future__ import annotations

from pathlib import Path

from fedtune.deploy.address import Address, is_host
from fedtune.deploy.certificates import check_common_name, check_days
from fedtune.deploy.kit_file import KitModel, check_models, read_spec
from fedtune.spec import ConfigError, spec


@spec
class CertificateDays:
    """For how many days certificates are valid; none outlives the authority's own."""

    authority_days: int = 3650
    server_days: int = 365
    lead_days: int = 365
    site_days: int = 365

    def __post_init__(self) -> None:
        for key in ("authority_days", "server_days", "lead_days", "site_days"):
            check_days(key, getattr(self, key))


@spec
class FederationFile:
    """One federation.toml.

    Attributes:
        server: host:port as the sites reach it.
        also_known_as: further names or IP addresses of the server, for its certificate.
        model: base models that runs may name.
    """

    name: str
    server: str
    also_known_as: tuple[str, ...] = ()
    certificates: CertificateDays = CertificateDays()
    model: tuple[KitModel, ...] = ()

    def __post_init__(self) -> None:
        check_common_name("name", self.name)
        Address.of(self.server)
        for host in self.also_known_as:
            if not is_host(host):
                raise ConfigError("also_known_as", host, "must be a DNS name or an IP address, without a port")
        check_models(self.model)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every name and address of the server, the first of them the one in the kits; none repeats."""
        return tuple(dict.fromkeys((Address.of(self.server).host, *(host.lower() for host in self.also_known_as))))


def read_federation(path: Path) -> FederationFile:
    """The federation that the file `path` describes.

    Raises:
        ConfigError: names the file, the key, its value and what would be accepted.
    """
    return read_spec(FederationFile, path)

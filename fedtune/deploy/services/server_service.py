"""`fedtune server start`: a federation's server, from its kit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.deploy.health import Health
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.members import read_roster
from fedtune.flower.audit_log import FILE_NAME
from fedtune.flower.gate import Registered
from fedtune.flower.superlink import ServerSettings, serve
from fedtune.spec import ConfigError

log = logging.getLogger(__name__)
DATABASE = "server.db"


@dataclass(frozen=True, kw_only=True)
class ServerService:
    """A server that is ready to start.

    Attributes:
        kit: the server's.
        host: address to listen on.
        port: to listen on; None: the one that the sites are told.
        data: folder for the database and the audit log; None: the kit's own.
        health: told how the server is doing.
    """

    kit: Kit
    host: str
    port: int | None
    data: Path | None
    health: Health

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ConfigError: the kit is incomplete, or its certificate expired.
        """
        certificate = self.kit.check_certificate(datetime.now(UTC))
        folder = self.data or self.kit.folder
        if not folder.is_dir():
            raise ConfigError("--data", str(folder), "must be a folder")
        settings = ServerSettings(
            tls=self.kit.tls(),
            lead=self.kit.lead,
            host=self.host,
            port=self.port or self.kit.port,
            database=folder / DATABASE,
            roster=self._roster,
            audit=folder / FILE_NAME,
        )

        def ready() -> None:
            self.health.update(state="connected", last_contact=datetime.now(UTC))
            about = {"federation": self.kit.federation, "port": settings.port}
            log.info("the server listens", extra={**about, "certificate_until": certificate.not_after.isoformat()})

        serve(settings, ready=ready, works=self._works)
        self.health.update(state="stopping")
        log.info("the server is down")

    def _works(self, works: bool) -> None:
        """Note whether the database takes what is written: a server that cannot keep a message is not ready."""
        state = self.health.snapshot()["state"]
        if works and state == "failing":
            self.health.update(state="connected")
        elif not works and state == "connected":
            self.health.update(state="failing")

    def _roster(self) -> list[Registered]:
        return [
            Registered(site=member.site, node_key=member.node_key, revoked=member.revoked is not None)
            for member in read_roster(self.kit.roster)
        ]

"""A server's service: what it hands to the part that serves, and what it refuses before that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.health import Health
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.services.lead_and_server import ServerService
from fedtune.flower.wire.superlink import ServerSettings
from fedtune.spec import ConfigError


@pytest.fixture
def service(federation: Path) -> ServerService:
    """A server with its database in the kit, on the port that the sites are told."""
    kit = Kit.read(federation / "server", kind="server")
    return ServerService(kit=kit, host="127.0.0.1", port=None, data=None, health=Health())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """The settings of servers that began to listen, and were stopped at once."""
    seen: list[ServerSettings] = []

    def serve(settings: ServerSettings, *, ready: Callable[[], None], works: Callable[[bool], None]) -> None:
        seen.append(settings)
        ready()

    monkeypatch.setattr("fedtune.flower.wire.superlink.serve", serve)
    return seen


def test_a_server_takes_everything_from_its_kit(service: ServerService, served: list[ServerSettings]) -> None:
    service.run()
    (settings,) = served
    kit = service.kit
    assert (settings.host, settings.port, settings.lead) == ("127.0.0.1", 9092, kit.lead)
    assert (settings.tls.ca, settings.tls.certificate, settings.tls.key) == (kit.ca, kit.certificate, kit.key)
    assert settings.database == kit.folder / "server.db"
    assert settings.audit == kit.folder / "audit.jsonl"


def test_another_port_and_folder_can_be_asked_for(
    service: ServerService, served: list[ServerSettings], tmp_path: Path
) -> None:
    replace(service, port=9999, data=tmp_path).run()
    assert (served[0].port, served[0].database) == (9999, tmp_path / "server.db")
    assert served[0].audit == tmp_path / "audit.jsonl"


def test_the_roster_is_read_anew_each_time(
    service: ServerService,
    served: list[ServerSettings],
    joined: Callable[[str], Path],
    federation: Path,
    now: datetime,
) -> None:
    service.run()
    (settings,) = served
    assert settings.roster() == []
    joined("north")
    joined("south")
    provisioning.revoke_site(federation, "south", now=now)
    assert [(one.site, one.revoked) for one in settings.roster()] == [("north", False), ("south", True)]
    assert all(b"PUBLIC KEY" in one.node_key for one in settings.roster())


def test_a_server_does_not_begin_without_a_roster(service: ServerService, served: list[ServerSettings]) -> None:
    service.run()
    service.kit.roster.write_text("{")
    with pytest.raises(ConfigError, match="must be JSON"):
        served[0].roster()


def test_health_follows_the_server(
    service: ServerService, served: list[ServerSettings], caplog: pytest.LogCaptureFixture
) -> None:
    assert service.health.snapshot()["last_contact"] is None
    with caplog.at_level(logging.INFO, "fedtune"):
        service.run()
    snapshot = service.health.snapshot()
    assert snapshot["state"] == "stopping"
    assert snapshot["last_contact"] is not None
    assert [record.message for record in caplog.records] == ["the server listens", "the server is down"]
    listens: Any = caplog.records[0]
    assert (listens.federation, listens.port) == ("cardiology-2026", 9092)


def test_a_server_whose_database_takes_nothing_is_not_ready(service: ServerService) -> None:
    states = []
    service._works(True)
    states.append(service.health.snapshot()["state"])
    service.health.update(state="connected")
    for works in (True, False, False, True):
        service._works(works)
        states.append(service.health.snapshot()["state"])
    assert states == ["starting", "connected", "failing", "failing", "connected"]
    service.health.update(state="stopping")
    service._works(False)
    assert service.health.snapshot()["state"] == "stopping"


def test_a_folder_for_the_database_must_be_there(
    service: ServerService, served: list[ServerSettings], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (tmp_path / "nowhere", file):
        with pytest.raises(ConfigError, match=r"--data = .*: must be a folder"):
            replace(service, data=place).run()
    assert served == []


def test_an_expired_certificate_is_said_to_be_one(
    service: ServerService, served: list[ServerSettings], federation_toml: Path, now: datetime, tmp_path: Path
) -> None:
    provisioning.init(federation_toml, out=tmp_path / "old", now=now - timedelta(days=400))
    kit = Kit.read(tmp_path / "old" / "server", kind="server")
    with pytest.raises(ConfigError, match=r"server\.pem.*expired.*renew-server"):
        replace(service, kit=kit).run()
    assert served == []

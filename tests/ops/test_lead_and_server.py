"""Services of a lead and a server: members, running processes, latest answers, and server settings."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.ops.deployment import LeadService, _RecordingListener
from fedtune.ops.health import Health
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.services import lead_and_server
from fedtune.ops.services.lead_and_server import (
    RUNNING,
    ServerService,
    find_members,
    find_running_process,
    read_latest_answers,
)
from fedtune.privacy.keys import SigningKey
from fedtune.runs.federation_run import UpdatingListener
from fedtune.spec import ConfigError

from .conftest import Desk

# The sites of a run; tests/cli/test_run.py covers sites named by the lead.


def test_lead_without_active_sites_cannot_start_a_run(join_site: Any, federation: Path, now: datetime) -> None:
    for revoked in (False, True):
        if revoked:
            join_site("north")
            provisioning.revoke_site(federation, "north", now=now)
        with pytest.raises(ConfigError, match="add-site"):
            find_members(Kit.read(federation / "lead", kind="lead"), ())


# What a run needs from the kit.


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return compose_run(
        [
            *("experiment=debug", "runtime=deployment", f"tracking.output_dir={tmp_path}", "name=one"),
            *("federation.site_names=[west,north]", "privacy.noise_multiplier=4.0"),
        ]
    )


def test_lead_service_takes_site_keys_from_the_roster(join_site: Any, config: RunConfig, federation: Path) -> None:
    for site in ("north", "south", "west"):
        join_site(site)
    kit = Kit.read(federation / "lead", kind="lead")
    service = LeadService(kit=kit, federation=config.federation)
    assert [site.site for site in service.sites] == ["west", "north"]
    of_north = service.sites[1]
    assert of_north.site_key == SigningKey.load(federation.parent / "north" / "site_key.pem").public
    assert of_north.node_key == find_members(kit, ("north",))[0].node_key
    assert service.key.public == kit.lead
    grid = service.open_grid()
    assert (grid._server, grid._tls.key) == ("127.0.0.1:9092", kit.key)


def test_expired_lead_certificate_prevents_a_run(
    federation_toml: Path, config: Any, now: datetime, tmp_path: Path
) -> None:
    provisioning.init_federation(federation_toml, out=tmp_path / "old", now=now - timedelta(days=400))
    kit = Kit.read(tmp_path / "old" / "lead", kind="lead")
    folder = tmp_path / "one"
    folder.mkdir()
    listener: Any = None
    with pytest.raises(ConfigError, match=r"lead\.pem.*expired.*renew-lead"):
        LeadService(kit=kit, federation=config.federation).run(config, folder, listener)
    assert list(folder.iterdir()) == []


# The process of a run folder.


def test_run_folder_records_the_process_id_only_during_the_run(tmp_path: Path) -> None:
    assert find_running_process(tmp_path) is None
    with lead_and_server.mark_running(tmp_path):
        assert find_running_process(tmp_path) == os.getpid()
        fields = json.loads((tmp_path / RUNNING).read_text())
        assert fields["pid"] == os.getpid()
        (tmp_path / RUNNING).write_text(json.dumps(fields | {"at": "another machine"}))
        assert find_running_process(tmp_path) is None, "on this machine the number belongs to another process"
    assert find_running_process(tmp_path) is None
    assert not (tmp_path / RUNNING).exists()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other_process:
        (tmp_path / RUNNING).write_text(json.dumps({"pid": other_process.pid}))
        found = find_running_process(tmp_path)
        other_process.kill()
    assert found == other_process.pid
    assert find_running_process(tmp_path) is None
    # As arguments of kill, 0 and -1 mean this process group and all processes.
    for pid in ("null", '"x"', "0", "-1", "1e30"):
        (tmp_path / RUNNING).write_text(f'{{"pid": {pid}}}')
        assert find_running_process(tmp_path) is None, pid
    for text in ("", "{", "[]", "{}"):
        (tmp_path / RUNNING).write_text(text)
        assert find_running_process(tmp_path) is None, text


# Answers of the sites.


def test_latest_site_answers_are_stored_and_displayed(tmp_path: Path, now: datetime) -> None:
    shown, state, update = Mock(), Mock(), Mock()
    recorded = _RecordingListener(UpdatingListener(shown, update), tmp_path, Mock())
    assert read_latest_answers(tmp_path) == {}
    calls = [
        call.on_site_answered("north", "awaiting_approval", num_bytes=10, charged_rounds=0),
        call.on_site_answered("south", "update", num_bytes=20, charged_rounds=1),
        call.on_site_answered("north", "update", num_bytes=30, charged_rounds=1),
        call.note("about the data"),
        call.on_site_replied(2),
        call.on_preparing("checking the model on this machine", 1, 2),
        call.on_round_finished(state),
        call.on_prepared(state, state, state),
    ]
    for name, arguments, options in calls:
        getattr(recorded, name)(*arguments, **options)
    assert shown.mock_calls == calls
    assert update.mock_calls == [call(state), call(state)], "a tracker must receive each state once"
    answers = read_latest_answers(tmp_path)
    assert {site: answer["what"] for site, answer in answers.items()} == {"north": "update", "south": "update"}
    assert all(datetime.fromisoformat(answer["time"]) >= now for answer in answers.values())
    _RecordingListener(shown, tmp_path, Mock()).on_site_answered("south", "stop", num_bytes=1, charged_rounds=1)
    assert [answer["what"] for answer in read_latest_answers(tmp_path).values()] == ["update", "stop"], (
        "also after the run is resumed"
    )


# The server.


@pytest.fixture
def service(federation: Path) -> ServerService:
    """A server with its database in the kit, on the port of the sites' address."""
    kit = Kit.read(federation / "server", kind="server")
    return ServerService(kit=kit, host="127.0.0.1", port=None, data=None, health=Health())


def test_server_rereads_the_roster_each_time(service: ServerService, monkeypatch: Any, desk: Desk) -> None:
    monkeypatch.setattr("fedtune.ops.wire.superlink.serve", serve := Mock())
    service.run()
    ((settings,), options) = serve.call_args
    assert not options["has_new_certificate"]()
    options["ready"]()
    assert service.health.snapshot()["state"] == "connected"
    assert settings.roster() == ()
    desk.join("north")
    desk.join("south")
    desk.revoke("south")
    assert [(site.site, bool(site.revoked)) for site in settings.roster()] == [("north", False), ("south", True)]
    assert all(b"PUBLIC KEY" in site.node_key for site in settings.roster())


def test_server_with_a_failing_database_is_not_ready(service: ServerService) -> None:
    states = []
    service._update_health(True)
    states.append(service.health.snapshot()["state"])
    service.health.update(state="connected")
    for is_working in (True, False, False, True):
        service._update_health(is_working)
        states.append(service.health.snapshot()["state"])
    assert states == ["starting", "connected", "failing", "failing", "connected"]
    service.health.update(state="stopping")
    service._update_health(False)
    assert service.health.snapshot()["state"] == "stopping"

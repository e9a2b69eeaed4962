"""`fedtune server start`: mistakes that are found before anything listens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits import provisioning

from ..conftest import own_logging


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A service that begins takes the process's logs over; afterwards they are as before."""
    with own_logging():
        yield


def make_federation(folder: Path, *, days_ago: int = 0) -> Path:
    (folder / "federation.toml").write_text('name = "cardiology"\nserver = "127.0.0.1:9"\n')
    begun = datetime.now(UTC).replace(microsecond=0) - timedelta(days=days_ago)
    provisioning.init(folder / "federation.toml", out=folder / "federation", now=begun)
    return folder / "federation"


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """A federation's folder."""
    return make_federation(tmp_path)


def test_a_kit_is_needed(command: Any, tmp_path: Path) -> None:
    outcome = command("server", "start", "--kit", str(tmp_path))
    assert outcome.code == 2
    assert outcome.message == f"kit = {str(tmp_path)!r}: must be the folder of a server's kit; it holds no kit.toml"
    assert command("server", "start").code == 2


def test_a_leads_kit_is_no_servers(command: Any, federation: Path) -> None:
    outcome = command("server", "start", "--kit", str(federation / "lead"))
    assert outcome.code == 2
    assert outcome.message == f"{federation / 'lead' / 'kit.toml'}: kind = 'lead': must be 'server' here"


def test_an_incomplete_kit_names_what_is_missing(command: Any, federation: Path) -> None:
    (federation / "server" / "server_key.pem").unlink()
    outcome = command("server", "start", "--kit", str(federation / "server"))
    assert outcome.code == 2
    assert "server_key.pem" in outcome.message
    assert "is missing from the server's kit" in outcome.message


def test_a_folder_for_the_database_must_be_there(command: Any, federation: Path, tmp_path: Path) -> None:
    outcome = command("server", "start", "--kit", str(federation / "server"), "--data", str(tmp_path / "nowhere"))
    assert outcome.code == 2
    assert outcome.message == f"--data = {str(tmp_path / 'nowhere')!r}: must be a folder"
    assert not (federation / "server" / "server.db").exists()


def test_an_expired_certificate_does_not_serve(command: Any, tmp_path: Path) -> None:
    old = make_federation(tmp_path, days_ago=400)
    outcome = command("server", "start", "--kit", str(old / "server"))
    assert outcome.code == 2
    assert "is when the certificate expired: ask for `fedtune provision renew-server`" in outcome.message


def test_health_is_for_this_machine_unless_asked_for(command: Any, federation: Path) -> None:
    outcome = command("server", "start", "--kit", str(federation / "server"), "--health", "0.0.0.0:0")
    assert outcome.code == 2
    assert "add --health-anywhere" in outcome.message

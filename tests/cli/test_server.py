"""`fedtune server start`: mistakes that are found before anything listens."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import own_logging


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A service that begins takes the process's logs over; afterwards they are as before."""
    with own_logging():
        yield


def test_a_kit_is_needed(command: Any, tmp_path: Path) -> None:
    message = command("server", "start", "--kit", str(tmp_path)).failed()
    assert message == f"kit = {str(tmp_path)!r}: must be the folder of a server's kit; it holds no kit.toml"
    assert command("server", "start").code == 2


@pytest.mark.parametrize(
    ("wrong", "words", "message"),
    [
        ("a lead's", (), "lead/kit.toml: kind = 'lead': must be 'server' here$"),
        ("no key", (), r"server_key\.pem.*is missing from the server's kit"),
        ("no data", ("--data", "nowhere"), "^--data = 'nowhere': must be a folder$"),
        ("expired", (), "is when the certificate expired: ask for `fedtune provision renew-server`"),
        ("health for all", ("--health", "0.0.0.0:0"), "add --health-anywhere"),
    ],
)
def test_a_kit_or_place_of_no_use(command: Any, joined: Any, wrong: str, words: tuple[str, ...], message: str) -> None:
    federation = joined("north", days_ago=400 if wrong == "expired" else 0).folder.parent / "federation"
    if wrong == "no key":
        (federation / "server" / "server_key.pem").unlink()
    kit = federation / ("lead" if wrong == "a lead's" else "server")
    assert re.search(message, command("server", "start", "--kit", str(kit), *words).failed())
    assert not (kit / "server.db").exists()

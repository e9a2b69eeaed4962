"""`fedtune server start`: mistakes that are found before anything listens."""

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("own_process")


def test_a_kit_is_needed(command: Any, tmp_path: Path) -> None:
    message = command("server", "start", "--kit", str(tmp_path)).failed()
    assert message == f"kit = {str(tmp_path)!r}: must be the folder of a server's kit; it holds no kit.toml"
    assert command("server", "start").code == 2


@pytest.mark.parametrize(
    ("wrong", "words", "message"),
    [
        ("a lead's", (), "lead/kit.toml: kind = 'lead': must be 'server' here$"),
        ("no data", ("--data", "nowhere"), "^--data = 'nowhere': must be a folder$"),
        ("expired", (), "is when the certificate expired: ask for `fedtune provision renew-server`"),
        ("health for all", ("--health", "0.0.0.0:0"), "add --health-anywhere"),
    ],
)
def test_a_kit_or_place_of_no_use(command: Any, joined: Any, wrong: str, words: tuple[str, ...], message: str) -> None:
    federation = joined("north", days_ago=400 if wrong == "expired" else 0).folder.parent / "federation"
    kit = federation / ("lead" if wrong == "a lead's" else "server")
    assert re.search(message, command("server", "start", "--kit", str(kit), *words).failed())
    assert not (kit / "server.db").exists()

"""`fedtune server start`: errors before the server listens."""

import re
from typing import Any

import pytest

from ..conftest import run_command

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.mark.parametrize(
    ("problem", "words", "message"),
    [
        ("no kit", (), "^--kit = '.*': must be the folder of a server's kit; it has no kit.toml$"),
        ("a lead's", (), "lead/kit.toml: kind = 'lead': must be 'server', because this command needs a server's kit$"),
        ("no data", ("--data", "nowhere"), "^--data = 'nowhere': must be a folder$"),
        ("expired", (), "must be in the future: the certificate has expired: ask for `fedtune provision renew-server`"),
        ("health for all", ("--health", "0.0.0.0:0"), "add --health-anywhere"),
    ],
)
def test_invalid_server_kit_or_database_path_is_refused(
    join_site: Any, problem: str, words: tuple[str, ...], message: str
) -> None:
    federation = join_site("north", days_ago=400 if problem == "expired" else 0).folder.parent / "federation"
    kit = federation / {"a lead's": "lead", "no kit": ""}.get(problem, "server")
    assert re.search(message, run_command("server", "start", "--kit", str(kit), *words).failed())
    assert not (kit / "server.db").exists()
    assert run_command("server", "start").code == 2

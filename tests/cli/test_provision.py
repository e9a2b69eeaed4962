"""`fedtune provision`: output, confirmation by telephone, and invalid commands."""

import io
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits.members import JoinRequest, Roster, describe_next_steps

from ..conftest import parse_command, read_files, run_command
from ..ops.conftest import Desk
from . import snapshots


@pytest.fixture(autouse=True)
def federation_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with a federation.toml."""
    monkeypatch.chdir(tmp_path)
    Path("federation.toml").write_text('name = "cardiology"\nserver = "fl.example.org:9092"\n')


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., Path]:
    """Create a site's keys and join request in the folder `<site>/<kit>`."""
    return Desk(tmp_path / "cardiology", datetime.now(UTC)).request


@pytest.fixture
def provision() -> Callable[..., str]:
    """Run a command that must succeed, and return its output."""
    return lambda *arguments: str(run_command("provision", *arguments).printed)


def find_hex_groups(text: str) -> set[str]:
    """Return the fingerprints in a text, each of 16 groups of four hex digits."""
    return set(re.findall(r"(?:[0-9a-f]{4} ){15}[0-9a-f]{4}", text))


def test_site_and_lead_display_the_same_fingerprints(provision: Any, request_of: Any) -> None:
    provision("init", "federation.toml")
    request = request_of("north")
    site_groups = find_hex_groups(describe_next_steps(request.parent))
    lead_groups = find_hex_groups(provision("add-site", "--compared", str(request), "--federation", "cardiology"))
    kit_groups = find_hex_groups(Path("cardiology/sites/north/README.md").read_text())
    assert len(site_groups) == 2
    assert site_groups < lead_groups  # plus the keys of lead and authority
    assert len(lead_groups) == 4
    assert len(kit_groups) == 3
    assert kit_groups < lead_groups
    assert len(kit_groups & site_groups) == 1  # the connection key
    assert find_hex_groups(Path("cardiology/lead/README.md").read_text()) == lead_groups - site_groups
    # The commands in the READMEs exist.
    text = "".join(path.read_text() for path in Path("cardiology").rglob("README.md"))
    commands = set(re.findall(r"`fedtune (provision renew-[^`]+)`", text))  # add-site: without a request
    assert {command.split()[1] for command in commands} == {"renew-server", "renew-lead", "renew-site"}
    for command in commands:
        parse_command(*command.split())


@pytest.mark.parametrize("typed", ["n\n", "\n", "", None])
@pytest.mark.parametrize("action", ["add-site", "renew-site north"])
def test_provisioning_changes_nothing_before_confirmation(
    provision: Any, request_of: Any, action: str, typed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision("init", "federation.toml")
    first = request_of("north")
    if action != "add-site":
        provision("add-site", "--compared", str(first), "--federation", "cardiology")
    request = first if action == "add-site" else request_of("north", kit="new")
    closed = io.StringIO("")
    closed.close()
    monkeypatch.setattr("sys.stdin", closed if typed is None else io.StringIO(typed))
    before = read_files(Path("cardiology"))
    words = [*action.split(), str(request), "--federation", "cardiology"]
    outcome = run_command("provision", *words)
    assert outcome.code == 1
    assert outcome.message.startswith(
        "nothing is changed: north joins after you have compared its keys. If a key differs"
    )
    assert read_files(Path("cardiology")) == before
    assert "Did the site read out the same keys? [y/N]" in outcome.out
    assert find_hex_groups(describe_next_steps(request.parent)) < find_hex_groups(outcome.out)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run_command("provision", *words).code == 0
    assert read_files(Path("cardiology")) != before


def test_add_site_admits_the_request_compared_by_telephone(
    provision: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request file is replaced during the telephone call."""
    provision("init", "federation.toml")
    request, other = request_of("north"), request_of("north", kit="other")
    compared = JoinRequest.read(request)

    def swap(_: str, **__: str) -> None:
        request.write_bytes(other.read_bytes())

    monkeypatch.setattr("fedtune.cli.provision.require_confirmation", swap)
    provision("add-site", str(request), "--federation", "cardiology")
    (member,) = Roster.read(Path("cardiology/server/roster.json")).sites
    assert member.node_key == compared.node_key != JoinRequest.read(request).node_key


@snapshots.parametrize_mistakes("mistakes-provision")
def test_invalid_provision_command_changes_nothing(provision: Any, request_of: Any, typed: str) -> None:
    provision("init", "federation.toml")
    provision("add-site", "--compared", str(request_of("north")), "--federation", "cardiology")
    Path("wrong.toml").write_text('servr = "x"')
    before = read_files(Path())
    outcome = run_command("provision", *typed.split())
    snapshots.check_message("mistakes-provision", typed, outcome.failed())
    assert (outcome.out, read_files(Path())) == ("", before)

"""`fedtune provision`: what it prints is what people need, and every mistake is one line and changes nothing."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.kits.members import JoinRequest, Roster, next_steps, site_init
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_policy import Policy

from ..conftest import parsed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines long enough that a phrase is not broken, in a folder with a federation.toml."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    Path("federation.toml").write_text('name = "cardiology"\nserver = "fl.example.org:9092"\n')


@pytest.fixture
def request_of(site_policy: Callable[..., Policy]) -> Callable[..., Path]:
    """A site's keys and join request, in the folder `<site>/<kit>`."""

    def make(site: str, *, kit: str = "kit") -> Path:
        Path(site).mkdir(exist_ok=True)
        write_policy(site_policy(site), Path(site) / "site.toml")
        return site_init(Path(site) / "site.toml", out=Path(site) / kit) / "join_request.json"

    return make


@pytest.fixture
def provision(command: Any) -> Callable[..., str]:
    """Run a command that must succeed; what it prints."""

    def run(*arguments: str) -> str:
        outcome = command("provision", *arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return str(outcome.out)

    return run


@pytest.fixture(autouse=True)
def one_day() -> None:
    """What a command says of today is compared after it: no test begins shortly before midnight."""
    now = datetime.now(UTC)
    left_s = (now.replace(hour=23, minute=59, second=59) - now).total_seconds() + 1
    if left_s < 30:
        time.sleep(left_s)


def today(days: int) -> str:
    return f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%d}"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_federation_from_its_file_to_a_revoked_site(
    provision: Callable[..., str], request_of: Callable[..., Path]
) -> None:
    out = provision("init", "federation.toml")
    for words in ("cardiology is in cardiology/", today(3650), today(365), "Copy cardiology/server", "offline"):
        assert words in out, words

    request = request_of("north")
    out = provision("add-site", "--compared", str(request), "--federation", "cardiology")
    for words in (
        "Site north is in the federation.",
        "Data set patients: declared size 100.",
        f"Its certificate is valid until {today(365)}.",
        "Send cardiology/sites/north-kit.zip to the site; nothing in it is secret.",
        "Copy cardiology/server/roster.json into the server's kit. Until then nothing changes there",
    ):
        assert words in out, words

    out = provision("renew-site", "north", "--federation", "cardiology", "--days", "40")
    assert "Nothing changes at the others." in out
    assert f"valid until {today(40)}" in out
    assert "connection key" not in out  # nothing to compare: the keys stay
    assert "roster.json" not in out  # the server knows the site by its key

    out = provision("renew-server", "--federation", "cardiology", "--days", "50")
    assert f"The server's certificate is valid until {today(50)}; its key stays." in out
    assert "Copy kit.toml, server.pem and README.md" in out
    out = provision("renew-lead", "--federation", "cardiology", "--days", "60")
    assert f"The lead's certificate is valid until {today(60)}; its key stays." in out

    out = provision("revoke-site", "north", "--federation", "cardiology")
    assert "its connection key can never be used again" in out
    assert "Copy cardiology/server/roster.json into the server's kit." in out

    out = provision(
        "renew-site", "north", str(request_of("north", kit="new")), "--compared", "--federation", "cardiology"
    )
    assert "The site was revoked, and takes part again." in out
    assert "connection key  " in out
    (member,) = Roster.read(Path("cardiology/server/roster.json")).sites
    assert (member.site, member.revoked) == ("north", None)


def groups(text: str) -> set[str]:
    """Fingerprints in a text, each 16 groups of four hex digits."""
    return set(re.findall(r"(?:[0-9a-f]{4} ){15}[0-9a-f]{4}", text))


def test_site_and_lead_read_out_the_same_fingerprints(
    provision: Callable[..., str], request_of: Callable[..., Path]
) -> None:
    provision("init", "federation.toml")
    request = request_of("north")
    at_the_site = groups(next_steps(request.parent))
    at_the_lead = groups(provision("add-site", "--compared", str(request), "--federation", "cardiology"))
    in_the_kit = groups(Path("cardiology/sites/north/README.md").read_text())
    assert len(at_the_site) == 2
    assert at_the_site < at_the_lead  # connection key and site key, and then those of lead and authority
    assert len(at_the_lead) == 4
    assert len(in_the_kit) == 3
    assert in_the_kit < at_the_lead
    assert len(in_the_kit & at_the_site) == 1  # the connection key
    assert groups(Path("cardiology/lead/README.md").read_text()) == at_the_lead - at_the_site


@pytest.mark.parametrize("typed", ["n\n", "\n", "", None])
@pytest.mark.parametrize("what", ["add-site", "renew-site north"])
def test_nothing_is_changed_before_a_person_has_compared(
    provision: Callable[..., str],
    request_of: Callable[..., Path],
    command: Any,
    what: str,
    typed: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provision("init", "federation.toml")
    first = request_of("north")
    if what != "add-site":
        provision("add-site", "--compared", str(first), "--federation", "cardiology")
    request = first if what == "add-site" else request_of("north", kit="new")
    closed = io.StringIO("")
    closed.close()
    monkeypatch.setattr("sys.stdin", closed if typed is None else io.StringIO(typed))
    before = files_in(Path("cardiology"))
    words = [*what.split(), str(request), "--federation", "cardiology"]
    outcome = command("provision", *words)
    assert (outcome.code, outcome.message) == (1, "nothing is changed: north comes in once its keys are compared")
    assert files_in(Path("cardiology")) == before
    assert "Did the site read out the same? [y/N]" in outcome.out
    assert groups(next_steps(request.parent)) < groups(outcome.out)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert command("provision", *words).code == 0
    assert files_in(Path("cardiology")) != before


def test_what_is_let_in_is_what_was_compared(
    provision: Callable[..., str], request_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts another request in the file's place while people telephone."""
    provision("init", "federation.toml")
    request, other = request_of("north"), request_of("north", kit="other")
    compared = JoinRequest.read(request)

    def swap(_: str, **__: str) -> None:
        request.write_bytes(other.read_bytes())

    monkeypatch.setattr("fedtune.cli.provision.require_agreed", swap)
    provision("add-site", str(request), "--federation", "cardiology")
    (member,) = Roster.read(Path("cardiology/server/roster.json")).sites
    assert member.node_key == compared.node_key != JoinRequest.read(request).node_key


def test_list_shows_who_is_in_and_warns_in_time(provision: Callable[..., str], request_of: Callable[..., Path]) -> None:
    provision("init", "federation.toml")
    for site, days in (("north", "29"), ("south", "31"), ("west", "5")):
        provision("add-site", "--compared", str(request_of(site)), "--federation", "cardiology", "--days", days)
    provision("revoke-site", "west", "--federation", "cardiology")
    out = provision("list", "--federation", "cardiology")
    for words in (
        "Federation cardiology, server fl.example.org:9092",
        "3 sites",
        f"{today(29)} (28 days left)",
        f"revoked {today(0)}",
        "patients (100)",
        "The certificate of site north: 28 days left. Renew it: fedtune provision renew-site north",
    ):
        assert words in out, words
    for words in ("of site south", "of site west", "of the server", "of the lead", "The authority:"):
        assert words not in out, words
    provision("renew-server", "--federation", "cardiology", "--days", "1")
    out = provision("list", "--federation", "cardiology")
    assert "The certificate of the server: 0 days left. Renew it: fedtune provision renew-server" in out


def test_list_answers_machines(provision: Callable[..., str], request_of: Callable[..., Path]) -> None:
    provision("init", "federation.toml", "--out", "folder")
    provision("add-site", "--compared", str(request_of("north")), "--federation", "folder", "--days", "20")
    provision("add-site", "--compared", str(request_of("south")), "--federation", "folder")
    provision("revoke-site", "south", "--federation", "folder")
    answer = json.loads(provision("list", "--federation", "folder", "--json"))
    assert answer["schema_version"] == 1
    assert (answer["federation"], answer["server"]) == ("cardiology", "fl.example.org:9092")
    assert answer["certificates"].keys() == {"authority", "server", "lead"}
    north, south = answer["sites"]
    assert north["site"] == "north"
    assert north["revoked"] is None
    assert north["certificate"]["days_left"] == 19
    assert north["certificate"]["not_after"].startswith(today(20))
    assert north["datasets"] == [{"id": "patients", "declared_size": 100}]
    assert re.fullmatch("[0-9a-f]{64}", north["connection_key_sha256"])
    assert south["revoked"].startswith(today(0))
    assert len(answer["warnings"]) == 1
    assert "PRIVATE" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("init none.toml", "file = 'none.toml': must be a readable file"),
        ("init federation.toml --out cardiology", "--out = 'cardiology': exists already"),
        ("init federation.toml --out federation.toml/x", "--out = 'federation.toml/x': cannot be written"),
        ("init .", "file = '.': must be a readable file"),
        ("init wrong.toml --out new", "wrong.toml: servr: is not a key"),
        ("list", "--federation = '.': must be the folder that `fedtune provision init` made"),
        ("add-site none.json --federation cardiology", "request = 'none.json': must be a readable file"),
        ("add-site federation.toml --federation cardiology", "federation.toml: request = "),
        ("add-site huge --federation cardiology", "huge: request = 'more than 65536 bytes': must have at most"),
        ("add-site north/kit/join_request.json --federation cardiology", "site = 'north': is taken"),
        ("add-site north/kit/join_request.json", "--federation = '.': must be the folder"),
        ("renew-site north --federation cardiology --days 0", "--days = 0: must be a number of days"),
        ("renew-site north --federation cardiology --new-site-key", "--new-site-key: needs the REQUEST"),
        ("renew-site ../north --federation cardiology", "site = '../north': must be a site of the federation: north"),
        ("revoke-site east --federation cardiology", "site = 'east': must be a site of the federation: north"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    provision: Callable[..., str], request_of: Callable[..., Path], command: Any, arguments: str, message: str
) -> None:
    provision("init", "federation.toml")
    provision("add-site", "--compared", str(request_of("north")), "--federation", "cardiology")
    Path("wrong.toml").write_text('servr = "x"')
    Path("huge").write_bytes(b" " * 70_000)
    before = files_in(Path())
    outcome = command("provision", *arguments.split())
    assert outcome.code == 2
    assert message in outcome.message
    assert outcome.out == ""
    assert files_in(Path()) == before
    assert not Path("new").exists()


def test_commands_in_the_readmes_exist(provision: Callable[..., str], request_of: Callable[..., Path]) -> None:
    provision("init", "federation.toml")
    provision("add-site", "--compared", str(request_of("north")), "--federation", "cardiology")
    text = "".join(path.read_text() for path in Path("cardiology").rglob("README.md"))
    found = set(re.findall(r"`fedtune (provision [^`]+)`", text))
    found = {one for one in found if one.startswith("provision renew-")}  # add-site is named without its request
    assert {one.split()[1] for one in found} == {"renew-server", "renew-lead", "renew-site"}
    for one in found:
        parsed(*one.split())

"""A lead's run without a terminal: by its systemd unit, killed and begun again; or stopped and resumed elsewhere."""

from __future__ import annotations

import configparser
import shlex
import shutil
from collections.abc import Callable

import pytest

from fedtune.ops.services.lead_and_server import running_process

from .books import check_average, check_books
from .federation import LEAD, Federation, settings
from .processes import FEDTUNE, REPOSITORY, Process

pytestmark = pytest.mark.nightly

UNIT = REPOSITORY / "deployment/systemd/fedtune-lead@.service"


@pytest.fixture(scope="module")
def federation(make_federation: Callable[..., Federation]) -> Federation:
    """Two sites that can be held up, and the lead's folder as the unit expects it."""
    made = make_federation(names=("north", "south"))
    (made.folder / "kit").symlink_to(made.lead_kit)
    shutil.copy(REPOSITORY / "conf/experiment/debug.yaml", made.folder / "served.yaml")
    made.start(held=True)
    return made


def started(federation: Federation, more: list[str]) -> Process:
    """What systemd starts for `fedtune-lead@served`, with SETTINGS from a file."""
    unit = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.read_string(UNIT.read_text())
    program, *words = shlex.split(unit["Service"]["execstart"].replace("%i", "served"))
    assert program == "/opt/fedtune/bin/fedtune"
    assert words[-1] == "$SETTINGS", "an unbraced word of its own, so that systemd splits it"
    return federation.run("lead-served", LEAD, [*FEDTUNE, *words[:-1], *more])


def test_a_killed_lead_goes_on_by_the_same_command_and_ends_once(federation: Federation) -> None:
    """Its public stage is over by the first kill, and is not trained again."""
    public = federation.folder / "public.csv"
    public.write_text("text,label\nWhere is my card?,card_arrival\nIs it lost?,lost_or_stolen_card\n")
    more = [word for word in settings("federation.num_rounds=2") if not word.startswith("experiment=")]
    more.append(f"public.train_file={public}")
    held = federation.sites["north"]
    held.hold(True)
    lead = started(federation, more)
    held.wait_for("served", "reserve", round=1, lead=lead)
    lead.kill()
    held.hold(False)
    held.wait_for("served", "commit", round=1)
    held.hold(True)
    again = started(federation, more)
    held.wait_for("served", "reserve", round=2, lead=again)
    again.kill()
    held.hold(False)
    last = started(federation, more)
    assert last.end() == 0, last.text
    assert ["Public stage" in one.text for one in (lead, again, last)] == [True, False, False]
    check_books(federation, "served")
    check_average(federation, "served")
    for site in federation.sites.values():
        assert [event.round for event in site.events("served", "reserve")] == [1, 2], "nothing was charged twice"
    # Begun again by a machine that starts, a finished run is left as it is.
    before = [len(site.events("served")) for site in federation.sites.values()]
    result = (federation.run_folder("served") / "run.json").read_bytes()
    after = started(federation, more)
    assert after.end(seconds=120) == 0, after.text
    assert "served is finished." in after.text
    assert [len(site.events("served")) for site in federation.sites.values()] == before
    assert (federation.run_folder("served") / "run.json").read_bytes() == result


def test_a_run_is_looked_at_stopped_and_resumed_from_another_terminal(federation: Federation) -> None:
    folder, held = federation.run_folder("apart"), federation.sites["north"]
    begin = [*settings("federation.num_rounds=2"), "name=apart", f"tracking.output_dir='{folder.parent}'"]
    kit = ["--kit", str(federation.lead_kit)]
    held.hold(True)
    first = federation.run("first", LEAD, [*FEDTUNE, "run", *begin, *kit])
    held.wait_for("apart", "reserve", round=1)
    assert "running, 0 of 2 rounds" in federation.do("run", "status", str(folder)).out
    taken = federation.run("taken", LEAD, [*FEDTUNE, "run", *begin, *kit])
    assert taken.end(seconds=120) == 2
    assert "is taken" in taken.text
    federation.do("run", "stop", str(folder))
    assert first.end(seconds=120) == 1, first.text
    assert running_process(folder) is None
    held.hold(False)
    last = federation.run("last", LEAD, [*FEDTUNE, "run", "resume", str(folder), *kit])
    assert last.end() == 0, last.text
    assert "finished, 2 of 2 rounds" in federation.do("run", "status", str(folder)).out
    check_books(federation, "apart")

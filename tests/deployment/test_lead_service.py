"""A lead's run without a terminal: its systemd unit's command line, killed and begun again; and in the background."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import Callable

import pytest

from fedtune.ops.services.lead_and_server import running_process

from .books import check_average, check_books
from .federation import LEAD, Federation, settings
from .processes import FEDTUNE, REPOSITORY, RUN_S, Process, wait_for

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
    more = [word for word in settings("federation.num_rounds=2") if not word.startswith("experiment=")]
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


def test_a_run_in_the_background_outlives_its_command_and_is_looked_at_stopped_and_resumed(
    federation: Federation,
) -> None:
    folder, held = federation.run_folder("apart"), federation.sites["north"]
    output = folder.with_name("apart.output.txt")
    begin = [*settings("federation.num_rounds=2"), "name=apart", f"tracking.output_dir='{folder.parent}'"]
    kit = ["--kit", str(federation.lead_kit), "--background"]

    def background(*words: str) -> int:
        """Start it; once the command has ended, the process that runs the folder."""
        command = federation.run("command", LEAD, [*FEDTUNE, "run", *words, *kit])
        assert command.end(seconds=120) == 0, command.text
        assert f"fedtune run status {folder}" in " ".join(command.text.split())
        assert f"fedtune run stop {folder}" in " ".join(command.text.split())
        pid = running_process(folder)
        assert pid is not None
        assert os.getsid(pid) == pid, "it hears nothing of the end of a terminal"
        return pid

    held.hold(True)
    pid = background(*begin)
    try:
        held.wait_for("apart", "reserve", round=1)
        assert "running, 0 of 2 rounds" in federation.do("run", "status", str(folder)).out
        taken = federation.run("taken", LEAD, [*FEDTUNE, "run", *begin, *kit])
        assert taken.end(seconds=120) == 2
        assert "is taken" in taken.text
        federation.do("run", "stop", str(folder))
        assert running_process(folder) is None
        said = output.read_text()
        held.hold(False)
        pid = background("resume", str(folder))
        wait_for(lambda: running_process(folder) is None, seconds=RUN_S, what="its end")
    finally:
        if running_process(folder) == pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert "finished, 2 of 2 rounds" in federation.do("run", "status", str(folder)).out
    check_books(federation, "apart")
    assert output.read_text().startswith(said), "a second start adds to the file"
    assert "round 2/2" in output.read_text()

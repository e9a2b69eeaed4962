"""What a site's commands tell its running process: runs that wait, pause, and who serves a ledger."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedtune.ops.services.site_state as site_state
from fedtune.ops.services.site_state import MOST_WAITING, SiteState, serving
from fedtune.privacy.proposal import Proposal
from fedtune.spec import ConfigError, RunError

from ..conftest import files_in

Propose = Callable[..., Proposal]
SETTINGS = '{"seed": 3}'


@pytest.fixture
def state(tmp_path: Path) -> SiteState:
    folder = tmp_path / "kit"
    folder.mkdir()
    return SiteState.of(folder)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the time that a state sees."""

    def set_to(time: str) -> None:
        class Fixed(site_state.datetime):
            @classmethod
            def now(cls, zone: Any = None) -> Any:
                return cls.fromisoformat(time)

        monkeypatch.setattr(site_state, "datetime", Fixed)

    return set_to


def test_a_waiting_run_keeps_the_time_of_its_first_request(state: SiteState, run_proposal: Propose, clock: Any) -> None:
    clock("2030-01-02T10:00:00+00:00")
    assert state.wait_for_approval(run_proposal(run="second"), SETTINGS) is True
    clock("2030-01-01T10:00:00+00:00")
    assert state.wait_for_approval(run_proposal(run="first"), SETTINGS) is True
    clock("2030-01-03T10:00:00+00:00")
    assert state.wait_for_approval(run_proposal(run="second"), SETTINGS) is False
    assert [(one.proposal.run, one.since[:10]) for one in state.waiting()] == [
        ("first", "2030-01-01"),
        ("second", "2030-01-02"),
    ]


def test_a_waiting_run_is_kept_to_the_letter_until_it_is_forgotten(state: SiteState, run_proposal: Propose) -> None:
    proposal = run_proposal(target_modules=("query", "value"), spare_rounds=1)
    assert state.waiting() == []
    state.wait_for_approval(proposal, SETTINGS)
    (pending,) = SiteState.of(state.folder.parent).waiting()
    assert (pending.proposal, pending.settings) == (proposal, SETTINGS)
    assert pending.proposal.digest() == proposal.digest()
    state.forget(run_proposal(run="another"))
    assert len(state.waiting()) == 1
    for _ in range(2):
        state.forget(proposal)
        assert state.waiting() == []


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "x" * 300, "con: *?"])
def test_a_run_by_any_name_stays_inside(tmp_path: Path, state: SiteState, run_proposal: Propose, name: str) -> None:
    before = files_in(tmp_path)
    state.wait_for_approval(run_proposal(run=name), SETTINGS)
    (made,) = files_in(tmp_path).keys() - before.keys()
    assert Path(made).parent == Path("kit/state/pending")
    assert [pending.proposal.run for pending in state.waiting()] == [name]
    state.forget(run_proposal(run=name))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("damage", [
    *("", "{", "[]", '{"since": "x"}', '{"proposal": null, "since": "x"}'),
    *({"settings": "no JSON"}, {"settings": "[]"}, {"settings": None}),  # which cannot be shown
])  # fmt: skip
def test_a_damaged_file_says_what_to_do_and_is_mended(state: SiteState, run_proposal: Propose, damage: Any) -> None:
    state.wait_for_approval(run_proposal(), SETTINGS)
    (path,) = (state.folder / "pending").iterdir()
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(RunError) as caught:
        state.waiting()
    assert str(caught.value) == f"{path} is damaged; remove it, and the lead's next request writes it anew"
    assert state.wait_for_approval(run_proposal(), SETTINGS) is True, "the lead asks again every few seconds"
    assert [pending.proposal for pending in state.waiting()] == [run_proposal()]


def test_so_many_runs_wait_and_no_more(state: SiteState, run_proposal: Propose) -> None:
    for number in range(MOST_WAITING):
        state.wait_for_approval(run_proposal(run=f"run-{number}"), SETTINGS)
    with pytest.raises(RunError, match="100 runs wait for approval already"):
        state.wait_for_approval(run_proposal(run="one more"), SETTINGS)
    assert state.wait_for_approval(run_proposal(run="run-0"), SETTINGS) is False, "one of them may ask again"
    state.forget(run_proposal(run="run-7"))
    assert state.wait_for_approval(run_proposal(run="one more"), SETTINGS) is True


# Who serves a ledger.

_HOLD = """
import sys, time
from pathlib import Path
from fedtune.ops.services.site_state import serving
with serving(Path(sys.argv[1])):
    print("serving", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which serves the ledger."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path / "ledger.db")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "serving\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_ledger_has_one_server_until_that_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    ledger = tmp_path / "ledger.db"
    with pytest.raises(ConfigError) as caught, serving(ledger):
        pytest.fail("two processes serve one ledger")
    assert str(caught.value) == (
        f"ledger = {str(ledger)!r}: is being served by process {holder.pid} already; stop that one first"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with serving(ledger):
        assert (tmp_path / "ledger.db.serving").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_given_back_and_its_file_stays(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    (tmp_path / "ledger.db.serving").write_text("123456789012345\n")  # a longer number is overwritten whole
    with pytest.raises(RuntimeError, match="failed"), serving(ledger):
        raise RuntimeError("failed")
    file = tmp_path / "ledger.db.serving"
    assert file.read_text() == f"{os.getpid()}\n"
    inode = file.stat().st_ino
    with serving(ledger), pytest.raises(ConfigError, match=f"process {os.getpid()} already"), serving(ledger):
        pytest.fail("nor does one process serve it twice")
    # Were it removed, two processes could hold two files of one name.
    assert file.stat().st_ino == inode
    assert not ledger.exists()

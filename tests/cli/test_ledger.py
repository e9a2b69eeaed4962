"""`fedtune ledger`: read-only commands, anchors, restoring, freezing and date confirmation."""

import io
import json
import math
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.ops.services.site_state import lock_ledger
from fedtune.privacy import events
from fedtune.privacy.accountant import format_epsilon, format_factor
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.verify import verify
from fedtune.spec import RunError

from ..conftest import read_files, run_command


@pytest.mark.parametrize("reader", ["show", "spent", "verify", "export"])
def test_ledger_read_commands_refuse_damaged_ledgers_without_changes(
    reader: str, site_with_history: Any, tmp_path: Path
) -> None:
    before = read_files(site_with_history.folder)
    for path in (site_with_history.ledger, site_with_history.folder):
        assert run_command("ledger", reader, str(path)).code == 0
    assert read_files(site_with_history.folder) == before
    message = run_command("ledger", reader, str(tmp_path / "none.db")).failed()
    assert message == f"PATH = '{tmp_path}/none.db': no such file or folder"
    assert not (tmp_path / "none.db").exists()
    inner = tmp_path / "run" / "sites" / "bank-a"
    inner.mkdir(parents=True)
    shutil.copy(site_with_history.ledger, inner)
    assert run_command("ledger", reader, str(tmp_path / "run")).failed().endswith(f"must be one of {inner}/ledger.db")
    site_with_history.ledger.write_bytes(
        site_with_history.ledger.read_bytes().replace(b"classification", b"Classification", 1)
    )
    outcome = run_command("ledger", reader, str(site_with_history.ledger))
    assert re.search("event [23] was changed", outcome.failed(1))
    assert outcome.out == ""


def test_ledger_export_writes_one_file_and_overwrites_none(site_with_history: Any, tmp_path: Path) -> None:
    def read_export(*words: str) -> Any:
        return json.loads(run_command("ledger", words[0], str(site_with_history.ledger), *words[1:], "--json").printed)

    output, shown = tmp_path / "ledger.json", read_export("show")
    assert run_command("ledger", "export", str(site_with_history.ledger), "--output", str(output)).code == 0
    exported = json.loads(output.read_text())
    assert exported["events"] == shown["events"]
    assert [event["sequence"] for event in shown["events"]] == list(range(1, shown["num_events"] + 1))
    assert read_export("show", "--last", "3")["events"] == shown["events"][-3:], "the newest"
    assert run_command("ledger", "show", str(site_with_history.ledger), "--last", "0").code == 2
    assert exported["head"] == exported["events"][-1]
    assert exported["spending"].items() <= read_export("spent").items()
    assert exported["verification"]["rollback_excluded"] is False
    assert json.loads(run_command("ledger", "export", str(site_with_history.ledger)).out) == exported
    for name in ("ledger.db", "site_key.pem"):
        before = (site_with_history.folder / name).read_bytes()
        message = run_command(
            "ledger", "export", str(site_with_history.ledger), "--output", str(site_with_history.folder / name)
        ).failed()
        assert "already exists" in message
        assert (site_with_history.folder / name).read_bytes() == before


def test_run_name_cannot_inject_terminal_control_sequences(site: Any) -> None:
    site.ask_too_much(site.proposal("x", noise_multiplier=0.5), named="\x1b[31m[red]evil\u202e\n")
    out = run_command("ledger", "show", str(site.ledger)).out
    assert "?[31m[red]evil??" in out
    assert "\x1b" not in out


def test_ledger_with_seeded_runs_has_no_guarantee(site: Any) -> None:
    site.write_policy(seeded_noise="true")
    site.open()
    out = run_command("ledger", "spent", str(site.ledger)).out
    assert "Nothing was spent yet" in out
    assert "No run has been accepted yet." in out
    site.charge(site.proposal("study", seeded_noise=True), 1)
    assert run_command("ledger", "spent", str(site.ledger)).out.count("NO GUARANTEE") == 2
    assert "NO GUARANTEE" in " ".join(run_command("ledger", "show", str(site.ledger)).out.split())
    assert json.loads(run_command("ledger", "spent", str(site.ledger), "--json").out)["guarantee"] is False


def test_noiseless_run_is_unbounded_in_text_and_null_in_json(site: Any) -> None:
    site.write_policy(
        max_epsilon="inf", max_epsilon_per_run=None, max_epsilon_per_period=None, min_noise_multiplier="0.0"
    )
    site.charge(site.proposal("bare", noise_multiplier=0.0), 1)
    out = run_command("ledger", "spent", str(site.ledger)).out
    assert "NO GUARANTEE" in out
    assert "unbounded" in out
    figures = json.loads(run_command("ledger", "spent", str(site.ledger), "--json").out)
    for key in (
        "epsilon",
        "epsilon_pld",
        "epsilon_rdp",
        "max_epsilon",
        "remaining_epsilon",
        "reference_remaining_runs",
    ):
        assert figures[key] is None, key
    assert figures["guarantee"] is False
    assert "WITHOUT NOISE" in run_command("ledger", "show", str(site.ledger)).out


def test_freeze_requires_a_reason_and_leaves_no_budget(site_with_history: Any) -> None:
    site_with_history.write_policy(max_epsilon="8.0")
    site_with_history.open()
    assert (
        "The lifetime cap was changed: at most 6" in run_command("ledger", "spent", str(site_with_history.ledger)).out
    )
    freeze = ("ledger", "freeze", "--policy", str(site_with_history.site_toml), "--why")
    assert run_command(*freeze, " ").failed() == "--why = ' ': must be one line of at most 300 characters"
    assert run_command(*freeze, "consent withdrawn").code == 0
    site_with_history.ask_too_much(site_with_history.proposal("late"))
    out = run_command("ledger", "show", str(site_with_history.ledger)).out
    assert "all training has ended: consent withdrawn" in out
    assert "; changed: budget.max_epsilon = 8.0 (was 6.0)" in " ".join(out.split())
    spent = run_command("ledger", "spent", str(site_with_history.ledger))
    assert "FROZEN" in spent.out
    assert "nothing, because it is frozen" in spent.out
    figures = json.loads(run_command("ledger", "spent", str(site_with_history.ledger), "--json").out)
    assert (figures["frozen"], figures["remaining_epsilon"], figures["reference_remaining_runs"]) == (True, 0, 0)
    site_with_history.ledger.unlink()
    assert run_command(*freeze, "x").code == 2
    assert not site_with_history.ledger.exists()


def test_ledger_verify_lists_checks_and_detects_a_wrong_site_key(site_with_history: Any) -> None:
    verified = ("ledger", "verify", str(site_with_history.ledger))
    expected = ("--anchor", str(site_with_history.anchor), "--site-key", site_with_history.key.public)
    result = json.loads(run_command(*verified, "--json", *expected).out)
    assert (result["rollback_excluded"], result["anchor_sequence"]) == (True, result["num_events"])
    assert (result["site_key"], result["key_expected"]) == (site_with_history.key.public, True)
    assert "Not checked:" not in run_command(*verified, *expected).out
    assert "names site key" in run_command(*verified, "--site-key", "ab" * 32).failed(1), (
        "another site's ledger is found"
    )
    assert run_command(*verified, "--site-key", "short").code == 2


def test_anchor_is_not_replaced_by_an_older_head(put_back: Any) -> None:
    verified = ("ledger", "verify", str(put_back.ledger), "--anchor")
    assert "rolled back to an older copy" in run_command(*verified, str(put_back.anchor)).failed(1)
    assert run_command(*verified, str(put_back.folder / "none.json")).code == 2
    options = ("--key", str(put_back.folder / "site_key.pem"), "--output", str(put_back.anchor))
    before = put_back.anchor.read_bytes()
    assert "rolled back to an older copy" in run_command("ledger", "anchor", str(put_back.ledger), *options).failed(1)
    assert put_back.anchor.read_bytes() == before


def test_manual_anchor_requires_the_key_of_the_ledger(site_with_history: Any, tmp_path: Path) -> None:
    anchor, key = tmp_path / "anchor.json", site_with_history.folder / "site_key.pem"
    words = ("ledger", "anchor", str(site_with_history.ledger))
    assert run_command(*words, "--key", str(site_with_history.folder / "lead.pem"), "--output", str(anchor)).code == 1
    assert not anchor.exists()
    before = key.read_bytes()
    assert run_command(*words, "--key", str(key), "--output", str(key)).code == 2
    assert key.read_bytes() == before
    assert run_command(*words, "--key", str(key), "--output", str(anchor)).code == 0
    assert anchor.read_bytes() == site_with_history.anchor.read_bytes()
    key.unlink()
    assert run_command("ledger", "show", str(site_with_history.ledger)).code == 0
    with pytest.raises(RunError, match="is not signed by the site's key"):  # the old key is not replaced by a new key
        site_with_history.open()


def restore_ledger(site: Any, *more: str) -> Any:
    return run_command("ledger", "restore", "--policy", str(site.site_toml), *more)


def test_restore_charges_once_and_creates_no_ledger(put_back: Any, tmp_path: Path) -> None:
    lost = tmp_path / "lost.json"
    shutil.copy(put_back.anchor, lost)
    assert restore_ledger(put_back, "--anchor", str(lost)).code == 0
    before = put_back.ledger.read_bytes()
    assert "Nothing was charged" in restore_ledger(put_back, "--anchor", str(lost)).printed
    assert "has every event" in restore_ledger(put_back, "--anchor", str(put_back.anchor)).printed
    assert put_back.ledger.read_bytes() == before
    put_back.write_policy(anchor='""')
    assert restore_ledger(put_back).failed() == "--anchor: is required, because the policy names no anchor"
    put_back.ledger.unlink()
    assert "ledger.db': is missing" in restore_ledger(put_back, "--anchor", str(lost)).failed()
    assert not put_back.ledger.exists()


def test_restore_charges_missing_events_and_training_continues(put_back: Any) -> None:
    lost = Head.read(put_back.anchor)
    out = restore_ledger(put_back).printed
    assert "10 noisy steps (rate 0.05, noise 2.5)" in out
    assert "20 noisy steps (rate 0.05, noise 2)" in out
    verified = verify(put_back.ledger, anchor=Head.read(put_back.anchor))
    assert verified.history.head(put_back.key).charged == lost.charged
    put_back.charge(put_back.proposal("fourth"), 1)
    assert "Backups restored so far: 1" in run_command("ledger", "spent", str(put_back.ledger)).out
    shown = run_command("ledger", "show", str(put_back.ledger)).out
    assert "a backup was restored; charged for the missing events" in shown


def test_restore_refuses_a_ledger_that_a_site_serves(put_back: Any) -> None:
    before = put_back.ledger.read_bytes()
    with lock_ledger(put_back.ledger):
        assert "is already in use by process" in restore_ledger(put_back).failed()
    assert put_back.ledger.read_bytes() == before
    assert restore_ledger(put_back).code == 0


def test_restore_uses_the_policy_anchor_if_it_is_newer(put_back: Any, tmp_path: Path) -> None:
    # An older anchor, given by hand, must not overwrite the newer one and forget what it knows.
    newest = Head.read(put_back.anchor)
    older = tmp_path / "older.json"
    older.write_bytes(verify(put_back.ledger).history.head(put_back.key).to_bytes())
    assert Head.read(older).sequence < newest.sequence
    assert restore_ledger(put_back, "--anchor", str(older)).code == 0
    expected = {events.from_json(event): count for event, count in newest.charged}
    assert verify(put_back.ledger, anchor=newest).history.count_total_charges() == expected


@pytest.mark.parametrize(("typed", "confirmed"), [("y\n", True), ("n\n", False), ("", False)])
def test_confirm_date_opens_the_period_after_a_clock_jump(
    site_with_history: Any, typed: str, confirmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Far(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2099, 7, 1, tzinfo=tz)

    monkeypatch.setattr("fedtune.privacy.ledger.history.datetime", Far)
    warning = "charges count for the year of"
    assert warning in " ".join(run_command("ledger", "spent", str(site_with_history.ledger)).out.split())
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    outcome = run_command("ledger", "confirm-date", "--policy", str(site_with_history.site_toml))
    assert "clock says 2099-07-01 00:00 UTC" in " ".join(outcome.out.split())
    assert outcome.code == (0 if confirmed else 1)
    assert ("the date was not confirmed" in outcome.err) is not confirmed
    assert (
        warning in " ".join(run_command("ledger", "spent", str(site_with_history.ledger)).out.split())
    ) is not confirmed
    confirmation = "a person at the site confirmed the date"
    assert (confirmation in run_command("ledger", "show", str(site_with_history.ledger)).out) is confirmed


def test_displayed_epsilons_are_rounded_up() -> None:
    assert [format_epsilon(epsilon) for epsilon in (1.0001, 2.0, math.inf)] == ["1.001", "2.000", "unbounded"]
    factors = {0.0: "1.00", 0.5: "1.65", 2.999: "20.1", 6.0: "404", 19.0: "178,482,301", 50.0: "10^22"}
    for epsilon, shown in factors.items():
        assert format_factor(epsilon) == shown
        assert epsilon <= math.log(float(shown.replace("10^", "1e").replace(",", ""))) + 1e-12

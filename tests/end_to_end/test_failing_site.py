"""A site whose training fails: it is reported, nothing of why leaves it, and the others go on."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.virtual_site as participants
import fedtune.sites.work as site_work
from fedtune.model import Adapter

pytestmark = pytest.mark.nightly

CANARY = "patient-4711-has-hepatitis"


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make training of the given (site, round) pairs raise with the canary in the text."""
    train_round = site_work.train_round

    def patch(*fails: tuple[str, int]) -> None:
        def train(model: Any, adapter: Adapter, examples: Any, work: Any, **rest: Any) -> Adapter:
            if (work.site, work.round) in fails:
                raise ValueError(f"cannot tokenise {CANARY}")
            return train_round(model, adapter, examples, work, **rest)

        monkeypatch.setattr(site_work, "train_round", train)

    return patch


def test_the_run_goes_on_without_the_site_and_without_a_word_of_why(
    fail: Callable[..., None], everything_sent: list[bytes], command: Any, tiny: Any, tmp_path: Path, result_of: Any
) -> None:
    fail(("site-2", 1))
    outcome, folder = command("simulate", *tiny(into=tmp_path)), tmp_path / "run"
    assert outcome.code == 0
    assert "site-2: site_error" in outcome.out
    assert CANARY not in outcome.out + outcome.err
    result = result_of(folder)
    assert [entry["sites"] for entry in result["rounds"]] == [["site-1"], ["site-1", "site-2"]]
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{"site-2": "site_error"}, {}]
    # The round was charged before it failed.
    assert result["privacy"]["sites"]["site-2"]["steps"] == 4
    offers, introductions, replies, nods = 2, 2, 4, 2
    assert len(everything_sent) == introductions + offers + replies + nods
    sent = b"".join(everything_sent)
    assert b"site_error" in sent
    for word in (CANARY, "patient", "ValueError", "Traceback", "tokenise"):
        assert word.encode() not in sent
    log = (folder / "log.txt").read_text()
    assert f"cannot tokenise {CANARY}" in log
    assert "Traceback" in log
    for shown in ("run.json", "report.json", "report.html"):
        assert CANARY not in (folder / shown).read_text()


def test_neither_records_nor_names_of_files_are_in_any_message(
    everything_sent: list[bytes], command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The canary is in every record, in the name of their file, and in the folder with ledger, key and policy.
    private = tmp_path / CANARY
    private.mkdir()
    records = private / f"{CANARY}.jsonl"
    rows = [{"text": f"{CANARY} asked where card {number} is", "label": "card_arrival"} for number in range(60)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_round = site_work.train_round

    def train(model: Any, adapter: Adapter, examples: Any, work: Any, **rest: Any) -> Adapter:
        if work.site == "site-2":
            raise OSError(errno.EIO, f"cannot read {rows[0]}", str(records))
        return train_round(model, adapter, examples, work, **rest)

    monkeypatch.setattr(site_work, "train_round", train)
    where = (f"data.train_file={records}", "data.train_fraction=1.0", f"runtime.sites_dir={private}/sites")
    outcome = command("simulate", *tiny(*where, into=tmp_path))
    assert outcome.code == 0, outcome.err
    assert (private / "sites" / "site-1" / "ledger.db").exists()
    sent = b"".join(everything_sent)
    assert b"site_error" in sent
    assert b"site_key" in sent
    for word in (CANARY, "hepatitis", "card_arrival", "where card", str(tmp_path), "ledger.db"):
        assert word.encode() not in sent, word
    assert CANARY in (tmp_path / "run" / "log.txt").read_text()


def test_too_few_sites_end_the_run_with_a_checkpoint(
    fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch, command: Any, tiny: Any, tmp_path: Path, result_of: Any
) -> None:
    fail(("site-2", 2))
    outcome = command("simulate", *tiny("federation.min_sites=2", "federation.spare_rounds=1", into=tmp_path))
    folder = tmp_path / "run"
    assert outcome.code == 1
    assert outcome.message.startswith("round 2: 1 of 2 sites sent an update, and federation.min_sites = 2 are needed")
    assert "(site-2: site_error)" in outcome.message
    assert CANARY not in outcome.out + outcome.err
    early = result_of(folder)  # what may have been charged is on record though the run did not end well
    assert early["final"]["metrics"] == {}
    assert {(spent["steps"], spent["upper_bound"]) for spent in early["privacy"]["sites"].values()} == {(4, True)}
    monkeypatch.undo()
    assert command("simulate", f"resume={folder}").code == 0
    steps = {site: spent["steps"] for site, spent in result_of(folder)["privacy"]["sites"].items()}
    assert steps == {"site-1": 4, "site-2": 6}


def test_a_site_that_always_fails_is_charged_for_every_round(
    fail: Callable[..., None], simulate: Any, tmp_path: Path, result_of: Any
) -> None:
    fail(("site-1", 1), ("site-1", 2))
    spent = result_of(simulate(into=tmp_path))["privacy"]["sites"]["site-1"]
    assert (spent["steps"], spent["upper_bound"]) == (4, False)


def test_a_site_whose_ledger_cannot_be_read_counts_as_silent(
    simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result_of: Any
) -> None:
    # Not even a receipt comes, so that the lead must assume every round was charged.
    open_site = participants.Participants.site

    def broken(self: Any, index: int) -> Any:
        if index == 1:
            raise OSError(f"disk of {CANARY} is gone")
        return open_site(self, index)

    monkeypatch.setattr(participants.Participants, "site", broken)
    folder = simulate(into=tmp_path)
    result = result_of(folder)
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{"site-2": "site_error"}] * 2
    spent = result["privacy"]["sites"]
    assert (spent["site-1"]["steps"], spent["site-1"]["upper_bound"]) == (4, False)
    assert (spent["site-2"]["steps"], spent["site-2"]["upper_bound"]) == (4, True)
    assert CANARY in (folder / "log.txt").read_text()

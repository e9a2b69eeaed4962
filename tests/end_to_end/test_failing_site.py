"""A site whose training fails: it is reported, nothing of why leaves it, and the others go on."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.work as site_work

from ..conftest import command, fail_where, result_of, tiny

pytestmark = pytest.mark.nightly

CANARY = "patient-4711-has-hepatitis"


def test_the_run_goes_on_without_the_site_and_no_word_of_why_nor_of_records_or_files_leaves(
    everything_sent: list[bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    # The canary is in every record, in the name of their file, and in the folder with ledger, key and policy.
    private = tmp_path / CANARY
    private.mkdir()
    records = private / f"{CANARY}.jsonl"
    rows = [{"text": f"{CANARY} asked where card {number} is", "label": "card_arrival"} for number in range(60)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = (f"data.train_file={records}", "data.train_fraction=1.0", f"runtime.sites_dir={private}/sites")

    def fails(model: Any, adapter: Any, examples: Any, work: Any, **_: Any) -> bool:
        return bool((work.site, work.round) == ("site-2", 1))

    fail_where(monkeypatch, site_work, "train_round", fails, OSError(errno.EIO, f"cannot read {CANARY}", str(records)))
    outcome, folder = command("simulate", *tiny(*where, into=tmp_path)), tmp_path / "run"
    assert "site-2: site_error" in outcome.printed
    assert CANARY not in outcome.out + outcome.err
    result = result_of(folder)
    assert [entry["sites"] for entry in result["rounds"]] == [["site-1"], ["site-1", "site-2"]]
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{"site-2": "site_error"}, {}]
    assert result["privacy"]["sites"]["site-2"]["steps"] == 4, "the round was charged before it failed"
    assert (private / "sites" / "site-1" / "ledger.db").exists()
    offers, introductions, replies, nods = 2, 2, 4, 2
    assert len(everything_sent) == introductions + offers + replies + nods
    sent = b"".join(everything_sent)
    assert b"site_error" in sent
    assert b"site_key" in sent
    words = (CANARY, "patient", "OSError", "Traceback", "card_arrival", "where card", str(tmp_path), "ledger.db")
    for word in words:
        assert word.encode() not in sent, word
    log = (folder / "log.txt").read_text()
    assert f"cannot read {CANARY}" in log
    assert "Traceback" in log
    for shown in ("run.json", "report.json", "report.html"):
        assert "hepatitis asked" not in (folder / shown).read_text()

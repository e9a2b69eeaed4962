"""A site whose ledger is not in order trains nothing and says only that; the others do not wait for it.

In which ways it may be broken: tests/privacy/test_ledger_file.py, test_verify.py and test_rollback.py.
"""

import shutil
import sqlite3
from typing import Any

import pytest

from fedtune.privacy.ledger import store
from fedtune.runs.results import site_charge


def test_a_ledger_that_can_only_be_read(
    federation: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a disk that was mounted read-only.  File modes would not stop a test that root runs.
    made = federation(num_rounds=2)
    state = made.run_until(1)
    connect = sqlite3.connect

    def read_only(path: Any, **settings: Any) -> sqlite3.Connection:
        if path == made.ledger_path("site-2"):
            return connect(f"{path.as_uri()}?mode=ro", uri=True, **settings)
        return connect(path, **settings)

    monkeypatch.setattr(store.sqlite3, "connect", read_only)
    after = made.run(state)
    assert after.rounds[-1].failed_sites == {"site-2": "site_error"}
    assert made.trained[-2:] == ["site-1", "site-3"]
    assert "attempt to write a readonly database" in caplog.text
    charge = site_charge(after, "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == (1, False), "its receipt can be read"
    monkeypatch.undo()
    assert [event.kind for event in made.events("site-2")][2:] == ["plan", "reserve", "commit"]


def test_a_ledger_that_was_put_back_is_found_out_by_the_leads_receipt(federation: Any) -> None:
    made = federation(num_rounds=3)
    path = made.ledger_path("site-2")
    state = made.run_until(1)
    backup = path.with_suffix(".backup")
    shutil.copy(path, backup)
    state = made.run_until(2, state)
    shutil.copy(backup, path)
    after = made.run(state)
    assert after.rounds[-1].failed_sites == {"site-2": "ledger_behind_receipt"}
    assert made.trained[-2:] == ["site-1", "site-3"]
    assert after.receipts["site-2"] == state.receipts["site-2"], "what the site says now is not believed"
    charge = site_charge(after, "site-2", made.plan)
    assert (charge.rounds, charge.upper_bound) == (3, True)

"""A site whose ledger is gone does not begin a new one unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deploy.services.site_state import SiteState
from fedtune.spec import RunError


def test_another_ledger_than_before_is_refused(tmp_path: Path) -> None:
    state = SiteState.of(tmp_path)
    assert not state.has_served()
    state.check_ledger("first")
    assert state.has_served()
    SiteState.of(tmp_path).check_ledger("first")
    with pytest.raises(RunError, match=r"served ledger first before, and now there is ledger second: put the old one"):
        SiteState.of(tmp_path).check_ledger("second")
    SiteState.of(tmp_path).check_ledger("first")

"""Consistency checks between a run's result, its sites' ledgers and the lead's receipts."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from fedtune.config import read_saved_config
from fedtune.federation.bfloat16 import add_difference
from fedtune.federation.lead import Checkpoints
from fedtune.privacy.ledger import store
from fedtune.privacy.release import Difference, Receipt, Update

from .federation import Federation
from .site_folder import SiteFolder


def check_books(federation: Federation, run: str, *, uncounted: Any = None, averaged: bool = True) -> None:
    """Check that no update was lost or counted twice, and that the reported charges match the ledgers.

    `uncounted`: site -> rounds with a committed update that arrived too late.
    """
    if averaged:
        _check_average(federation, run)
    result = federation.result(run)
    receipts = json.loads((federation.lead_kit / "receipts.json").read_bytes())
    for name, spent in result["privacy"]["sites"].items():
        site = federation.sites[name]
        events = site.events(run)
        reserved = [(e.round, e.attempt) for e in events if e.kind.value == "reserve"]
        committed = [e.round for e in events if e.kind.value == "commit"]
        counted = [round["round"] for round in result["rounds"] if name in round["sites"]]
        assert len(set(reserved)) == len(reserved)
        assert len(set(committed)) == len(committed), f"{name} committed a round twice"
        assert not Counter(committed) - Counter({round: 1 for round, _ in reserved})
        assert Counter(committed) - Counter(counted) == Counter((uncounted or {}).get(name, ())), name
        assert not Counter(counted) - Counter(committed), f"{name} is counted in a round that it never committed"
        assert (spent["upper_bound"], spent["rounds"]) == (False, len(reserved)), name
        if receipts[name]["run"].rpartition("-")[0] == run:
            assert receipts[name]["charged_rounds"] == len(reserved), name
        receipt = Receipt.from_json(receipts[name])
        assert (receipt.has_valid_signature(), receipt.site_key) == (True, site.site_key)
        assert receipt.sequence <= len(site.verified().events)


def check_full_run(federation: Any, run: str, *, rounds: int = 2, charged: Any = None, averaged: bool = True) -> None:
    """Check that all sites took part in all rounds of a run and were charged once per round, or as given."""
    check_books(federation, run, averaged=averaged)
    result, names = federation.result(run), list(federation.sites)
    assert [entry["sites"] for entry in result["rounds"]] == [names] * rounds
    charges = {name: spent["rounds"] for name, spent in result["privacy"]["sites"].items()}
    assert charges == (charged or dict.fromkeys(names, rounds))


def _check_average(federation: Federation, run: str) -> None:
    """Check that the run's adapter is the mean of the last round's updates.

    The updates are read from the sites' ledgers; all sites have the same declared size, and so the same weight.
    """
    sites = federation.result(run)["rounds"][-1]["sites"]
    updates = [_read_last_update(federation.sites[name], run) for name in sites]
    assert updates
    before, after = read_adapter(federation, run, back=1), read_adapter(federation, run)
    ends = []
    for update in updates:
        assert isinstance(update.tensors, Difference)
        end = add_difference(before, update.tensors)
        assert any((value != before[name]).any() for name, value in end.items())
        ends.append(end)
    for name, value in after.items():
        np.testing.assert_allclose(value, np.mean([end[name].astype(np.float64) for end in ends], axis=0), atol=1e-6)


def read_adapter(federation: Federation, run: str, *, back: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Return the newest aggregated adapter of a run, or an earlier adapter, under the tensor names of updates."""
    tensors = load_file(sorted((federation.run_folder(run) / "checkpoints").glob("round-*.safetensors"))[-1 - back])
    return {name.removeprefix("adapter/"): value for name, value in tensors.items() if name.startswith("adapter/")}


def check_same_adapter(federation: Federation, name: str, simulated_folder: Path, *, tolerance: float) -> None:
    """Check that the adapters of a real run and a simulation are equal up to a tolerance per value."""
    config = read_saved_config(simulated_folder)
    expected = Checkpoints(simulated_folder / "checkpoints", config.digest()).load().adapter.tensors
    actual = read_adapter(federation, name)
    assert list(actual) == list(expected)
    assert any(np.abs(value).max() > 1e-4 for value in actual.values())
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=tolerance)


def _read_last_update(site: SiteFolder, run: str) -> Update:
    with store.open_for_reading(site.ledger) as file:
        replies = store.read_replies(file)
    (reply,) = (reply for name, _, reply in replies if name.rpartition("-")[0] == run)
    return Update.from_bytes(reply)

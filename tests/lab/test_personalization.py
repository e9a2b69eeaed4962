"""Personalized adapters: split of the records, early stopping, and the note next to the ledger."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.lab.personalization import MIN_RECORDS, Parts, _Fit, record_personalization
from fedtune.model.adapter import Adapter
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.spec import DataError, RunError

from ..sites.conftest import make_letters


def make_records(count: int, **fields: Any) -> list[Record]:
    kinds = ("invoice", "praise")
    return [Record({"text": f"a letter, number {n}", "label": kinds[n % 2], **fields}) for n in range(count)]


def check_parts_are_disjoint(parts: Parts, field: str = "text") -> list[set[str]]:
    """Return the values of each part, and check that the parts are disjoint."""
    parts_seen = [{record.fields[field] for record in part} for part in (parts.training, parts.choosing, parts.scored)]
    assert sum(map(len, parts_seen)) == len(set.union(*parts_seen))
    return parts_seen


def test_held_out_records_select_and_score_the_personalized_adapter() -> None:
    records = make_records(200)
    parts = Parts.split(SiteRecords(records[:120], records[120:]), key=b"key", unit="record")
    assert (parts.training, parts.seen) == (records[:120], False)
    _, choosing, scored = check_parts_are_disjoint(parts)
    assert choosing | scored == {record.fields["text"] for record in records[120:]}


def test_split_without_held_out_records_is_by_user() -> None:
    parts = Parts.split(SiteRecords(make_records(300), []), key=b"key", unit="record")
    assert parts.seen
    assert sum(map(len, check_parts_are_disjoint(parts))) == 300
    records = [record for user in range(60) for record in make_records(5, user=f"u{user}")]
    assert (
        sum(map(len, check_parts_are_disjoint(Parts.split(SiteRecords(records, []), key=b"key", unit="user"), "user")))
        == 60
    )
    with pytest.raises(DataError, match=f"must be at least {MIN_RECORDS}"):
        Parts.split(SiteRecords(make_records(30), []), key=b"key", unit="record")


def fit_of(config: RunConfig, texts: list[str], labels: list[str]) -> _Fit:
    records = [Record({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    shared = RunModel(LoadedModel(config, declared_size=len(records), trains=False), config)
    examples = shared.make_site_examples(shared.tokenize_records(records))
    training, choosing = np.split(np.arange(len(records)), [len(records) * 3 // 4])
    return _Fit(shared, examples, training, choosing)


def find_best_passes(fit: _Fit) -> tuple[int, str]:
    """Return the best number of passes, and the digest of the resulting adapter."""
    passes = fit.fit_best_adapter(fit._shared.initial_adapter, what="")
    return passes, Adapter.from_task_model(fit._shared.model).digest()


def test_personalization_stops_early_on_validation_records() -> None:
    fit = fit_of(make_letters(), ["the same words"] * 80, ["invoice", "praise"] * 40)
    passes = find_best_passes(fit)
    assert find_best_passes(fit) == passes, "nothing is drawn anew"
    assert passes[0] > 0, "two of three labels occur, which is worth learning"
    contrary = fit_of(make_letters(), ["the same words"] * 80, ["invoice"] * 60 + ["praise"] * 20)
    start = contrary._shared.initial_adapter.digest()
    assert find_best_passes(contrary) == (0, start), "what is learned does not hold elsewhere"


def test_personalization_note_contains_only_run_and_day(tmp_path: Path) -> None:
    for run in ("first", "second"):
        record_personalization(tmp_path, run=run, day="2026-11-26")
    notes = [{"run": run, "made": "2026-11-26"} for run in ("first", "second")]
    assert json.loads((tmp_path / "own_adapters.json").read_text()) == notes
    (tmp_path / "own_adapters.json").write_text("[")
    with pytest.raises(RunError, match="cannot be read: restore the file from a backup"):
        record_personalization(tmp_path, run="third", day="2026-11-26")

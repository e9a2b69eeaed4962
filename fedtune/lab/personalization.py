"""Personalized adapters: a run's final adapter, fine-tuned on a site's records without noise.

A personalized adapter needs no noise and no budget because it never leaves its site.  Nothing derived from it may leave
the site either: its folder is marked as private to the site, and `SavedAdapter.read` rejects it as the start of a run.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.codec import read_regular_file
from fedtune.config import RunConfig, format_config_yaml
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.data.partition import split_heldout
from fedtune.evaluation.scoring import enter_evaluation_mode
from fedtune.federation.run_folder import RunFolder
from fedtune.model.adapter import Adapter
from fedtune.model.adapter_files import LABEL
from fedtune.privacy.durable import write_durably
from fedtune.privacy.mechanism import Unit
from fedtune.report.page.render import render_personalized_label
from fedtune.sites.shared_model import LoadedModel, Progress, RunModel, ignore_progress
from fedtune.spec import DataError, RunError
from fedtune.tasks.saved import SavedAdapter, replace_folder, save_task_model
from fedtune.training.examples import IndexArray, SiteExamples
from fedtune.training.local import set_mean_gradient
from fedtune.training.optimizer import make_optimizer, set_learning_rate

MIN_RECORDS = 10  # minimum size of each part
NOTE = "own_adapters.json"
"""File next to the ledger with the runs and dates of personalized adapters; outside of the ledger's hash chain."""
_HELD_OUT = 0.3
_BATCH = 32
_RATES = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Learning-rate schedule, as factors of the run's learning rates without noise.  The run's rates suit batches of
hundreds of records; with `_BATCH` records, the shared adapters of four banks improved only at the last two factors."""
_MAX_PASSES = 10
_CARD = """\
# Private to {site}: no guarantee

![Private to {site}, without a guarantee]({label})

This adapter was trained on the records of {site} **without noise**, from the final adapter of the run {run}.
No differential privacy protects those records: anyone who has this folder may learn about them.

- Keep it at {site}. Do not send it to the federation's lead or to anybody else.
- fedtune starts no run from it. `fedtune export` writes it only with `--private`.
- When a record is deleted at {site}, train the adapter again: the new one replaces this one.

Made by `fedtune personalize` or `fedtune site personalize` on {day}.
"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A site's records, split into training, validation and test records."""

    training: list[Record]  # training records of the personalized adapter
    choosing: list[Record]  # validation records for the learning rate and early stopping
    scored: list[Record]  # test records
    seen: bool  # whether the run trained on `choosing` and `scored`, because it held out no records

    @classmethod
    def split(cls, records: SiteRecords, *, key: bytes, unit: Unit) -> Parts:
        """Split the run's held-out records into two halves; without held-out records, split 30 % of all records.

        Args:
            records: the records of the site.
            key: the site's secret key; a keyed hash of each record (of its user, for unit "user") selects the part.
            unit: the privacy unit; the records of a unit are never split between parts.

        Raises:
            DataError: a part has fewer than `MIN_RECORDS` records.
        """
        training, held, seen = records.training, records.heldout, not records.heldout
        if seen:
            training, held = split_heldout(training, fraction=_HELD_OUT, key=key + b" held out", unit=unit)
        choosing, scored = split_heldout(held, fraction=0.5, key=key + b" scored", unit=unit)
        for name, part in {"training": training, "choosing": choosing, "scored": scored}.items():
            if len(part) < MIN_RECORDS:
                bound = f"must be at least {MIN_RECORDS} for a personalized adapter: use more records of the site"
                raise DataError(f"records for {name}", str(len(part)), bound)
        return cls(training=training, choosing=choosing, scored=scored, seen=seen)


def personalize(
    config: RunConfig,
    adapter: Path,
    parts: Parts,
    *,
    site: str,
    into: Path,
    alone: Path,
    beside_ledger: Path,
    lenient: bool = False,
    progress: Progress = ignore_progress,
) -> int:
    """Train a site's personalized adapter, and write it to a folder that is marked as private to the site.

    Guarantee: none for this site's records against anyone who sees the result.  The run's guarantee still covers the
    records of other sites, because this is post-processing of the run's adapter.  Nothing is charged, and the ledger is
    not changed.

    Args:
        config: the configuration of the run, with the site's own files.
        adapter: the folder of the run's final adapter.
        parts: the records of the site.
        site: the name of the site.
        into: the folder to write; existing content is replaced.
        alone: the folder for a local baseline, trained from the run's starting point without the federation.
        beside_ledger: the folder of the site's ledger, where `NOTE` records the personalized adapter.
        lenient: whether to skip failing records, as a real site does.
        progress: callback for the progress of training.

    Returns:
        The number of epochs over the training records; 0 if the run's own adapter was best.

    Raises:
        ConfigError: the model or the adapter cannot be loaded.
        RunError: `NOTE` is damaged.
    """
    saved = SavedAdapter.read(adapter, model=config.model)
    _read_personalizations(beside_ledger / NOTE)  # fail before hours of training if the file is damaged
    loaded = LoadedModel(config, declared_size=len(parts.training), trains=False, progress=progress)
    shared = RunModel(loaded, config, progress=progress)
    examples = shared.make_site_examples(shared.tokenize_records([*parts.training, *parts.choosing], lenient=lenient))
    if loaded.keeps_states:
        examples.cache_frozen_states(shared.model, folder=loaded.states_folder)
    examples.cache_reference(shared.model)
    training, choosing = np.split(np.arange(len(examples)), [len(parts.training)])
    fit = _Fit(shared, examples, training, choosing)
    fit.fit_best_adapter(shared.first_adapter(), what=f"{site}: training alone")
    save_task_model(shared.model, alone, private_to=site)
    saved.load_into(shared.model)
    start = Adapter.from_task_model(shared.model)
    passes = fit.fit_best_adapter(start, what=f"{site}: training its personalized adapter")
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    # Record it first, so that no folder can exist without an entry.
    record_personalization(beside_ledger, run=config.run_id(), day=day)
    with replace_folder(into) as made:
        folder = RunFolder(made)
        save_task_model(shared.model, folder.adapter, private_to=site)
        folder.config.write_bytes(format_config_yaml(config))
        card = _CARD.format(site=site, run=config.name, day=day, label=LABEL)
        label = render_personalized_label(site, config.name)
        for place in (folder.path, folder.adapter):
            (place / "README.md").write_text(card, encoding="utf-8")
            (place / LABEL).write_text(label, encoding="utf-8")
    return passes


def record_personalization(folder: Path, *, run: str, day: str) -> None:
    """Append a personalized adapter to `NOTE`.

    Raises:
        RunError: the existing file is damaged.
    """
    made = [*_read_personalizations(folder / NOTE), {"run": run, "made": day}]
    write_durably(folder / NOTE, json.dumps(made, indent=1).encode() + b"\n")


def _read_personalizations(path: Path) -> list[Any]:
    try:
        made = json.loads(read_regular_file(path).decode()) if path.exists() else []
    except (OSError, ValueError):
        made = None
    if not isinstance(made, list):
        raise RunError(f"{path} cannot be read: restore the file from a backup, or move it away")
    return made


class _Fit:
    """Noise-free training with early stopping and a learning-rate schedule, both by the loss on validation examples."""

    def __init__(self, shared: RunModel, examples: SiteExamples, training: IndexArray, choosing: IndexArray) -> None:
        self._shared, self._examples, self._training, self._choosing = shared, examples, training, choosing

    def fit_best_adapter(self, start: Adapter, *, what: str) -> int:
        """Train, keep the adapter with the lowest mean validation loss in the model, and return its number of epochs.

        Epochs use the highest learning rate as long as the loss decreases, then continue from the best adapter at the
        next lower rate.  The order of the records is the same for every start.  If no epoch lowers the loss, the
        initial adapter is kept.
        """
        shared, order = self._shared, np.random.default_rng(self._shared.config.seed)
        start.load_into(shared.model)
        best, passes, lowest = start, 0, self._compute_selection_loss()
        for rate in _RATES:
            best.load_into(shared.model)
            optimizer = make_optimizer(shared.model.list_active_parameters(), shared.config.training, clipped=False)
            set_learning_rate(optimizer, rate)
            while passes < _MAX_PASSES:
                shared.progress(what, passes, _MAX_PASSES)
                self._train_pass(optimizer, order.permutation(self._training))
                if not (loss := self._compute_selection_loss()) < lowest:
                    break
                best, passes, lowest = Adapter.from_task_model(shared.model), passes + 1, loss
        best.load_into(shared.model)
        return passes

    def _train_pass(self, optimizer: torch.optim.Optimizer, records: IndexArray) -> None:
        """Train for one epoch, in batches of `_BATCH` records."""
        model = self._shared.model
        for batch in np.array_split(records, max(1, len(records) // _BATCH)):
            set_mean_gradient(model, self._examples, self._examples.cut(batch), count=len(batch))
            for parameter in model.list_active_parameters().values():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # a single record must not abort training
            optimizer.step()

    def _compute_selection_loss(self) -> float:
        """Compute the mean of the finite losses on the validation records; infinite if no loss is finite."""
        with enter_evaluation_mode(self._shared.model):
            losses = [self._shared.model.losses(batch) for batch in self._examples.cut(self._choosing)]
        found = torch.cat(losses).double()
        finite = found[torch.isfinite(found)]
        return float(finite.mean()) if len(finite) else math.inf

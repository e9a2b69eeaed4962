"""Warnings about unusual data of a run, printed before the run begins.

Only the lead's own records and the records of simulated sites are inspected. Figures about simulated sites' records are
shown only to the local user; no privacy guarantee covers them, and runs with real sites do not have them.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.data.bad_rows import SkippedRows
from fedtune.data.load import Partitioned, is_far_from_declared
from fedtune.data.partition import count_units
from fedtune.data.records import resolve_file
from fedtune.formatting import pluralize
from fedtune.sites.run_records import LeadRecords, RunRecords, count_texts_by_role, list_identifying_roles
from fedtune.sites.shared_model import LeadData, RunModel
from fedtune.spec import ConfigError, DataError
from fedtune.version import find_shipped_folders

TRAINED_ON = "The run trained on records of this file: these scores do not measure performance on new records."
_MAX_NAMED = 3
_SMALL_RUN = 5_000  # privacy units of all sites together
_COMPARED: dict[tuple[object, ...], bool] = {}  # cache by run and file state, because sweeps repeat the check


def list_lead_data_warnings(config: RunConfig, *, validation: LeadData | None, test: LeadData | None) -> Iterator[str]:
    """Yield warnings about the lead's own records."""
    for key, data in (("validation", validation), ("test", test)):
        if data is not None:
            yield from _warn_of_skipped_rows(data.left_out, f"data.{key}_file")
    if test is None:
        or_part = "" if config.runtime.kind == "deployment" else " or data.test_fraction"
        yield f"no test records, so the run has no final score: set data.test_file{or_part}"
        return
    if config.data.test_file is not None and is_training_file(config, config.data.test_file):
        yield "data.test_file has the same records as data.train_file: its scores do not measure generalization"
    if "label" in config.bound_task.roles:
        labels = {record.fields["label"] for record in test.records}
        if len(labels) == 1:
            yield f"all test records have the label {labels.pop()!r}: scores on them cannot tell models apart"


def list_signal_warnings(config: RunConfig, model: RunModel) -> Iterator[str]:
    """Yield a warning if a small run's labels cannot be predicted from the lead's own records.

    Larger runs are not measured: their sites have enough records to adapt the embeddings themselves.
    """
    if sum(config.declared_sizes().values()) > _SMALL_RUN:
        return
    signal = model.measure_label_signal()
    if signal is not None and not signal.is_visible:
        yield (
            f"the run may learn nothing: on the lead's {signal.records:,} records, a linear classifier on the base "
            f"model's embeddings predicts {signal.accuracy:.3f} of the labels (leave-one-out), and the most frequent "
            f"label alone {signal.baseline:.3f} (docs/own_data.md). Nothing has been charged yet"
        )


def check_decision_scores(config: RunConfig) -> None:
    """Check that the scores for early stopping, checkpoint selection or a search are not computed on a site's records.

    Raises:
        ConfigError: the lead has no validation file, or the file contains records that simulated sites train on.
    """
    try:
        config.data.require_decisive_validation()
    except ConfigError as error:
        raise error.under("data") from None
    file = config.data.validation_file
    if file is not None and is_training_file(config, file):
        bound = (
            "has the same records as data.train_file: its scores select the result, and no noise "
            "protects the sites' records"
        )
        raise ConfigError("data.validation_file", file, bound)


def scores_may_decide(config: RunConfig) -> bool:
    """Return True if the run's validation scores may drive early stopping, checkpoint selection or a search."""
    try:
        check_decision_scores(config)
    except ConfigError:
        return False
    return True


def _warn_of_skipped_rows(rows: SkippedRows, key: str) -> Iterator[str]:
    if rows.count:
        yield f"{key}: {rows}; the run skips them"


def is_training_file(config: RunConfig, file: str) -> bool:
    """Return True if a file is known to contain training records of the run's simulated sites."""
    names = [name for name, key in RunRecords(config).files().items() if key == "data.train_file"]
    try:
        paths = {name: resolve_file(name, find_shipped_folders(), key="data.train_file") for name in (*names, file)}
        if any(_have_same_bytes(paths[name], paths[file]) for name in names):
            return True
        about = (config.digest(), *((path, path.stat().st_mtime_ns) for path in paths.values()))
        if about not in _COMPARED:
            _COMPARED[about] = _has_training_records(config, names, file)
        return _COMPARED[about]
    except DataError:  # the file was moved, or its error is reported where it is read
        return False


def _have_same_bytes(file: Path, other: Path) -> bool:
    return file.samefile(other) or (file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False))


def _has_training_records(config: RunConfig, names: Sequence[str], file: str) -> bool:
    """Return True if the texts of `file` are a subset of the texts in the other files, or vice versa."""
    records = [record for name in names for record in LeadRecords.read(name, config, key="data.train_file").records]
    ours = count_texts_by_role(records)
    theirs = count_texts_by_role(LeadRecords.read(file, config, key="data.train_file").records)
    # Only roles with many distinct texts, because few values coincide by chance.
    trained = [ours[role].keys() for role in list_identifying_roles(ours) if len(ours[role]) > len(records) / 2]
    return any(other.keys() <= texts or texts <= other.keys() for texts in trained for other in theirs.values())


def list_site_data_warnings(config: RunConfig, dealt: Partitioned) -> Iterator[str]:
    """Yield warnings about the records of simulated sites."""
    yield from _warn_of_skipped_rows(dealt.left_out, "data.train_file")
    if dealt.shared_users:
        yield (
            f"{pluralize(dealt.shared_users, 'user id')} occur at several sites, and each counts as a different "
            "person at each site: if an id is one person, that person's epsilons add up over the sites"
        )
    far = list(_iter_sites_far_from_declared(config, dealt))
    if far:
        more = f", and {pluralize(len(far) - _MAX_NAMED, 'more site')}" if len(far) > _MAX_NAMED else ""
        yield (
            f"data.declared_sizes differs greatly from the number of training {config.privacy.unit}s: "
            f"{', '.join(far[:_MAX_NAMED])}{more}. Training divides by the declared size: too "
            "large a size makes steps too small, and vice versa"
        )


def _iter_sites_far_from_declared(config: RunConfig, dealt: Partitioned) -> Iterator[str]:
    declared = config.declared_sizes()
    for name, records in zip(config.federation.names, dealt.sites, strict=True):
        true = count_units(records.training, config.privacy.unit)
        if name in declared and is_far_from_declared(true, declared[name]):
            yield f"{name} declares {declared[name]:,}, but has {true:,}"

"""The lineage of a run: privacy loss inherited from its start adapter, its base model and synthetic records.

An entry (`LineageEntry`) has the fields of `provenance.start_adapter` in run.json: the digest of an adapter, the data
set and the privacy loss of its training, and the previous entry as `start_adapter`. An exported model stores its
entry in config.json. Both files are untrusted, so a run's settings, which sites sign, state what its start adapter
inherits (`privacy.start_epsilon`, `start_delta` and `start_unit`); reports read only these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedtune.codec import read_regular_file
from fedtune.formatting import convert_infinite_to_none, total
from fedtune.model.spec import ModelSpec
from fedtune.model.unsupported_models import OWED

UNKNOWN = "unknown"  # value of a field without a source
SPENT = ("from", "dataset", "unit", "delta", "epsilon")
_UNKNOWN_ENTRY: Mapping[str, Any] = dict.fromkeys(("digest", *SPENT), UNKNOWN)
_MOST = 24  # maximum length of a lineage; transformers rejects a more deeply nested config.json

ANOTHER_MACHINE = 1e-6  # relative tolerance: the FFT that computes an epsilon rounds differently on other processors

LineageEntry = Mapping[str, Any]

PRIVATE_BASES: Mapping[str, LineageEntry] = {
    "vaultgemma": {
        "digest": "vaultgemma",
        "from": "VaultGemma 1B",
        "dataset": "its pre-training corpus",
        "unit": "sequence of 1,024 tokens",
        "delta": 1.1e-10,
        "epsilon": 2.0,
    }
}
"""Privacy loss of privately pre-trained base models by `model_type`, as claimed by their authors and not verified here.
VaultGemma: arXiv 2510.15001, section 1."""


def read_base_lineage(model: ModelSpec) -> list[LineageEntry]:
    """Read the lineage of a base model from its config.json, newest entry first.

    A damaged file or entry counts as an unknown privacy loss. Private pre-training is the oldest entry
    (`PRIVATE_BASES`). A model without lineage has no entries.
    """
    if model.is_built_in:
        return []
    from fedtune.model.source import find_model_folder  # the hub's client takes a second to import

    try:
        fields = json.loads(read_regular_file(find_model_folder(model) / "config.json"))
    except FileNotFoundError:  # a GGUF file has none
        return []
    except (OSError, ValueError, RecursionError):
        fields = {OWED: None}
    entries = (list(walk_lineage(fields[OWED])) or [_UNKNOWN_ENTRY]) if OWED in fields else []
    stated = PRIVATE_BASES.get(str(fields.get("model_type"))) if isinstance(fields, dict) else None
    return [*entries, dict(stated)] if stated and stated not in entries else entries


def read_texts_lineage(entries: object) -> Iterator[LineageEntry]:
    """Yield the lineage entries of the runs in a card of synthetic texts.  A malformed run counts as unknown.

    Args:
        entries: the unvalidated list of runs in the card.
    """
    runs: list[Any] = entries if isinstance(entries, list) and entries else [None]
    for run in runs:
        try:
            start = run["start"] and {**run["start"], "from": run["start"]["run"]}
            about = {"digest": run["adapter_digest"], "from": run["run"], "dataset": UNKNOWN, "start_adapter": start}
            yield from walk_lineage({**run, **about})
        except (TypeError, KeyError):
            yield _UNKNOWN_ENTRY


def walk_lineage(entry: object) -> Iterator[LineageEntry]:
    """Yield the entries of a lineage, newest first.  Public stages are skipped; a malformed entry counts as unknown.

    Args:
        entry: the newest entry, unvalidated; None if there is no lineage.
    """
    while entry is not None:
        fields = entry if isinstance(entry, Mapping) else {}
        entry = fields.get("start_adapter")
        match fields:
            case {"public": True}:
                continue
            case {"digest": str(), "from": str(), "dataset": str(), "unit": str(), "delta": float(delta)} if (
                0 <= delta < 1
                and isinstance(epsilon := fields.get("epsilon", UNKNOWN), float | None)
                and 0 <= (epsilon or 0.0) < math.inf
            ):
                yield {key: fields[key] for key in ("digest", *SPENT)}
            case _:
                yield _UNKNOWN_ENTRY


def build_lineage(debts: Iterable[LineageEntry]) -> dict[str, Any] | None:
    """Link entries (newest first) to one nested lineage, or return None without entries.

    Equal entries are included once, because reusing a released adapter has no additional privacy cost. Pre-training is
    last, so that a run is the newest entry if there is one.
    """
    entries: dict[Any, LineageEntry] = {}
    for entry in debts:
        entries.setdefault((entry["digest"], entry["delta"], entry["epsilon"]), entry)
    kept, chain = sorted(entries.values(), key=_is_pre_training), None
    if len(kept) > _MOST:
        kept[_MOST - 1 :] = [_UNKNOWN_ENTRY]
    for entry in reversed(kept):
        chain = {**entry, "start_adapter": chain} if chain else dict(entry)
    return chain


def _is_pre_training(entry: Mapping[str, Any]) -> bool:
    stated = PRIVATE_BASES.get(str(entry.get("digest")), {})
    return bool(stated) and all(entry.get(key) == stated[key] for key in ("unit", "delta", "epsilon"))


def is_counted(start: Mapping[str, Any]) -> bool:
    """Return False for public stages and for pre-training as stated in `PRIVATE_BASES`: both count for no run.

    The records of pre-training are not those of a site, and most bases state no privacy loss for it.
    """
    return start.get("public") is not True and not _is_pre_training(start)


def sum_start_losses(noted: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Sum epsilon and delta over an adapter and all adapters in its lineage that count (`is_counted`).

    All of them may have been trained on the same record or person, so the losses add up. None has the meaning given in
    `StartAdapter`.
    """
    epsilon, delta = (
        convert_infinite_to_none(value) if isinstance(value := noted.get(key), float) else None
        for key in ("epsilon", "delta")
    )
    before = noted.get("start_adapter")
    while isinstance(before, Mapping) and not is_counted(before):
        before = before.get("start_adapter")
    if not isinstance(before, Mapping):
        return epsilon, delta
    more, also = sum_start_losses(before)
    if delta is None or also is None or before.get("unit") != noted.get("unit"):
        return None, None
    return None if epsilon is None or more is None else total((epsilon, more)), total((delta, also))

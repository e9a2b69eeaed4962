"""What a run builds on owes to earlier records: the adapter that it begins in, its base, and synthetic records.

A debt has the fields of `provenance.start_adapter` in run.json: the digest of an adapter, what its training spent on
which data, and as its own `start_adapter` the debt before it.  A model that an export writes has one in config.json.
Anybody may have written either file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedtune.model.spec import ModelSpec
from fedtune.model.unsupported_models import OWED

UNKNOWN = "unknown"  # for what no file says
SPENT = ("from", "dataset", "unit", "delta", "epsilon")
_NOBODY_KNOWS: Mapping[str, Any] = dict.fromkeys(("digest", *SPENT), UNKNOWN)
_MOST = 24  # in one chain: of a config.json that is deeper than a model's, nothing is loaded

Debt = Mapping[str, Any]

PRIVATE_BASES: Mapping[str, Debt] = {
    "vaultgemma": {
        "digest": "vaultgemma",
        "from": "VaultGemma 1B",
        "dataset": "its pre-training corpus",
        "unit": "sequence of 1,024 tokens",
        "delta": 1.1e-10,
        "epsilon": 2.0,
    }
}
"""What the pre-training of private base models spent, by `model_type`, as their authors state it.  VaultGemma: arXiv
2510.15001, section 1.  The statement is the authors'; nothing here verifies it."""


def read_base_lineage(model: ModelSpec) -> list[Debt]:
    """What the training of a base owes, newest first; empty: its config.json says nothing of it.

    What is damaged there tells of a debt that nobody knows.
    """
    if model.is_built_in:
        return []
    from fedtune.model.source import find_model_folder  # the hub's client takes a second to import

    try:
        fields = json.loads((find_model_folder(model) / "config.json").read_bytes())
    except FileNotFoundError:  # beside a GGUF file
        return []
    except (OSError, ValueError, RecursionError):
        fields = {OWED: None}
    own = (list(walk_lineage(fields[OWED])) or [_NOBODY_KNOWS]) if OWED in fields else []
    stated = PRIVATE_BASES.get(str(fields.get("model_type"))) if isinstance(fields, dict) else None
    return [*own, dict(stated)] if stated and stated not in own else own


def read_texts_lineage(told: object) -> Iterator[Debt]:
    """What texts owe, by the runs behind them as a card tells these; one that has another form is unknown."""
    runs: list[Any] = told if isinstance(told, list) and told else [None]
    for run in runs:
        try:
            start = run["start"] and {**run["start"], "from": run["start"]["run"]}
            about = {"digest": run["adapter_digest"], "from": run["run"], "dataset": UNKNOWN, "start_adapter": start}
            yield from walk_lineage({**run, **about})
        except (TypeError, KeyError):
            yield _NOBODY_KNOWS


def walk_lineage(told: object) -> Iterator[Debt]:
    """A debt and those before it, newest first, without what is public; one that has another form is unknown."""
    while told is not None:
        found = told if isinstance(told, Mapping) else {}
        told = found.get("start_adapter")
        match found:
            case {"public": True}:
                continue
            case {"digest": str(), "from": str(), "dataset": str(), "unit": str(), "delta": float(delta)} if (
                0 <= delta < 1
                and isinstance(epsilon := found.get("epsilon", UNKNOWN), float | None)
                and 0 <= (epsilon or 0.0) < math.inf
            ):
                yield {key: found[key] for key in ("digest", *SPENT)}
            case _:
                yield _NOBODY_KNOWS


def build_lineage(debts: Iterable[Debt]) -> dict[str, Any] | None:
    """Debts as one, the newest first, and each once: an adapter owes what it released once, however often it is used.

    None: there are none.
    """
    found: dict[Any, Debt] = {}
    for one in debts:
        found.setdefault((one["digest"], one["delta"], one["epsilon"]), one)
    kept, whole = [*found.values()], None
    if len(kept) > _MOST:
        kept[_MOST - 1 :] = [_NOBODY_KNOWS]
    for one in reversed(kept):
        whole = {**one, "start_adapter": whole} if whole else dict(one)
    return whole

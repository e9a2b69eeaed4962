"""A verified ledger as plain JSON, in keys that scripts may rely on; infinity is null."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.ledger.chain import Event
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.spending import Spending, divergence_left, runs_left, spending
from fedtune.privacy.ledger.verify import Verified

SCHEMA_VERSION = 1


def figures_of(verified: Verified) -> Spending:
    """What was spent by now, and never before the newest event."""
    return spending(verified.history, verified.history.now())


def epsilon_left(history: History) -> float:
    """Epsilon that the lifetime cap leaves for new runs, beside all that is set aside."""
    assert history.policy is not None
    return divergence_left(history, history.policy, history.now())


def reference_runs_left(history: History) -> int | None:
    """How many runs like the policy's reference still fit the lifetime cap; None: nothing bounds them."""
    assert history.policy is not None
    return runs_left(history, history.policy, history.policy.budget.reference_event(), history.now())


def identity_json(path: Path, verified: Verified) -> dict[str, Any]:
    """Which ledger this is."""
    opened = verified.history.opened
    return {
        "schema_version": SCHEMA_VERSION,
        "path": str(path),
        "ledger": opened.ledger,
        "site": opened.site,
        "population": opened.population,
        "unit": opened.unit,
        "neighbouring_relation": NEIGHBOURING_RELATION.name.lower(),
        "delta": opened.delta,
        "site_key": verified.site_key,
        "num_events": len(verified.events),
    }


def event_json(event: Event) -> dict[str, Any]:
    """One event, with every value that its hash covers."""
    return asdict(event)


def verification_json(verified: Verified) -> dict[str, Any]:
    """What `verify` found; it raises for a ledger that does not fit."""
    return {
        "unchanged": True,
        "head": verified.hash,
        "key_expected": verified.key_expected,
        "rollback_excluded": verified.rollback_excluded,
        "anchor_sequence": verified.anchor_sequence if verified.rollback_excluded else None,
    }


def spending_json(verified: Verified, figures: Spending) -> dict[str, Any]:
    """The figures of `spent`."""
    fields = {key: finite(value) for key, value in asdict(figures).items() if key != "runs"}
    return {
        **fields,
        "guarantee": has_guarantee(figures),
        "epsilon_left": finite(epsilon_left(verified.history)),
        "reference_runs_left": reference_runs_left(verified.history),
        "restored": len(verified.history.restored),
        "policies": [{"time": time, "max_epsilon": finite(cap)} for time, cap in verified.history.policies],
        "runs": [
            {key: finite(value) for key, value in asdict(run).items()}
            | {"seeded_noise": verified.history.runs[run.run].proposal.seeded_noise}
            for run in figures.runs
        ],
    }


def has_guarantee(figures: Spending) -> bool:
    """Whether anything at all can be promised for what was released."""
    return not figures.seeded and math.isfinite(figures.epsilon)


def finite(value: Any) -> Any:
    """JSON has no infinity: null says that nothing bounds the number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_text(data: dict[str, Any]) -> str:
    """The JSON that commands print and write."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"

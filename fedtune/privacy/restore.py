"""After a backup was put back: what an anchor knows and the ledger lacks is charged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from dp_accounting import DpEvent

from fedtune.privacy import events
from fedtune.privacy.chain import Head
from fedtune.privacy.event_store import EventStore
from fedtune.privacy.notes import Restored


def charge_gap(store: EventStore, anchor: Head) -> Counter[DpEvent]:
    """Note in the ledger what `anchor` says was charged and the ledger lacks; returns it.

    Raises:
        RunError: the anchor is of another ledger.
    """
    store.require_same_ledger(anchor)
    with store.transaction():
        if store.history.holds(anchor):
            return Counter()
        # What lies behind the last event that both know was charged on another branch, and makes up for nothing.
        both = [n for n, hash in anchor.path if n <= store.history.length and store.history.hashes[n - 1] == hash]
        shared = max(both, default=0)
        gap = Counter({events.from_json(data): count for data, count in anchor.charged})
        gap -= store.history.charged(up_to=shared)
        restored = Restored(
            shared=shared,
            end=anchor.sequence,
            path=frozenset(anchor.path + anchor.made_up),
            gap=gap,
            runs=dict(Counter(dict(anchor.runs)) - store.history.rounds_up_to(shared)),
            seeded=anchor.seeded,
            frozen=anchor.frozen,
        )
        doubt = store.history.in_doubt
        cleared = doubt is None or store.knows(doubt.sequence, doubt.head, besides=restored)
        store.note("restored", **replace(restored, clears_doubt=cleared).to_json())
    return gap

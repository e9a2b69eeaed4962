"""A ledger whose owner writes into it what it likes, and signs that: whoever verifies it must not fall over."""

import json
import sqlite3
from dataclasses import asdict
from typing import Any, cast

from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import EVENT, START, Event, canonical
from fedtune.privacy.ledger.verify import verify
from fedtune.report import from_ledger
from fedtune.spec import ConfigError, RunError

from . import seeds
from .mutations import mutated_json
from .target import Target


def _events() -> list[dict[str, Any]]:
    """Those of the valid ledger, as plain data."""
    seeds.ledger()
    events = verify(seeds.folder() / "seed" / "ledger.db").events
    return cast(list[dict[str, Any]], json.loads(json.dumps([asdict(event) for event in events])))


def _signed_anew(data: bytes) -> None:
    rows, before = list[list[object]](), START
    try:
        for fields in json.loads(data):
            event = Event(**{**fields, "hash": "", "signature": ""})
            before = event.hash_after(before)
            values = {**asdict(event), "detail": canonical(event.detail).decode(), "hash": before}
            values["signature"] = seeds.key(2).sign(EVENT, before.encode())
            rows.append([*values.values()])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # nothing that the file could hold
    path = seeds.folder() / "signed_anew.db"
    path.unlink(missing_ok=True)
    file = sqlite3.connect(path, isolation_level=None)
    try:
        file.execute("PRAGMA synchronous = OFF")
        file.execute("PRAGMA application_id = 0x66656474")
        for statement in store.SCHEMA:
            file.execute(statement)
        for row in rows:
            file.execute(f"INSERT INTO events VALUES ({', '.join('?' * len(row))})", row)
        with store.reading(seeds.folder() / "seed" / "ledger.db") as valid:
            file.executemany("INSERT INTO replies VALUES (?, ?, ?)", store.stored_replies(valid))
    except (sqlite3.Error, OverflowError, UnicodeEncodeError):
        return
    finally:
        file.close()
    verify(path)
    from_ledger.build(path)


TARGETS = (Target("ledger signed anew", lambda: mutated_json(_events()), _signed_anew, (ConfigError, RunError)),)

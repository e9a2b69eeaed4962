"""What the commands under `fedtune ledger` do.  Whatever they show was verified first; readers write nothing."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.cli import ledger_tables
from fedtune.cli.plain_words import counted, epsilon_text, event_text, mechanism_text
from fedtune.privacy import accountant, events, filter
from fedtune.privacy.chain import Event, Head, canonical
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, is_public_key
from fedtune.privacy.ledger import Ledger
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.spending import Spending, spending
from fedtune.privacy.verify import Verified, verify
from fedtune.spec import ConfigError, RunError

SCHEMA_VERSION = 1


def show(options: argparse.Namespace) -> None:
    """The events."""
    if options.last is not None and options.last < 1:
        raise ConfigError("--last", options.last, "must be at least 1")
    path = ledger_file(options.path)
    verified = verify(path)
    chosen = verified.events[-options.last :] if options.last else verified.events
    if options.json:
        print_json({**_identity(path, verified), "events": [_event_json(event) for event in chosen]})
    else:
        ledger_tables.show_events(Console(), path, verified, chosen)


def spent(options: argparse.Namespace) -> None:
    """The figures."""
    path = ledger_file(options.path)
    verified = verify(path)
    figures = figures_of(verified)
    if options.json:
        print_json({**_identity(path, verified), **spending_json(verified, figures)})
    else:
        ledger_tables.show_spending(Console(), path, verified, figures)


def check(options: argparse.Namespace) -> None:
    """`verify`."""
    path, verified = _verified(options)
    if options.json:
        print_json({**_identity(path, verified), **_verification_json(verified)})
    else:
        ledger_tables.show_verified(Console(), path, verified)


def export(options: argparse.Namespace) -> None:
    """Everything that the ledger says, but for the stored replies."""
    path, verified = _verified(options)
    newest = verified.events[-1]
    whole = {
        **_identity(path, verified),
        "verification": _verification_json(verified),
        "head": {
            "sequence": newest.sequence,
            "hash": newest.hash,
            "time": newest.time,
            "signature": newest.signature,
            "site_key": verified.site_key,
        },
        "spending": spending_json(verified, figures_of(verified)),
        "events": [_event_json(event) for event in verified.events],
    }
    if options.output is None:
        print_json(whole)
        return
    output = Path(options.output)
    if output.exists():  # it might be the ledger or the key
        raise ConfigError("--output", options.output, "exists already; choose a new file")
    _write("--output", output, _json_bytes(whole))
    Console().print(f"{counted(len(verified.events), 'event')} of {path} written to {output}", soft_wrap=True)


def anchor(options: argparse.Namespace) -> None:
    """Write the newest head, unless the anchor that is already there shows that the ledger was put back."""
    path, output = ledger_file(options.path), Path(options.output)
    key = SigningKey.load(Path(options.key))
    before = Head.read(output) if output.exists() else None
    verified = verify(path, anchor=before, site_key=key.public)
    _write("--output", output, head_of(verified, key).to_bytes())
    newest = verified.events[-1].sequence
    Console().print(f"{output} now vouches for {path} up to event {newest}", soft_wrap=True)


def restore(options: argparse.Namespace) -> None:
    """Charge what a backup lacks, and bring the policy's anchor up to it."""
    path, ledger, own_anchor = _own_ledger(options)
    if options.anchor is None and own_anchor is None:
        raise ConfigError("--anchor", None, "is required, since the policy names no anchor")
    source = Path(options.anchor) if options.anchor else own_anchor
    assert source is not None
    newest = Head.read(source)
    console = Console()
    try:
        verify(path, anchor=newest)
        console.print(f"{path} lacks nothing that {source} knows. Nothing was charged.", soft_wrap=True)
        return
    except RunError:
        verify(path)  # an older ledger is what we expect here; a changed one is not
    opened = ledger()
    gap = opened.charge_gap(newest)
    if own_anchor is not None:
        _write("anchor", own_anchor, opened.head().to_bytes())
    parts = [mechanism_text(event, count) for event, count in events.grouped(gap).items()]
    console.print(
        f"{path} lacked events up to number {newest.sequence}. Charged now, in one sum:\n"
        + "\n".join(f"  {part}" for part in parts or ["nothing: no round was charged in what is lost"]),
        soft_wrap=True,
    )
    figures = opened.spending()
    console.print(
        f"Spent now: epsilon {epsilon_text(figures.epsilon)} of {ledger_tables.cap_text(figures.max_epsilon)}. "
        "What is lost besides: the runs' names, refusals and stored replies of the missing events."
    )


def freeze(options: argparse.Namespace) -> None:
    """End all training on a population."""
    if not options.why.strip():
        raise ConfigError("--why", options.why, "must say why; the ledger keeps it")
    path, ledger, _ = _own_ledger(options)
    verify(path)
    ledger(anchored=True).freeze(options.why)
    Console().print(f"{path} is frozen: this population takes part in nothing any more.", soft_wrap=True)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "show": show,
    "spent": spent,
    "verify": check,
    "export": export,
    "anchor": anchor,
    "restore": restore,
    "freeze": freeze,
}

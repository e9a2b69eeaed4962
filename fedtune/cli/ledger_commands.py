"""What the commands under `fedtune ledger` do.  Whatever they show was verified first; readers write nothing."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from dp_accounting import DpEvent
from rich.console import Console

from fedtune.cli import ledger_json, ledger_tables
from fedtune.cli.plain_words import cap_text, counted, mechanism_text
from fedtune.deploy.files import act_as_owner
from fedtune.privacy import events
from fedtune.privacy.accountant import epsilon_text
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, check_public_key
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.decisions import Ledger
from fedtune.privacy.ledger.verify import Verified, verify
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, RunError


def show(options: argparse.Namespace) -> None:
    """Events, oldest first."""
    if options.last is not None and options.last < 1:
        raise ConfigError("--last", options.last, "must be at least 1")
    path = ledger_file(options.path)
    verified = verify(path)
    chosen = verified.events[-options.last :] if options.last else verified.events
    if options.json:
        shown = [ledger_json.event_json(event) for event in chosen]
        _print_json({**ledger_json.identity_json(path, verified), "events": shown})
    else:
        ledger_tables.show_events(Console(), path, verified, chosen)


def spent(options: argparse.Namespace) -> None:
    """What was spent, and what is left."""
    path = ledger_file(options.path)
    verified = verify(path)
    figures = ledger_json.figures_of(verified)
    if options.json:
        _print_json({**ledger_json.identity_json(path, verified), **ledger_json.spending_json(verified, figures)})
    else:
        ledger_tables.show_spending(Console(), path, verified, figures)


def check(options: argparse.Namespace) -> None:
    """`verify`: what was checked, or the error that says what does not fit."""
    path, verified = _verified(options)
    if options.json:
        _print_json({**ledger_json.identity_json(path, verified), **ledger_json.verification_json(verified)})
    else:
        ledger_tables.show_verified(Console(), path, verified)


def export(options: argparse.Namespace) -> None:
    """Everything that the ledger says, but for the stored replies, as one JSON."""
    if options.output is not None and Path(options.output).exists():  # it might be the ledger, or the key
        raise ConfigError("--output", options.output, "exists already; choose a new file")
    path, verified = _verified(options)
    whole = {
        **ledger_json.identity_json(path, verified),
        "head": ledger_json.event_json(verified.events[-1]),
        "verification": ledger_json.verification_json(verified),
        "spending": ledger_json.spending_json(verified, ledger_json.figures_of(verified)),
        "events": [ledger_json.event_json(event) for event in verified.events],
    }
    if options.output is None:
        _print_json(whole)
        return
    _write(Path(options.output), ledger_json.to_text(whole).encode())
    _say(f"{counted(len(verified.events), 'event')} of {path} written to {options.output}")


def anchor(options: argparse.Namespace) -> None:
    """Write the newest head, unless the anchor that is already there shows that the ledger was put back."""
    path, output = ledger_file(options.path), Path(options.output)
    key = SigningKey.load(Path(options.key))
    before = Head.read(output) if output.exists() else None
    verified = verify(path, anchor=before, site_key=key.public)
    _write(output, verified.history.head(key).to_bytes())
    _say(f"{output} now vouches for {path} up to event {len(verified.events)}. Keep it on another disk or machine.")


def restore(options: argparse.Namespace) -> None:
    """Charge what a backup lacks, and bring the policy's anchor up to it."""
    site = _site(options)
    sources = [Path(options.anchor)] if options.anchor else []
    if site.anchor is not None and (site.anchor.is_file() or not sources):
        sources.append(site.anchor)
    if not sources:
        raise ConfigError("--anchor", None, "is required, since the policy names no anchor")
    verify(site.ledger)  # an older ledger is what is expected here; one that was changed is not
    ledger = Ledger(site.ledger, site.policy, SigningKey.load(site.site_key))
    # The policy's own anchor is the one that knows most, whichever was given.
    anchors = sorted((Head.read(source) for source in sources), key=lambda head: head.sequence, reverse=True)
    gap: Counter[DpEvent] = Counter()
    lacking = [anchor for anchor in anchors if not ledger.history.holds(anchor)]
    for anchor in lacking:
        gap += ledger.charge_gap(anchor)
    if lacking and site.anchor is not None:
        _write(site.anchor, ledger.head().to_bytes())
    if (doubt := ledger.history.in_doubt) is not None:
        raise RunError(
            f"{site.ledger} is still in doubt: a receipt of this site's own knows event {doubt.sequence}, which is "
            "missing, and no anchor given knows it; find a newer anchor, or freeze the population"
        )
    if not lacking:
        _say(f"{site.ledger} lacks nothing that {' and '.join(map(str, sources))} know. Nothing was charged.")
        return
    parts = [mechanism_text(event, count) for event, count in events.grouped(gap).items()]
    last = max(anchor.sequence for anchor in lacking)
    _say(f"{site.ledger} lacked events up to number {last} of the lost ledger. Charged now, as one sum:")
    _say("\n".join(f"  {part}" for part in parts or ["nothing: no round was charged in what is lost"]))
    figures = ledger.spending()
    _say(f"Spent now: epsilon {epsilon_text(figures.epsilon)} of {cap_text(figures.max_epsilon)}.")
    _say("Lost for good: the missing events' runs, refusals and stored replies. Their cost is not.")


def freeze(options: argparse.Namespace) -> None:
    """End all training on a population."""
    if not options.why.strip():
        raise ConfigError("--why", options.why, "must say why; the ledger keeps it")
    site = _site(options)
    verify(site.ledger)
    site.open().freeze(options.why)
    _say(f"{site.ledger} is frozen: this population takes part in nothing any more.")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "show": show,
    "spent": spent,
    "verify": check,
    "export": export,
    "anchor": anchor,
    "restore": restore,
    "freeze": freeze,
}


def ledger_file(name: str) -> Path:
    """The ledger that a person means by PATH.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (path / "ledger.db").is_file():
        return path / "ledger.db"
    found = ", ".join(str(file) for file in sorted(path.glob("sites/*/ledger.db")))
    bound = f"must be one of {found}" if found else "must be a ledger.db, or a folder with one"
    raise ConfigError("ledger", name, bound)


def _site(options: argparse.Namespace) -> SiteFiles:
    """The site whose existing ledger is about to be changed."""
    files = SiteFiles.of(Path(options.policy))
    # A ledger that does not exist would be made, and a copy beside the real one would be of no use.
    given = files.ledger if options.path is None else ledger_file(options.path)
    if not files.ledger.is_file() or not given.samefile(files.ledger):
        raise ConfigError("ledger", str(given), f"must be the policy's own ledger, {files.ledger}")
    act_as_owner(files.site_key, files.ledger)
    SigningKey.load(files.site_key)  # a missing one would be made
    return files


def _verified(options: argparse.Namespace) -> tuple[Path, Verified]:
    if options.site_key is not None:
        check_public_key("--site-key", options.site_key)
    path = ledger_file(options.path)
    anchor = None if options.anchor is None else Head.read(Path(options.anchor))
    return path, verify(path, anchor=anchor, site_key=options.site_key)


def _write(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data)
    except OSError as error:
        raise ConfigError("output", str(path), f"must be a file that can be written ({error.strerror})") from None


def _print_json(data: dict[str, object]) -> None:
    sys.stdout.write(ledger_json.to_text(data))


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)

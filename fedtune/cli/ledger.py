"""Read and verify a site's ledger, the permanent record of all privacy spending on one population.

  fedtune ledger show ledger.db --last 20                 events: rounds, refusals, policy changes
  fedtune ledger spent ledger.db                          spent and remaining epsilon, in total and per run
  fedtune ledger verify ledger.db --anchor anchor.json    detect modification and rollback
  fedtune ledger export ledger.db --output ledger.json    complete export for an auditor
These commands do not change the ledger. PATH is the file, or a folder that contains a ledger.db.

  fedtune ledger anchor ledger.db --key site_key.pem --output anchor.json
  fedtune ledger restore --policy site.toml --anchor anchor.json
  fedtune ledger freeze --policy site.toml --why "consent withdrawn"
  fedtune ledger confirm-date --policy site.toml          after a clock change, or a long time without a request
docs/site_policy.md explains backups, anchors and the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedtune.cli.command import Argument, AsJson, Option, check_reason, command, group, print_answer
from fedtune.cli.plain_words import (
    convert_spending_to_json,
    describe_event,
    describe_policy_changes,
    explain_guarantee,
    render_page,
)
from fedtune.federation.run_folder import suggest_run_folders
from fedtune.formatting import convert_none_to_infinite, pluralize
from fedtune.ops.backup import RestoreResult, charge_missing_events, find_anchors
from fedtune.ops.files import act_as_owner
from fedtune.ops.kits.kit_file import read_signing_key
from fedtune.ops.services.site_state import lock_ledger
from fedtune.privacy import events, filter
from fedtune.privacy.accountant import format_epsilon, format_share
from fedtune.privacy.keys import parse_public_key
from fedtune.privacy.ledger.chain import Event, Head
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.run_acceptance import compute_spent_fraction
from fedtune.privacy.ledger.store import lock_anchor, resolve_link
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.site_files import SiteFiles
from fedtune.report.page.translations import load_catalog
from fedtune.show import budget_text
from fedtune.show.budget_text import describe_trust, format_cap, format_mechanism, format_rounded_down
from fedtune.show.lines import to_printable
from fedtune.show.terminal_tables import Section, print_json, require_confirmation, say, show, to_json_text, write_file
from fedtune.spec import ConfigError

if TYPE_CHECKING:  # it takes a while to import
    from fedtune.report.facts import Lifetime, LifetimeRun

app = group(__doc__)

_UNITS = {"record": "one record", "user": "one person with all of their records"}
LedgerPath = Annotated[str, Argument("PATH", help="a ledger.db, or a folder that contains one")]
PolicyFile = Annotated[Path, Option(metavar="FILE", help="the site's site.toml")]
AnchorFile = Annotated[Path | None, Option(metavar="FILE", help="an anchor file from another disk or machine")]
SiteKey = Annotated[str | None, Option(metavar="HEX", help="the site's public key, from a source you trust")]


@command(app, "list the events", name="show")
def show_events(
    path: LedgerPath,
    last: Annotated[int | None, Option(metavar="N", help="only the newest N events")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a ledger's events, oldest first: rounds, refusals, approvals, policy changes."""
    if last is not None and last < 1:
        raise ConfigError("--last", last, "must be at least 1")
    file, verified = _verify_ledger(path)
    chosen = verified.events[-last:] if last else verified.events
    figures = budget_text.convert_identity_to_json(file, verified) | {"events": chosen}
    section, heading = build_events_section(verified, chosen), format_identity(file, verified)
    print_answer(figures, [section], as_json=as_json, heading=heading)


@command(app, "show spent and remaining epsilon")
def spent(path: LedgerPath, as_json: AsJson = False) -> None:
    """Show a ledger's spending over its lifetime, in the current period and per run.

    The privacy filter's epsilon is valid even if runs were chosen adaptively, and the caps apply to it. The PLD epsilon
    is smaller, but proven only for each run separately. Every epsilon is rounded up.
    """
    from fedtune.report.from_ledger import compute_lifetime_budget  # slow to import

    file, verified = _verify_ledger(path)
    if as_json:
        print_json({**budget_text.convert_identity_to_json(file, verified), **convert_spending_to_json(verified)})
        return
    say(format_identity(file, verified), style="bold")
    print_spending(verified.history, compute_lifetime_budget(verified))


@command(app, "detect modification and rollback", name="verify")
def check(path: LedgerPath, anchor: AnchorFile = None, site_key: SiteKey = None, as_json: AsJson = False) -> None:
    """Verify that nobody without the site's key changed, deleted, inserted or reordered an event.

    With an anchor from another disk, also verify that no event is missing at the end. Exit code 1 if a check fails.
    """
    file, verified = _verify_ledger(path, anchor=anchor, site_key=site_key)
    figures, heading = budget_text.convert_identity_to_json(file, verified), format_identity(file, verified)
    figures |= budget_text.convert_verification_to_json(verified)
    print_answer(figures, build_verification_sections(verified), as_json=as_json, heading=heading)
    if not as_json:
        last = verified.events[-1]
        say(f"Newest event: {last.sequence}, {format_event_time(last)}, hash {last.hash}")


@command(app, "export everything as JSON")
def export(
    path: LedgerPath,
    anchor: AnchorFile = None,
    site_key: SiteKey = None,
    output: Annotated[Path | None, Option(metavar="FILE", help="a new file (default: print)")] = None,
) -> None:
    """Export a ledger's events, spending and verification to one JSON file."""
    if output is not None and output.exists():  # never overwrite the ledger or the key
        raise ConfigError("--output", str(output), "already exists: choose a new file")
    file, verified = _verify_ledger(path, anchor=anchor, site_key=site_key)
    proved = {"head": verified.events[-1], "verification": budget_text.convert_verification_to_json(verified)}
    told = {"spending": convert_spending_to_json(verified), "events": verified.events}
    whole = {**budget_text.convert_identity_to_json(file, verified), **proved, **told}
    if output is None:
        print_json(whole)
        return
    write_file(output, to_json_text(whole), option="--output")
    say(f"{pluralize(len(verified.events), 'event')} of {file} written to {output}")


@command(app, "write a signed anchor of the newest event", name="anchor")
def write_anchor(
    path: LedgerPath,
    key: Annotated[Path, Option(metavar="FILE", help="the site's private key: site_key.pem, or site.toml")],
    output: Annotated[Path, Option(metavar="FILE", help="the anchor file to write")],
) -> None:
    """Write a signed anchor with the head of the ledger's hash chain; keep it on another disk or machine.

    An existing anchor file is checked first: if the ledger does not contain its event, the ledger was rolled back.
    """
    file, own, output = find_ledger(path), read_signing_key(key), resolve_link(output)
    with lock_anchor(output):
        before = Head.read(output) if output.exists() else None
        verified = verify(file, anchor=before, site_key=own.public)
        write_file(output, verified.history.head(own).to_bytes(), option="--output")
    say(f"{output} now covers {file} up to event {len(verified.events)}. Keep it on another disk or machine.")


@command(app, "continue from a backup")
def restore(
    policy: PolicyFile,
    anchor: Annotated[
        Path | None, Option("the newest anchor (default: the anchor in the policy)", metavar="FILE")
    ] = None,
) -> None:
    """Charge a restored backup for the events that its anchor covers and the backup lacks.

    Stop training, copy the backup to the path in the policy, run this command, and start training again.
    """
    site = _open_own_site(policy)
    with lock_ledger(site.ledger), lock_anchor(site.anchor):
        anchors = find_anchors(site, anchor)
        made_up = charge_missing_events(site.ledger, site, anchors)
        if made_up.last is not None and site.anchor is not None:
            write_file(site.anchor, made_up.ledger.head().to_bytes(), option="anchor")
    made_up.require_no_missing_events()
    print_restored_charge(made_up, path=site.ledger, anchors=anchors)


@command(app, "end all training on a population")
def freeze(
    policy: PolicyFile, why: Annotated[str, Option(metavar="TEXT", help="the reason, stored in the ledger")]
) -> None:
    """Permanently exclude a ledger's population from all training. This cannot be undone.

    Earlier releases are not affected.
    """
    check_reason("--why", why)
    site = _open_own_site(policy)
    verify(site.ledger)
    site.open_ledger().freeze(why)
    say(f"{site.ledger} is frozen: all training on this population has ended permanently.")


@command(app, "confirm this machine's date", name="confirm-date")
def confirm_date(policy: PolicyFile, yes: Annotated[bool, Option("do not ask")] = False) -> None:
    """Start the budget period that contains this machine's date.

    A clock that is set forward would open a new period with a full budget. A site therefore opens only the next period
    automatically, and only if the server's time is in it; other periods, even earlier ones, require this command.
    Compare the date with a clock that neither this machine nor the federation controls.
    """
    site = _open_own_site(policy)
    history = verify(site.ledger).history
    clock = f"This machine's clock says {history.machine_clock:%Y-%m-%d %H:%M} UTC"
    say(f"{clock}; the ledger's newest event is from {history.last_time:%Y-%m-%d %H:%M} UTC. This cannot be undone.")
    if not yes:
        otherwise = "nothing was changed: the date was not confirmed"
        require_confirmation("Is this machine's date correct?", otherwise=otherwise)
    site.open_ledger().confirm_date()
    say("Recorded in the ledger.")


def find_ledger(name: str) -> Path:
    """Return the ledger file for the argument PATH, and act as the account that owns PATH.

    Raises:
        ConfigError: the path contains no ledger, or root cannot act as its owner.
    """
    act_as_owner(path := Path(name))
    for file in (path, path / "ledger.db"):
        if file.is_file():
            return file
    found = ", ".join(str(file) for file in sorted(path.glob("sites/*/ledger.db")))
    if not path.exists():
        raise ConfigError("path", name, f"no such file or folder{suggest_run_folders(path)}")
    bound = f"must be one of {found}" if found else "must be a ledger.db, or a folder with one"
    raise ConfigError("path", name, bound)


def _open_own_site(policy: Path) -> SiteFiles:
    files = SiteFiles.from_site_toml(policy)
    if not files.ledger.is_file():
        raise ConfigError("ledger", str(files.ledger), f"is missing: {policy} names this ledger")
    act_as_owner(files.site_key, files.ledger)
    return files


def _verify_ledger(
    path: str, *, anchor: Path | None = None, site_key: str | None = None
) -> tuple[Path, VerifiedLedger]:
    key, file = parse_public_key("--site-key", site_key), find_ledger(path)
    return file, verify(file, anchor=None if anchor is None else Head.read(anchor), site_key=key)


def format_identity(path: Path, verified: VerifiedLedger) -> str:
    """Format a ledger's site, population, number of events and newest event, on two lines."""
    opened, last = verified.history.opening, verified.events[-1]
    ledger = f"Ledger of site {to_printable(opened.site)}, population {to_printable(opened.population)}"
    return f"{ledger}\n{path}: {pluralize(last.sequence, 'event')}, newest {format_event_time(last)}"


def build_events_section(verified: VerifiedLedger, chosen: Sequence[Event]) -> Section:
    """Build the table of the selected events, one per row."""
    unit, runs = verified.history.opening.unit, verified.history.runs.items()
    own = {name: run.proposal.task for name, run in runs if not run.proposal.lead}
    changes, rows = describe_policy_changes(verified.events), []
    for event in chosen:
        when = (str(event.sequence), event.time[:16].replace("T", " "), event.kind.value)
        what = describe_event(event, own=own.get(event.run, "")) + changes.get(event.sequence, "")
        rows.append((*when, to_printable(event.run), str(event.round or ""), what))
    title = f"{len(chosen)} of {pluralize(len(verified.events), 'event')}"
    headings = ("no.", "time (UTC)", "kind", "run", "round", "description")
    noise = f"noise: in units of the largest change of a step's sum by one {unit}"
    notes = [f"rate: probability with which each {unit} joins a step; {noise}"]
    return Section(title, headings, rows, words={1, 2, 3, 5}, whole={2}, notes=notes)


def print_spending(history: History, figures: Lifetime) -> None:
    """Print a ledger's spending, with notes on restored backups and changed caps."""
    unit = history.opening.unit
    said = render_page(
        "spent",
        figures=figures,
        delta=history.delta,
        unit=_UNITS.get(unit, "one unit"),
        promised=explain_guarantee(unit, epsilon=figures.epsilon, delta=history.delta) if figures.epsilon else "",
    )
    say("\n" + said.pop("in a word"), style="" if figures.has_guarantee else "bold yellow")
    if figures.frozen:
        say("FROZEN: all training on this population has ended permanently.", style="bold")
    epsilons = {"filter": figures.epsilon, "PLD": figures.epsilon_pld, "RDP": figures.epsilon_rdp}
    rows = [(method, format_epsilon(epsilons[method]), meaning) for method, meaning in said.items()]
    title, headings = "Meaning of the figures for all events", ("method", "epsilon", "meaning")
    methods = Section(title, headings, rows, words={0, 2}, whole={0})
    budget, arrivals = _build_lifetime_section(history, figures), _build_arrivals_section(figures)
    show([budget, arrivals, methods, _build_runs_section(figures.runs, history)])
    if history.restored:
        lacked = "The figures for all events include the missing charges; the figures of single runs do not."
        say(f"Backups restored so far: {len(history.restored)}. {lacked}")
    caps = [cap for _, cap, _ in history.policies]
    if len(set(caps)) > 1:
        changes = ", then ".join(f"{format_cap(cap)} ({time[:10]})" for time, cap, _ in history.policies)
        say(f"The lifetime cap was changed: {changes}. The guarantee is strongest if the cap never changes.")
    if why := history.explain_pending_period():
        say(f"{why[0].upper()}{why[1:]}.")


def _build_lifetime_section(history: History, figures: Lifetime) -> Section:
    assert history.policy is not None
    charged = history.count_total_charges()
    share = compute_spent_fraction(history, charged, cap=history.cap)
    reserved = compute_spent_fraction(history, history.count_charges_and_reservations(history.now()), cap=history.cap)
    with_reserved = "charged, plus the reserves of open runs"
    period = f"charged this {figures.period} ({format_cap(history.policy.budget.max_epsilon_per_period)})"
    cap = "unbounded" if math.isinf(history.cap) else f"{history.cap:g}"
    fixed = format_epsilon(filter.compute_epsilon_conversion_term(history.order, history.delta))
    note = f"A fixed part of {fixed} is charged once, with the first noisy step."
    note += " Shares are relative to the rest of the cap."
    remaining = convert_none_to_infinite(figures.remaining_epsilon)
    room = filter.compute_max_divergence(history.cap, order=history.order, delta=history.delta)
    left = "" if figures.frozen or reserved is None or not room else f"{math.floor(remaining / room * 100)} %"
    runs = figures.reference_remaining_runs
    fits = "" if runs is None else f": {pluralize(runs, 'run')} like the policy's reference"
    fits = ": nothing, because it is frozen" if history.is_frozen else fits
    rows = (
        ("charged so far", format_epsilon(figures.epsilon), format_share(share)),
        (with_reserved, format_epsilon(figures.with_reserved), format_share(reserved)),
        ("cap", cap, "100 %" if share is not None else ""),
        (period, format_epsilon(figures.period_epsilon), ""),
        (f"left for new runs now{fits}", format_rounded_down(remaining), left),
    )
    title, headings = f"Lifetime budget of each {history.opening.unit}, by the filter", ("", "epsilon", "share of cap")
    return Section(title, headings, rows, notes=[] if share is None else [note])


def _build_arrivals_section(figures: Lifetime) -> Section:
    """Build the table of epsilon by time of arrival.  It is empty if all people have the same epsilon."""
    rows = []
    for one in figures.cohorts or ():
        left = format_rounded_down(convert_none_to_infinite(one.remaining_epsilon))
        spent = map(format_epsilon, (one.epsilon, one.with_reserved))
        rows.append((load_catalog("en").arrivals([one.people]).unescape(), *spent, left))
    headings = ("people", "charged", "with reserves\nof open runs", "left for new runs")
    note = "The cap applies to each row. The figures above are those of the most exposed row."
    return Section("By arrival", headings, rows, notes=[note] if rows else [])


def _build_runs_section(runs: Sequence[LifetimeRun], history: History) -> Section:
    title = "Each run alone (epsilon: PLD of what is charged; planned: PLD of its whole plan)"
    if not runs:
        return Section(title=title, notes=("No run has been accepted yet.",))
    rows, notes = [], []
    for run in runs:
        plan, decisions = history.runs[run.run].plan, history.decided[history.runs[run.run].proposal.digest()]
        state = [run.state, *(f"{one['what']} by {to_printable(one['by'])}" for one in decisions if one["by"])]
        state += ["NO GUARANTEE"] if run.seeded_noise or not plan.private else []
        rounds, noise, rate = f"{run.rounds}/{run.max_rounds}", f"{plan.accounted_noise:g}", f"{plan.sampling_rate:g}"
        epsilons = map(format_epsilon, (run.epsilon, run.planned_epsilon))
        rows.append((to_printable(run.run), "\n".join(state), rounds, noise, rate, *epsilons))
        if run.rounds and (by_trust := plan.compute_epsilons_by_trust(run.rounds)):
            notes.append(f"{to_printable(run.run)}: {describe_trust(by_trust)}.")
    headings = ("run", "state", "rounds", "noise", "rate", "epsilon", "planned")
    return Section(title=title, headings=headings, rows=rows, words={0, 1}, notes=notes)


def build_verification_sections(verified: VerifiedLedger) -> Iterator[Section]:
    """Yield the tables of passed and of skipped checks."""
    said = render_page("ledger_check", verified=verified)
    for part, title in (("checked", "Checked and correct:"), ("unchecked", "Not checked:")):
        yield Section(title=title, notes=[f"- {text}" for text in said[part].split("\n")] if part in said else ())


def print_restored_charge(made_up: RestoreResult, *, path: Path, anchors: Sequence[Path]) -> None:
    """Print a restored ledger's missing events and the charge for them."""
    if made_up.last is None:
        say(f"{path} has every event covered by {' and '.join(map(str, anchors))}. Nothing was charged.")
        return
    parts = [format_mechanism(event, count) for event, count in events.count_mechanisms(made_up.gap).items()]
    say(f"{path} lacked the lost ledger's events up to number {made_up.last}. Charged now, as one sum:")
    for part in parts or ["nothing: no round was charged in the lost part"]:
        say(f"  {part}")
    now = made_up.ledger.history
    say(f"Spent now: epsilon {format_epsilon(now.epsilon())} of {format_cap(now.cap)}.")
    say("Lost: runs, approvals, refusals and stored replies in the missing events. Not lost: costs, denials.")
    if (since := made_up.since) is not None:
        print_other_policy(since.caps[-1], time=since.time)


def print_other_policy(cap: float | None, *, time: str) -> None:
    """Print a warning that site.toml differs from the policy in force at `time`, whose lifetime cap was `cap`."""
    other = f"site.toml is not the policy that was in force on {time[:10]} (lifetime cap: {format_cap(cap)})"
    say(f"{other}. Compare the caps, the leads and all other keys before you start the site.")


def format_event_time(event: Event) -> str:
    """Format an event's UTC time, truncated to seconds."""
    return f"{event.time[:19].replace('T', ' ')} UTC"

"""Implementation of the `fedtune site` commands, imported after giving up root's rights and closing the model hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedtune.api.compose import compose_run
from fedtune.cli.command import answer
from fedtune.cli.finished_run import finished_run
from fedtune.cli.personalise import print_made
from fedtune.cli.plain_words import filled, reason_text
from fedtune.evaluation.bootstrap import FEWEST_UNITS
from fedtune.federation.run_folder import RunFolder
from fedtune.federation.verdict import Verdict, ask
from fedtune.lab.studies.comparison import Line, score_side_by_side
from fedtune.lab.studies.personalised import make
from fedtune.lab.studies.trials import Trial
from fedtune.model.spec import NO_ADAPTER
from fedtune.ops.doctor.check import REFUSED, SETTINGS, Check, exit_code_of
from fedtune.ops.doctor.examination import Examination
from fedtune.ops.files import person
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.kits.members import Member, Roster
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.accountant import epsilon_pld, epsilon_text
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import asked_and_allowed
from fedtune.show.budget_text import contribution, noise_words, trust_words
from fedtune.show.lines import fold, printable
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section, pairs, print_json, require_agreed, say, show
from fedtune.spec import ConfigError, FedtuneError, RefusedError, RunError, check_at_least
from fedtune.words import counted, dotted, spoken, spoken_start

_SHOWN_ABOVE = ("privacy", "federation", "runtime", "task")
"""Groups of settings that the proposal's own rows say already."""
_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME, _FOUND, _FIX = 8, 28, 11  # columns at which a check's name, what was found and what to do about it begin
_NARROWEST = 20
_MOST_TEXT = 1000
_MOST_REASON = 300


class AtSite:
    """Actions of a site's staff on runs that were requested, with the site's kit and policy."""

    def __init__(self, kit: Kit, site_toml: Path) -> None:
        self.kit, self.site_toml, self.files = kit, site_toml, kit.site_files(site_toml)

    @property
    def state(self) -> SiteState:
        return SiteState.of(self.kit.folder)

    def show_waiting(self, *, as_json: bool) -> None:
        """List the runs that wait for approval and their epsilon; null in JSON means no guarantee."""
        told, rows = [], []
        for pending in self.state.waiting():
            asked, since = pending.proposal, pending.since
            spent = {"epsilon": (epsilon := _epsilon(asked)), "delta": asked.plan.delta}
            about_run = {"run": asked.run, "digest": asked.digest(), "since": since, "dataset": asked.dataset}
            told.append({**about_run, "lead": asked.lead, **spent})
            about = (printable(asked.run), since[:10], printable(asked.dataset))
            rows.append((*about, _price(epsilon), spoken_start(asked.lead)))
        headings = ("run", "since", "data set", "epsilon", "asked by lead")
        section = Section(headings=headings, rows=rows, words=range(5), whole={0, 1})
        answer({"schema_version": SCHEMA_VERSION, "waiting": told}, [section], as_json=as_json)
        if not (rows or as_json):
            say("No run waits for approval.")

    def approve(self, run: str, *, yes: bool, by: str | None, ticket: str | None, reason: str | None) -> None:
        said, waiting = _decision(by, ticket, reason), self.state.waiting()
        asked = _chosen([pending.proposal for pending in waiting], run, "waits for approval")
        pending = next(pending for pending in waiting if pending.proposal == asked)
        verdict = ask(self.site_toml, asked, declared_sizes={})
        # Every other setting that the run's name stands for, whole: the end of a list may be what matters.
        settings = {key: value for key, value in json.loads(pending.settings).items() if key not in _SHOWN_ABOVE}
        rows = {"fedtune at the lead": printable(pending.software)} if pending.software else {}
        for key, value in dotted(settings):
            listed = f"{len(value)}: {', '.join(map(str, value))}" if isinstance(value, list) else value
            if value not in (None, [], ""):
                rows[key] = printable(listed, len(str(listed)))
        show([_price_and_plan(pending.proposal, verdict), pairs(rows)])
        if verdict.ledger == "in doubt":
            raise RunError(verdict.note)
        if not verdict.allowed:
            known = [(one.reason, asked_and_allowed(one.asked, one.allowed)) for one in verdict.broken]
            rules = "; ".join(reason_text(reason) + (f" ({numbers})" if numbers else "") for reason, numbers in known)
            raise RefusedError(f"policy or budget refuse this run: {rules}")
        if not yes:
            require_agreed("Let it start?", otherwise="not approved: the run still waits")
        self.files.open().approve(pending.proposal, **said)
        self.state.forget(pending.proposal)
        say("Approved, and noted in the ledger. It begins with the lead's next request.")

    def deny(self, run: str, reason: str, *, by: str | None, ticket: str | None) -> None:
        said, verified = _decision(by, ticket, reason), self.files.verified()
        history = verified.history if verified else History()
        begun = [one.proposal for one in history.runs.values() if one.is_open(history.clock)]
        waiting = [pending.proposal for pending in self.state.waiting()]
        asked = _chosen([*waiting, *begun], run, "waits for approval or has begun")
        self.files.open().deny(asked, **said)
        self.state.forget(asked)
        say("Denied, and noted in the ledger. The lead is told 'denied' when it asks again; the reason stays here.")
        if asked in begun:
            say("The run ends at this site: no further round is charged, and no reply of it leaves.")

    def show_members(self, path: Path, *, as_json: bool) -> None:
        trusted = dict(self.files.policy.trust.members)
        roster = Roster.read_signed(path, kit=self.kit)
        gone = "in [trust].members, and not in the federation: take it out"
        found = {name: (key, gone) for name, key in trusted.items()}
        found |= {one.site: (one.site_key, _state(one, trusted.get(one.site))) for one in roster.sites}
        found.pop(self.kit.site or "", None)
        members = [{"site": name, "site_key": key, "state": state} for name, (key, state) in found.items()]
        rows = [(name, state, spoken(key)) for name, (key, state) in found.items()]
        note = "Nothing is changed here. To sum with another site, compare its key with that site itself, not with "
        note += "the lead, and write it into [trust].members of site.toml."
        headings = ("site", "here", "site key by the roster")
        told = {"schema_version": SCHEMA_VERSION, "number": roster.number, "members": members}
        heading = f"Sites of {roster.federation}, by the lead's roster number {roster.number}:"
        section = Section(headings=headings, rows=rows, words=range(3), notes=[note])
        answer(told, [section], as_json=as_json, heading=heading)

    def score(self, run: str, *, by: str | None, smallest: int, as_json: bool) -> None:
        check_at_least("--smallest", smallest, FEWEST_UNITS)
        folder = self._kept(run)
        from fedtune.sites.real_site import site_records  # torch takes seconds to import

        config, adapter = finished_run(folder)
        if config.data.heldout_fraction == 0:
            bound = "held nothing out: score it on other records with fedtune evaluate FOLDER --data FILE"
            raise ConfigError("data.heldout_fraction", 0, bound)
        if not (records := site_records(config, self.files).heldout):
            raise ConfigError("data.heldout_fraction", config.data.heldout_fraction, "held out no record of this site")
        lines = [Line(name="tuned", kind="run", run=Trial(config=config, folder=folder))]
        runs = [(config, adapter)]
        compared = score_side_by_side(lines, runs, data=None, by=by, smallest=smallest, records=records)
        answer(compared.to_json(), compared.sections(), as_json=as_json)

    def personalise(self, run: str, *, as_json: bool) -> None:
        folder, files = self._kept(run), self.files
        config, adapter = finished_run(folder)
        from fedtune.sites.personal import Parts
        from fedtune.sites.real_site import site_records

        key, site = files.key().secret("own adapter"), files.policy.site
        parts = Parts.of(site_records(config, files), key=key, unit=config.privacy.unit)
        into, beside = self.kit.folder / f"private_to_{site}" / folder.name, files.ledger.parent
        own = partial(make, config, adapter, parts, site=site, into=into, beside_ledger=beside, lenient=True)
        print_made(lambda progress: {site: own(progress=progress)}, as_json=as_json)

    def _kept(self, run: str) -> Path:
        """Return the folder of a kept final adapter's run, given by name or path.

        Raises:
            ConfigError: the site keeps no such run.
        """
        kept = self.kit.folder / "adapters"
        for folder in (kept / run, Path(run)):
            if RunFolder(folder).config.is_file():
                return folder.resolve()  # "." and ".." have a name, too
        names = ", ".join(sorted(path.name for path in kept.glob("*"))) or "none"
        raise ConfigError("RUN", run, f'must be a run whose final adapter is kept (final_adapter = "keep"): {names}')


def _state(member: Member, trusted: str | None) -> str:
    """Describe whether the policy lists a roster's site with the same key, and what to do if not."""
    revoked = f"revoked {member.revoked[:10]}" if member.revoked else ""
    if trusted is None:
        return revoked or "not in [trust].members"
    if revoked:
        return f"in [trust].members, and {revoked}: take it out"
    if trusted != member.site_key:
        return "in [trust].members WITH ANOTHER KEY: call that site"
    return "in [trust].members, with this key"


def _decision(by: str | None, ticket: str | None, reason: str | None) -> dict[str, str]:
    """Validate the details of a decision, and return the fields to record in the ledger.

    Raises:
        ConfigError: a detail is not one short printable line.
    """
    by = by or person()
    for option, given in (("--by", by), ("--ticket", ticket), ("--reason", reason)):
        if given is not None and not (given.strip() and given.isprintable() and len(given) <= _MOST_REASON):
            raise ConfigError(option, given, f"must be one line of at most {_MOST_REASON} characters")
    return {"by": by, "ticket": ticket or "", "why": reason or ""}


def _chosen(proposals: list[Proposal], run: str, state: str) -> Proposal:
    """Return the run with this name or digest prefix (at least 12 characters): two leads may use one name.

    Raises:
        ConfigError: no run matches, or several proposals have this name.
    """
    if not (found := [p for p in proposals if p.run == run or (len(run) >= 12 and p.digest().startswith(run))]):
        names = ", ".join(printable(one.run) for one in proposals) or "none"
        raise ConfigError("RUN", run, f"must be a run that {state}: {names}")
    if len(found) > 1:
        digests = ", ".join(f"{one.digest()[:12]} (lead {spoken_start(one.lead)})" for one in found)
        raise ConfigError("RUN", run, f"was proposed in {len(found)} ways; name one by its digest: {digests}")
    return found[0]


def _epsilon(asked: Proposal) -> float | None:
    """Return the epsilon of the whole run by PLD; None if the run has no guarantee."""
    if asked.seeded_noise or not asked.plan.private:
        return None
    return epsilon_pld([asked.plan.whole], asked.plan.delta)


def _price(epsilon: float | None) -> str:
    return "NO GUARANTEE" if epsilon is None else epsilon_text(epsilon)


def _price_and_plan(asked: Proposal, verdict: Verdict) -> Section:
    plan = asked.plan
    by_trust = plan.by_trust(plan.most_rounds)
    said = filled(
        "proposal",
        asked=asked,
        plan=plan,
        verdict=verdict,
        price=_price(_epsilon(asked)),
        noise=noise_words(plan),
        trust=trust_words(by_trust) if by_trust else "",
        contribution=contribution(plan) if plan.unit == "user" else "",
        no_adapter=NO_ADAPTER,
    )
    return pairs(said)


class SomethingFailed(FedtuneError):
    """An error at the site that a check found."""

    exit_code = 2


def examine_site(*, kit: Path, site_toml: Path, model: Path | None, run: Sequence[str], as_json: bool) -> None:
    """Run every check, after installing `model` if given, and print a line for each; `run`: settings of a run to try
    out.
    """
    asked = partial(compose_run, run, for_real_sites=True) if run else None
    checks = Examination(kit_folder=kit, site_toml=site_toml, model=model, run=asked).checks()
    finish(print_checks(checks, as_json=as_json))


def print_checks(checks: Iterable[Check], *, as_json: bool) -> list[Check]:
    """Print each check as it finishes, then the number of checks by outcome; or print all of them as one JSON
    object.
    """
    console, made = Console(highlight=False), []
    for check in checks:
        made.append(check)
        if not as_json:
            _print_line(console, check)
    if as_json:
        print_json({"checks": [check.to_json() for check in made], "ok": exit_code_of(made) == 0})
        return made
    counts = {mark: sum(check.status == mark for check in made) for mark in _MARKS}
    console.print("\n" + ", ".join(f"{count} {mark}" for mark, count in counts.items() if count))
    return made


def finish(checks: Sequence[Check]) -> None:
    """Raise the error that corresponds to the failed checks, if any."""
    names = [check.name for check in checks if check.status == "failed"]
    if code := exit_code_of(checks):
        message = f"{counted(len(names), 'check')} failed ({', '.join(names)}); each line says what to do"
        raise {SETTINGS: SomethingFailed, REFUSED: RefusedError}.get(code, RunError)(message)


def _print_line(console: Console, check: Check) -> None:
    found = check.found.removeprefix(f"{check.status}, ")
    lines = [f"{check.status:<{_NAME}}{printable(check.name)}"]
    if len(lines[0]) < _FOUND:
        lines[0] = lines[0].ljust(_FOUND)
    else:
        lines.append(" " * _FOUND)  # a long name has a line to itself
    first, *rest = fold(printable(found, _MOST_TEXT), width=max(_NARROWEST, console.width - _FOUND))
    lines[-1] += first
    lines += [" " * _FOUND + part for part in rest]
    fix = fold(printable(check.fix, _MOST_TEXT), width=max(_NARROWEST, console.width - _FIX)) if check.fix else []
    lines += [("" if number else "->").rjust(_FIX - 1) + f" {part}" for number, part in enumerate(fix)]
    text = Text("\n".join(line.rstrip() for line in lines))
    text.stylize(_MARKS[check.status], 0, len(check.status))
    console.print(text, soft_wrap=True)

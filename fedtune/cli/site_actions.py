"""Implementation of the `fedtune site` commands, imported only after root privileges have been dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedtune.cli.command import check_reason, print_answer
from fedtune.cli.finished_run import load_finished_run
from fedtune.cli.personalize import print_personalization
from fedtune.cli.plain_words import explain_refusal, render_page
from fedtune.cli.run_settings import compose_for_one_site
from fedtune.evaluation.bootstrap import MIN_UNITS
from fedtune.federation.policy_dry_run import DryRun, dry_run
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import flatten, format_key_start, group_hex, pluralize
from fedtune.lab.studies.comparison import Line, score_side_by_side
from fedtune.lab.studies.personalized import make_personalized
from fedtune.lab.studies.trials import SearchTrial
from fedtune.model.spec import NO_ADAPTER
from fedtune.ops.doctor.check import REFUSED, SETTINGS, DoctorCheck, choose_exit_code
from fedtune.ops.doctor.examination import Examination
from fedtune.ops.files import get_current_account
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.kits.members import Member, Roster
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.accountant import epsilon_pld, format_epsilon
from fedtune.privacy.ledger.history import History
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Refused, format_requested_and_allowed
from fedtune.show.budget_text import describe_contribution, describe_noise, describe_trust
from fedtune.show.lines import to_printable, wrap_text
from fedtune.show.terminal_tables import Section, build_key_value_section, print_json, require_confirmation, say, show
from fedtune.spec import ConfigError, FedtuneError, RefusedError, RunError, check_at_least

_SHOWN_ABOVE = ("privacy", "federation", "runtime", "task")
"""Groups of settings that the proposal's rows already contain."""
_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME, _FOUND, _FIX = 8, 28, 11  # column positions of a check's name, result and fix
_NARROWEST = 20
_MAX_TEXT = 1000


class SiteActions:
    """Actions of a site's staff on runs: approve, deny, score and personalize, with the site's kit and policy."""

    def __init__(self, kit: Kit, site_toml: Path) -> None:
        self.kit, self.site_toml, self.files = kit, site_toml, kit.find_site_files(site_toml)

    @property
    def state(self) -> SiteState:
        return SiteState.in_kit(self.kit.folder)

    def show_waiting(self, *, as_json: bool) -> None:
        """Print the runs that wait for approval with their epsilon, which is null in JSON without a guarantee."""
        told, rows = [], []
        for pending in self.state.list_pending_runs():
            asked, since = pending.proposal, pending.since
            spent = {"epsilon": (epsilon := _compute_total_epsilon(asked)), "delta": asked.plan.delta}
            about_run = {"run": asked.run, "digest": asked.digest(), "since": since, "dataset": asked.dataset}
            told.append({**about_run, "lead": asked.lead, **spent})
            about = (to_printable(asked.run), since[:10], to_printable(asked.dataset))
            rows.append((*about, _format_total_epsilon(epsilon), format_key_start(asked.lead)))
        headings = ("run", "since", "data set", "epsilon", "requested by lead")
        section = Section(headings=headings, rows=rows, words=range(5), whole={0, 1})
        print_answer({"waiting": told}, [section], as_json=as_json)
        if not (rows or as_json):
            say("No run waits for approval.")

    def approve(self, run: str, *, yes: bool, by: str | None, ticket: str | None, reason: str | None) -> None:
        said, waiting = _check_decision(by, ticket, reason), self.state.list_pending_runs()
        asked = _find_proposal([pending.proposal for pending in waiting], run, "waits for approval")
        pending = next(pending for pending in waiting if pending.proposal == asked)
        verdict = dry_run(self.site_toml, asked, declared_sizes={})
        # Print all other settings in full: the end of a long list may be relevant to the decision.
        settings = {key: value for key, value in json.loads(pending.settings).items() if key not in _SHOWN_ABOVE}
        rows = {"fedtune at the lead": to_printable(pending.software)} if pending.software else {}
        for key, value in flatten(settings):
            listed = f"{len(value)}: {', '.join(map(str, value))}" if isinstance(value, list) else value
            if value not in (None, [], ""):
                rows[key] = to_printable(listed, len(str(listed)))
        show([_build_proposal_section(pending.proposal, verdict), build_key_value_section(rows)])
        if verdict.ledger == "in doubt":
            raise RunError(verdict.note)
        if not verdict.allowed:
            rules = []
            for one in verdict.violations:
                numbers = format_requested_and_allowed(one.requested, one.allowed)
                rules.append(explain_refusal(one.reason) + (f" ({numbers})" if numbers else ""))
            raise RefusedError(f"the policy or the budget refuses this run: {'; '.join(rules)}")
        if not yes:
            require_confirmation("Approve this run?", otherwise="not approved: the run still waits")
        ledger = self.state.open_ledger(self.files)
        try:
            ledger.approve(pending.proposal, **said)
        except Refused as refused:  # in a new period, which only the server's time opens
            why = ledger.explain_refusal(refused)
            raise RefusedError(f"{refused}: {why}" if why else str(refused)) from None
        self.state.remove_pending(pending.proposal)
        say("Approved, and recorded in the ledger. The run starts with the lead's next request.")

    def deny(self, run: str, reason: str, *, by: str | None, ticket: str | None) -> None:
        said, verified = _check_decision(by, ticket, reason), self.files.verify_ledger()
        history = verified.history if verified else History()
        begun = [one.proposal for one in history.runs.values() if one.is_open(history.clock)]
        waiting = [pending.proposal for pending in self.state.list_pending_runs()]
        asked = _find_proposal([*waiting, *begun], run, "waits for approval or has begun")
        self.state.open_ledger(self.files).deny(asked, **said)
        self.state.remove_pending(asked)
        then = "The lead receives 'denied' at its next request; the reason stays here."
        say(f"Denied, and recorded in the ledger. {then}")
        if asked in begun:
            say("The run ends at this site: no further round is charged, and no further reply is sent.")

    def show_members(self, path: Path, *, as_json: bool) -> None:
        trusted = dict(self.files.policy.trust.members)
        roster = Roster.read_signed(path, kit=self.kit)
        gone = "in [trust].members, but not in the federation: remove it"
        found = {name: (key, gone) for name, key in trusted.items()}
        found |= {one.site: (one.site_key, _describe_member(one, trusted.get(one.site))) for one in roster.sites}
        found.pop(self.kit.site or "", None)
        members = [{"site": name, "site_key": key, "state": state} for name, (key, state) in found.items()]
        rows = [(name, state, group_hex(key)) for name, (key, state) in found.items()]
        note = (
            "Nothing was changed. To trust another site, compare its key with that site itself, not with the lead, and "
            "add it to [trust].members in site.toml."
        )
        headings = ("site", "state", "site key in the roster")
        told = {"number": roster.number, "members": members}
        heading = f"Sites of {roster.federation}, from the lead's roster number {roster.number}:"
        section = Section(headings=headings, rows=rows, words=range(3), notes=[note])
        print_answer(told, [section], as_json=as_json, heading=heading)

    def score(self, run: str, *, by: str | None, smallest: int, as_json: bool) -> None:
        check_at_least("--smallest", smallest, MIN_UNITS)
        folder = self._find_kept_run(run)
        from fedtune.sites.real_site import read_site_records  # torch takes seconds to import

        config, adapter = load_finished_run(folder)
        if config.data.heldout_fraction == 0:
            bound = "has no held-out records: use fedtune evaluate FOLDER --data FILE with other records"
            raise ConfigError("data.heldout_fraction", 0, bound)
        if not (records := read_site_records(config, self.files).heldout):
            bound = "is too small to hold out a record of this site: use fedtune evaluate with other records"
            raise ConfigError("data.heldout_fraction", config.data.heldout_fraction, bound)
        lines = [Line(name="tuned", kind="run", run=SearchTrial(config=config, folder=folder))]
        runs = [(config, adapter)]
        compared = score_side_by_side(lines, runs, data=None, by=by, smallest=smallest, records=records)
        print_answer(compared.to_json(), compared.sections(), as_json=as_json)

    def personalize(self, run: str, *, as_json: bool) -> None:
        folder, files = self._find_kept_run(run), self.files
        config, adapter = load_finished_run(folder)
        from fedtune.lab.personalization import Parts
        from fedtune.sites.real_site import read_site_records

        key, site = files.load_key().derive_secret("own adapter"), files.policy.site
        parts = Parts.split(read_site_records(config, files), key=key, unit=config.privacy.unit)
        into, beside = self.kit.folder / f"private_to_{site}" / folder.name, files.ledger.parent
        own = partial(make_personalized, config, adapter, parts, site=site, into=into, beside_ledger=beside)
        print_personalization(lambda progress: {site: own(progress=progress, lenient=True)}, as_json=as_json)

    def _find_kept_run(self, run: str) -> Path:
        """Find the folder of a run, by name or path, whose final adapter is stored at the site.

        Raises:
            ConfigError: the site stores no final adapter of the run.
        """
        kept = self.kit.folder / "adapters"
        for folder in (kept / run, Path(run)):
            if RunFolder(folder).config.is_file():
                return folder.resolve()  # so that "." and ".." have a name
        names = ", ".join(sorted(path.name for path in kept.glob("*"))) or "none"
        bound = f'must be a run whose final adapter is stored here (final_adapter = "keep"): {names}'
        raise ConfigError("RUN", run, bound)


def _describe_member(member: Member, trusted: str | None) -> str:
    """Describe whether the policy trusts a site of the roster with the roster's key, and the fix if it does not."""
    revoked = f"revoked {member.revoked[:10]}" if member.revoked else ""
    if trusted is None:
        return revoked or "not in [trust].members"
    if revoked:
        return f"in [trust].members, but {revoked}: remove it"
    if trusted != member.site_key:
        return "in [trust].members WITH ANOTHER KEY: call that site"
    return "in [trust].members, with this key"


def _check_decision(by: str | None, ticket: str | None, reason: str | None) -> dict[str, str]:
    """Validate the details of a decision, and return the fields of its ledger event.

    Raises:
        ConfigError: a detail is not a short, printable line.
    """
    by = by or get_current_account()
    for option, given in (("--by", by), ("--ticket", ticket), ("--reason", reason)):
        if given is not None:
            check_reason(option, given)
    return {"by": by, "ticket": ticket or "", "why": reason or ""}


def _find_proposal(proposals: list[Proposal], run: str, state: str) -> Proposal:
    """Find the proposal of a run by name or by digest prefix (at least 12 characters).

    Raises:
        ConfigError: no proposal matches, or several leads use the name.
    """
    if not (found := [p for p in proposals if p.run == run or (len(run) >= 12 and p.digest().startswith(run))]):
        names = ", ".join(to_printable(one.run) for one in proposals) or "none"
        raise ConfigError("RUN", run, f"must be a run that {state}: {names}")
    if len(found) > 1:
        digests = ", ".join(f"{one.digest()[:12]} (lead {format_key_start(one.lead)})" for one in found)
        raise ConfigError("RUN", run, f"has {len(found)} proposals: choose one by its digest: {digests}")
    return found[0]


def _compute_total_epsilon(asked: Proposal) -> float | None:
    """Compute the epsilon of the whole run with PLD accounting, or return None if the run has no guarantee."""
    if asked.seeded_noise or not asked.plan.private:
        return None
    return epsilon_pld([asked.plan.full_event], asked.plan.delta)


def _format_total_epsilon(epsilon: float | None) -> str:
    return "NO GUARANTEE" if epsilon is None else format_epsilon(epsilon)


def _build_proposal_section(asked: Proposal, verdict: DryRun) -> Section:
    plan = asked.plan
    by_trust = plan.compute_epsilons_by_trust(plan.max_rounds)
    said = render_page(
        "proposal",
        asked=asked,
        plan=plan,
        verdict=verdict,
        price=_format_total_epsilon(_compute_total_epsilon(asked)),
        noise=describe_noise(plan),
        trust=describe_trust(by_trust) if by_trust else "",
        contribution=describe_contribution(plan) if plan.unit == "user" else "",
        no_adapter=NO_ADAPTER,
    )
    return build_key_value_section(said)


class SiteCheckFailed(FedtuneError):
    """At least one check of `fedtune site doctor` found a problem at the site."""

    exit_code = 2


def examine_site(*, kit: Path, site_toml: Path, model: Path | None, run: Sequence[str], as_json: bool) -> None:
    """Run and print all checks of a site's setup.

    `model` is a base model to install first, and `run` the settings of a run to check against the policy.
    """
    asked = partial(compose_for_one_site, run) if run else None
    checks = Examination(kit_folder=kit, site_toml=site_toml, model=model, run=asked).run_checks()
    raise_for_failed_checks(print_checks(checks, as_json=as_json))


def print_checks(checks: Iterable[DoctorCheck], *, as_json: bool) -> list[DoctorCheck]:
    """Print each finished check and a summary of all outcomes, or a single JSON object with all checks."""
    console, made = Console(highlight=False), []
    for check in checks:
        made.append(check)
        if not as_json:
            _print_check_line(console, check)
    if as_json:
        print_json({"checks": [check.to_json() for check in made], "ok": choose_exit_code(made) == 0})
        return made
    counts = {mark: sum(check.status == mark for check in made) for mark in _MARKS}
    console.print("\n" + ", ".join(f"{count} {mark}" for mark, count in counts.items() if count))
    return made


def raise_for_failed_checks(checks: Sequence[DoctorCheck]) -> None:
    """Raise the error with the exit code of the failed checks, if any check failed."""
    names = [check.name for check in checks if check.status == "failed"]
    if code := choose_exit_code(checks):
        message = f"{pluralize(len(names), 'check')} failed ({', '.join(names)}); each line contains a fix"
        raise {SETTINGS: SiteCheckFailed, REFUSED: RefusedError}.get(code, RunError)(message)


def _print_check_line(console: Console, check: DoctorCheck) -> None:
    def wrap(text: str, indent: int) -> list[str]:
        return wrap_text(to_printable(text, _MAX_TEXT), width=max(_NARROWEST, console.width - indent))

    name = f"{check.status:<{_NAME}}{to_printable(check.name)}"
    lines = [name.ljust(_FOUND)] if len(name) < _FOUND else [name, " " * _FOUND]  # a long name gets its own line
    first, *rest = wrap(check.found.removeprefix(f"{check.status}: "), _FOUND)
    lines[-1] += first
    lines += [" " * _FOUND + part for part in rest]
    fix = wrap(check.fix, _FIX) if check.fix else []
    lines += [("" if number else "->").rjust(_FIX - 1) + f" {part}" for number, part in enumerate(fix)]
    text = Text("\n".join(line.rstrip() for line in lines))
    text.stylize(_MARKS[check.status], 0, len(check.status))
    console.print(text, soft_wrap=True)

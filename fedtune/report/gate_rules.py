"""The rules of `fedtune gate`, which decide from its report, its folder and an audit whether a run's model may be
released.

A rule set is a TOML file whose keys are the fields of `GateRules`. Each rule has one judge function in `_JUDGES`, which
returns whether the rule holds, and a sentence with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fedtune.codec import decode, read_regular_file, read_toml, require
from fedtune.config import RunConfig
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import convert_infinite_to_none, convert_none_to_infinite
from fedtune.model.spec import NO_BASE
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.selection import compute_released_epsilon
from fedtune.report import signing
from fedtune.report.checks import SIGNED_ADAPTER, START, Check, TrustedValues, check_report, check_start
from fedtune.report.derive import profile
from fedtune.report.derive.verdicts import exceeds_cap, find_wrong_audit_bounds, list_refuted_bounds, read_audit
from fedtune.report.facts import Audit, RunFacts
from fedtune.report.from_run import build_run_report, read_run
from fedtune.report.group_scores import GroupScore, read_group_scores
from fedtune.report.model import Report
from fedtune.runs.lineage import is_counted, sum_start_losses
from fedtune.spec import ConfigError, RunError, check_at_least, check_fraction, name_file_in_errors, spec
from fedtune.tasks.base import Task
from fedtune.tasks.classification import Classification
from fedtune.version import find_config_folder

Found = tuple[bool | None, str]
"""Whether a rule holds, and a sentence with the reason; None: the evidence for the rule is missing."""
_STATES: Mapping[bool | None, Any] = {True: "passed", False: "failed", None: "missing"}
_SIGNATURES = ("signature", "site keys")  # checks of a report that the rule `signed` judges
_BY_AUDIT = "run fedtune audit with this run's settings, and pass its folder with --audit"
_BY_ATTACK = "run fedtune attack on this run, and then fedtune report"
_BY_GROUP = "run fedtune compare RUN --by COLUMN --json > groups.json, and pass --groups groups.json"
_BY_REPORT = "run fedtune report on this run first"
_BY_FOLDER = (
    "start from the folder of a finished run, whose checkpoints have the sites' receipts for its epsilon, and pass the "
    "--roster that lists real sites"
)
_BY_SITE = "ask the site to run fedtune report site.toml --sign, and put its report.json into site_reports/"


@spec
class GateRules:
    """The conditions for releasing a run's model; a rule with its default value is not checked.

    Attributes:
        name: the name of the rule set.
        consistent: report.json is consistent with the signed receipts and with the run's folder.
        files: the model files match the hashes in report.json.
        ledgers: the ledger of each site verifies and contains the charges of the site's receipt.
        finished: the run has finished, and no audit planted canaries in its records.
        real_sites: real sites took part, whose keys the caller knows, and the noise did not come from a fixed seed.
            Each charged site signed that the model's trained tensors are the final adapter that it received.
        signed: report.json is signed with a key that the caller trusts.
        guarantee: the report's verdict is "within".
        assumptions: no assumption of the guarantee is known to be violated.
        max_epsilon: the largest epsilon of a site for this run, or for the whole search that chose it, plus that of all
            starts before it that are not public; the pre-training of a base does not count.
        max_expected_failures: the largest product of a site's declared size and delta, summed over the same runs.
        max_correct_of_100: the largest number of correct membership guesses out of 100, also over the same runs; random
            guessing reaches 50.
        max_lifetime_epsilon: the largest epsilon of a site over all its runs, from signed site reports.
        max_secret_chance: the largest probability of reconstructing a secret with `secret_candidates` equally likely
            values, also over the same runs.
        secret_candidates: the number of candidate values of a secret for an attacker who knows everything else.
        max_audit_bound: the largest lower bound on epsilon that an audit may find.
        min_audit_canaries: the smallest number of canaries in each audit.
        max_membership_auroc: the largest upper confidence limit of a membership attack's AUROC; random guessing has
            0.5.
        max_reconstruction_advantage: the largest advantage over random guessing in reconstructing a record from one
            update, at the upper confidence limit.
        max_extraction_advantage: the same for texts and planted secrets that the model generates or ranks first.
        max_attribute_advantage: the same for guessed labels.
        max_group_gap: the largest difference between a group's score and the score of all other groups.
        min_group_size: the smallest number of records or persons in a group.
        min_sites: the smallest number of sites that have signed for an update and from which a round used one.
        min_declared_size: the smallest declared size of a site, in records or persons.
        licenses: the base-model licenses that permit a release; empty: not checked.
        statements: the fields of report.about that must be filled in.
    """

    name: str
    consistent: bool = False
    files: bool = False
    ledgers: bool = False
    finished: bool = False
    real_sites: bool = False
    signed: bool = False
    guarantee: bool = False
    assumptions: bool = False
    max_epsilon: float | None = None
    max_expected_failures: float | None = None
    max_correct_of_100: float | None = None
    max_lifetime_epsilon: float | None = None
    max_secret_chance: float | None = None
    secret_candidates: int = 1_000_000
    max_audit_bound: float | None = None
    min_audit_canaries: int | None = None
    max_membership_auroc: float | None = None
    max_reconstruction_advantage: float | None = None
    max_extraction_advantage: float | None = None
    max_attribute_advantage: float | None = None
    max_group_gap: float | None = None
    min_group_size: int | None = None
    min_sites: int | None = None
    min_declared_size: int | None = None
    licenses: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for rule, limit in self.limits.items():
            if isinstance(limit, int | float):
                check_at_least(rule, limit, 0)
        require("name", self.name, self.name.isprintable(), "must be one line of printable characters")
        check_at_least("secret_candidates", self.secret_candidates, 2)
        if self.max_secret_chance is not None:
            check_fraction("max_secret_chance", self.max_secret_chance, one=True)

    @property
    def limits(self) -> Mapping[str, Any]:
        """Rule -> its limit, for each rule that is checked."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        asked = ((rule, limit) for rule, limit in fields if limit is not None and limit is not False and limit != ())
        return {rule: limit for rule, limit in asked if rule in _JUDGES}  # a limit of 0 is asked


class Evidence(NamedTuple):
    """The evidence about a finished run on which the rules decide.

    Attributes:
        folder: the run's folder.
        report: a report built from the folder: the lead may have written anything into report.json.
        config: the run's settings.
        checks: name -> check of report.json; empty: report.json is missing or unreadable.
        contradiction: how report.json contradicts the run's folder; "" if they agree.
        audit: the results of an audit with the same plan and model.
        groups: the groups of a comparison, with the scores of the run's model.
        start: the check of who vouches for the epsilon of the run's start, if the run has one.
    """

    folder: Path
    report: Report
    config: RunConfig
    checks: Mapping[str, Check] = {}
    contradiction: str = ""
    audit: Audit | None = None
    groups: Sequence[GroupScore] = ()
    start: Check | None = None

    @property
    def facts(self) -> RunFacts:
        """The report's source data, which must be that of a run."""
        assert isinstance(self.report.facts, RunFacts), "a run folder gives a run's report"
        return self.report.facts


Judge: TypeAlias = Callable[[Any, Evidence, GateRules], Found]
Measure: TypeAlias = Callable[[Evidence, GateRules], float | None]


def read_rules(name: str) -> tuple[GateRules, str]:
    """Read a rule set from a file, or a built-in rule set by its name; return it with the SHA-256 of its file.

    Raises:
        ConfigError: the file does not exist, is not a valid rule set, or has a built-in name and other rules.
    """
    built_in = {path.stem: path for path in (find_config_folder() / "gate").glob("*.toml")}
    path = built_in.get(name, Path(name))
    with name_file_in_errors(path):
        rules = decode(GateRules, read_toml(path, key="rules"))
        own = built_in.get(rules.name.strip().casefold(), path)  # a verdict is read by the name of its rules
        is_free = own == path or rules == decode(GateRules, read_toml(own, key="rules"))
        require("name", rules.name, is_free, "is the name of built-in rules that differ from these: choose another")
        require("rules", name, bool(rules.limits), "has no rule: set at least one, such as consistent = true")
    return rules, hashlib.sha256(read_regular_file(path)).hexdigest()


def collect_evidence(folder: Path, known: TrustedValues, *, audit: Path | None, groups: Path | None) -> Evidence:
    """Read report.json, the run's folder, and the results of an audit and of a group comparison.

    Raises:
        ConfigError: the folder is not a run folder, the audit used another plan or model, or a file is not a comparison
            of this run.
        RunError: a file of the folder is damaged.
    """
    record, fresh, contradiction, checks = read_run(folder), build_run_report(folder), "", dict[str, Check]()
    path = folder / "report.json"
    try:
        path, report = signing.read_report(str(path))
        checks = {check.name: check for check in check_report(path, report, known)}
        if signing.encode_canonical_bytes(fresh) != signing.encode_canonical_bytes(report):
            contradiction = f"report.json does not match the run folder (an export also changes it): {_BY_REPORT}"
    except ConfigError as error:
        contradiction = str(error) if path.is_file() else ""
    found = Evidence(folder, fresh, record.config, checks, contradiction)
    found = found._replace(start=next(check_start(found.facts, known.site_keys), None))
    if found.facts.adapter_digest != record.adapter_digest:
        found = found._replace(contradiction="adapter/ does not match adapter_digest in run.json")
    if audit is not None:
        found = found._replace(audit=_read_matching_audit(found, audit))
    if groups is not None:
        bound = f"must be the JSON output of fedtune compare {folder} --by COLUMN --json, with this model"
        digest, metric = record.adapter_digest, record.config.primary_metric
        read = read_group_scores(groups, adapter_digest=digest, primary_metric=metric, key="groups", bound=bound)
        found = found._replace(groups=read)
    return found


def judge_run(rules: GateRules, evidence: Evidence) -> tuple[Check, ...]:
    """Judge a run by each rule that is set, in the order of `GateRules`."""
    found = ((rule, *_JUDGES[rule](limit, evidence, rules)) for rule, limit in rules.limits.items())
    return tuple(Check(rule, _STATES[holds], why) for rule, holds, why in found)


def _read_matching_audit(evidence: Evidence, folder: Path) -> Audit:
    record, found = read_run(folder), read_audit(folder)
    if found is None:
        raise ConfigError("audit", str(folder), "has no audit.json: pass the output folder of fedtune audit")
    same = (record.plan, record.config.task_model()) == (evidence.facts.plan, evidence.config.task_model())
    # An audit trains even if the signal is weak.
    same &= record.config.training == dataclasses.replace(evidence.config.training, ignore_weak_signal=True)
    bound = "is an audit of another plan, model or training: repeat it with the run's settings"
    require("audit", str(folder), same, bound)
    charged = [site for site in evidence.report.sites if site.spent.rounds]  # without a charge, a site claims nothing
    consistent = found.delta == evidence.facts.delta and not any(find_wrong_audit_bounds(found))
    require("audit", str(folder), consistent, "has an audit.json whose bounds do not follow from its counts")
    return dataclasses.replace(found, exceeded=found.exceeded or bool(list_refuted_bounds(found, charged)))


def _judge_consistency(_: bool, given: Evidence, __: GateRules) -> Found:
    if given.contradiction:
        return False, given.contradiction
    if not given.checks:
        return None, f"there is no report.json: {_BY_REPORT}"
    by_other_rules = (*_SIGNATURES, SIGNED_ADAPTER, START, "files")
    others = [check for name, check in given.checks.items() if name not in by_other_rules]
    for state, holds in (("failed", False), ("missing", None)):
        if found := [check for check in others if check.state == state]:
            return holds, f"{found[0].name}: {found[0].text}"
    return True, "report.json matches the signed receipts and the run's folder"


def _judge_files(_: bool, given: Evidence, __: GateRules) -> Found:
    return _judge_checks(given, ["files"], absent=f"report.json lists no finished model: {_BY_REPORT}")


def _judge_signatures(_: bool, given: Evidence, __: GateRules) -> Found:
    names = ["signature"] if given.facts.simulated else _SIGNATURES  # one machine holds all keys of simulated sites
    return _judge_checks(given, names, absent=f"there is no report.json: {_BY_REPORT} with --sign")


def _judge_checks(given: Evidence, names: Sequence[str], *, absent: str) -> Found:
    """Require that checks of report.json have passed; a failed one decides before one that could not be made."""
    if given.contradiction:
        return False, given.contradiction
    checks = [given.checks[name] for name in names if name in given.checks]
    if len(checks) < len(names):
        return None, absent
    worst = min(checks, key=lambda check: ("failed", "missing", "skipped", "passed").index(check.state))
    if worst.state == "passed":
        return True, " ".join(check.text for check in checks)
    return {"failed": False}.get(worst.state), worst.text


def _judge_ledgers(_: bool, given: Evidence, __: GateRules) -> Found:
    for site in given.facts.sites:
        if not given.facts.simulated:
            if site.statement is None:
                return None, f"the ledger of {site.site} was not verified: {_BY_SITE}"
            found = site.statement.verification
            if found is None or not found.rollback_excluded:
                return False, f"the ledger of {site.site} does not verify, or no anchor covers its last event"
            continue
        if (receipt := site.receipt) is None:
            return None, f"{site.site} has sent no receipt: its ledger cannot be compared"
        path = RunFolder(given.folder).locate_sites(given.config.runtime.sites_dir) / site.site / "ledger.db"
        if not path.is_file():
            return None, f"the ledger of {site.site} is missing: restore {path}"
        try:
            verified = verify(path, site_key=receipt.site_key)
        except RunError as error:
            return False, f"the ledger of {site.site} does not verify: {error}"
        charged = verified.history.charged_rounds(receipt.run)
        if len(verified.events) < receipt.sequence or charged != receipt.charged_rounds:
            return False, f"the ledger of {site.site} lacks the charges of the site's receipt"
    return True, "the ledger of each site verifies and contains the charges of its receipt"


def _judge_finished(_: bool, given: Evidence, __: GateRules) -> Found:
    if given.facts.canaries_planted or RunFolder(given.folder).audit_mark.exists():
        return False, "an audit planted canaries in the records of this run: train again without the audit"
    return given.facts.finished, f"{given.facts.progress} rounds are finished"


def _judge_real_sites(_: bool, given: Evidence, __: GateRules) -> Found:
    if banners := ", ".join(given.report.banners):
        return False, f"the report has the warnings: {banners}"
    absent = f"report.json is missing, or differs from adapter/: {_BY_REPORT}"
    return _judge_checks(given, ["site keys", SIGNED_ADAPTER], absent=absent)


def _judge_guarantee(_: bool, given: Evidence, __: GateRules) -> Found:
    state, reasons = given.report.verdict.state, ", ".join(given.report.verdict.reasons)
    why = f" ({reasons})" if reasons else ""
    return state == "within", f"the verdict of the report is {state}{why}".replace("_", " ")


def _judge_assumptions(_: bool, given: Evidence, __: GateRules) -> Found:
    violated = [one.code.replace("_", " ") for one in given.report.assumptions if one.status == "violated"]
    return not violated, f"known violations of assumptions: {', '.join(violated) or 'none'}"


def _at_most(what: str, measure: Measure, remedy: str = "") -> Judge:
    """Return a judge that requires a measured value to be at most the rule's limit."""

    def judge(limit: float, given: Evidence, rules: GateRules) -> Found:
        if (value := measure(given, rules)) is None:
            return None, f"{what} is unknown: {remedy}"
        said = "unbounded" if math.isinf(value) else f"{value:.4g}"
        return not exceeds_cap(value, limit), f"{what} is {said} (limit: at most {limit:g})"

    return judge


def _at_least(what: str, measure: Measure, remedy: str = "") -> Judge:
    """Return a judge that requires a measured value to be at least the rule's limit."""

    def judge(limit: float, given: Evidence, rules: GateRules) -> Found:
        if (value := measure(given, rules)) is None:
            return None, f"{what} is unknown: {remedy}"
        return value >= limit, f"{what} is {value:,g} (limit: at least {limit:,})"

    return judge


def _limit_gain(attack: str, what: str, is_possible: Callable[[Task], bool] = lambda task: True) -> Judge:
    """Return a judge that limits an attack's advantage over random guessing, at the upper confidence limit."""

    def judge(limit: float, given: Evidence, _: GateRules) -> Found:
        if given.facts.attacks is None:
            return None, f"{what} was not attempted: {_BY_ATTACK}"
        found = given.facts.attacks.find(attack)
        if found and not any(one.applies for one in found):
            # The task must agree, because anybody can edit attack.json.
            possible = is_possible(given.config.bound_task)
            return not possible, f"{what} was skipped, but is possible here" if possible else found[0].sentence
        gains = [one.high - (one.guessing or 0.0) for one in found if one.high is not None]
        if not gains:
            said = " ".join(one.sentence for one in found) or f"the report lacks this attack: {_BY_ATTACK}"
            return None, f"{what} was not attempted: {said}"
        gain = max(gains)
        said = f"the advantage of {what} over random guessing is up to {gain:.4g}, at most {limit:g}"
        return not exceeds_cap(gain, limit), said

    return judge


def _sum_losses(given: Evidence) -> tuple[float, float] | None:
    """Sum epsilon (infinity: unbounded) and delta over the run, or the search that chose it, and the starts before it;
    None if what a start spent is unknown.
    """
    facts, start = given.facts, given.facts.provenance.start_adapter
    if given.start is not None and given.start.state != "passed":
        return None
    epsilon, delta = compute_released_epsilon(given.report.epsilon, facts.delta, facts.selection)
    own = {"unit": facts.unit, "delta": delta, "epsilon": epsilon}
    total, total_delta = sum_start_losses(own | {"start_adapter": start and dataclasses.asdict(start)})
    return None if total_delta is None else (convert_none_to_infinite(total), total_delta)


def _is_alone(given: Evidence) -> bool:
    """Whether the run has neither a search nor prior training that counts, so that its charges bound every attack."""
    start = given.facts.provenance.start_adapter
    return given.facts.selection is None and (start is None or not is_counted(dataclasses.asdict(start)))


def _measure_epsilon(given: Evidence, _: GateRules) -> float | None:
    losses = _sum_losses(given)
    return losses and losses[0]


def _measure_failures(given: Evidence, _: GateRules) -> float | None:
    sizes, losses = given.facts.declared_sizes.values(), _sum_losses(given)
    return None if None in sizes or losses is None else losses[1] * max(size or 0 for size in sizes)


def _measure_sites(given: Evidence, _: GateRules) -> float:
    charged = {site.site for site in given.facts.sites if site.receipt and site.receipt.charged_rounds}
    return len(charged & {site for done in given.facts.rounds for site in done.sites})


def _measure_declared_size(given: Evidence, _: GateRules) -> float | None:
    sizes = given.facts.declared_sizes.values()
    return None if None in sizes else min(size or 0 for size in sizes)


def _measure_right_guesses(given: Evidence, _: GateRules) -> float | None:
    if not _is_alone(given):
        losses = _sum_losses(given)
        return losses and profile.bound_correct_guesses_per_100(*losses)
    meanings = [site.meaning for site in given.report.sites]
    return max(100.0 if one is None else one.correct_of_100_mechanism or one.correct_of_100_ceiling for one in meanings)


def _measure_lifetime(given: Evidence, _: GateRules) -> float | None:
    statements = [site.statement for site in given.facts.sites]
    if None in statements:
        return None
    return max(convert_none_to_infinite(said.lifetime.epsilon) for said in statements if said)


def _measure_secret(given: Evidence, rules: GateRules) -> float | None:
    if (losses := _sum_losses(given)) is None:
        return None
    plan, epsilon, delta = given.facts.plan, convert_infinite_to_none(losses[0]), losses[1]
    spent = profile.count_charged_events(plan, plan.max_rounds) if plan.private and _is_alone(given) else None
    return profile.bound_secret_chance(spent, epsilon=epsilon, delta=delta, candidates=rules.secret_candidates)


def _measure_audit(given: Evidence, _: GateRules) -> float | None:
    if given.audit is None or not given.audit.bounds:
        return None
    return math.inf if given.audit.exceeded else max(bound.lower_bound for bound in given.audit.bounds)


def _measure_canaries(given: Evidence, _: GateRules) -> float | None:
    return min((bound.canaries for bound in given.audit.bounds), default=None) if given.audit else None


def _measure_membership(given: Evidence, _: GateRules) -> float | None:
    areas = [attack.auroc_high for attack in given.audit.membership] if given.audit else []
    attacks = given.facts.attacks.find("membership") if given.facts.attacks else ()
    return max([*areas, *(one.high for one in attacks if one.high is not None)], default=None)


def _measure_gap(given: Evidence, _: GateRules) -> float | None:
    gaps = [one.gap for one in given.groups]
    return None if None in gaps else max((abs(gap or 0.0) for gap in gaps), default=None)


def _measure_group_size(given: Evidence, _: GateRules) -> float | None:
    return min((one.units for one in given.groups), default=None)


def _judge_license(allowed: Sequence[str], given: Evidence, _: GateRules) -> Found:
    if given.config.model.path == NO_BASE:
        return True, "the model has no base model"
    if (own := given.facts.provenance.model_license) is None:
        return None, "the license of the base model is unknown: set model.license, and run again"
    permits = own.lower() in map(str.lower, allowed)
    return permits, f"the license of the base model is {own}; allowed: {', '.join(allowed)}"


def _judge_statements(asked: Sequence[str], given: Evidence, _: GateRules) -> Found:
    about = dataclasses.asdict(given.config.report.about)
    if unknown := [name for name in asked if name not in about]:
        raise ConfigError("statements", unknown[0], f"must be one of {', '.join(about)}")
    if missing := ", ".join(name for name in asked if not any(map(str.isalnum, about[name]))):
        return None, f"{missing} is empty: fill in report.about in config.yaml, and run fedtune report again"
    return True, f"report.about states {', '.join(asked)}"


_JUDGES: Mapping[str, Judge] = {
    "consistent": _judge_consistency,
    "files": _judge_files,
    "ledgers": _judge_ledgers,
    "finished": _judge_finished,
    "real_sites": _judge_real_sites,
    "signed": _judge_signatures,
    "guarantee": _judge_guarantee,
    "assumptions": _judge_assumptions,
    "max_epsilon": _at_most("epsilon with all starts before this run", _measure_epsilon, _BY_FOLDER),
    "max_expected_failures": _at_most(
        "delta with all starts before this run, times the largest declared size,",
        _measure_failures,
        f"set data.declared_sizes, or {_BY_FOLDER}",
    ),
    "max_correct_of_100": _at_most("the number of correct guesses out of 100", _measure_right_guesses, _BY_FOLDER),
    "max_lifetime_epsilon": _at_most("the largest epsilon of a site over all its runs", _measure_lifetime, _BY_SITE),
    "max_secret_chance": _at_most("the probability of reconstructing a secret", _measure_secret, _BY_FOLDER),
    "max_audit_bound": _at_most("the audit's largest lower bound on epsilon", _measure_audit, _BY_AUDIT),
    "min_audit_canaries": _at_least("the audit's number of canaries", _measure_canaries, _BY_AUDIT),
    "max_membership_auroc": _at_most(
        "the AUROC of the membership attack", _measure_membership, f"{_BY_ATTACK}, or {_BY_AUDIT}"
    ),
    "max_reconstruction_advantage": _limit_gain("reconstruction", "reconstruction of a record from an update"),
    "max_extraction_advantage": _limit_gain("extraction", "extraction", lambda task: task.predicts_tokens),
    "max_attribute_advantage": _limit_gain(
        "attribute", "attribute inference", lambda task: isinstance(task, Classification)
    ),
    "max_group_gap": _at_most("the largest score gap between a group and all others", _measure_gap, _BY_GROUP),
    "min_group_size": _at_least("the size of the smallest group", _measure_group_size, _BY_GROUP),
    "min_sites": _at_least("the number of sites whose updates were used", _measure_sites),
    "min_declared_size": _at_least(
        "the smallest declared size of a site", _measure_declared_size, "set data.declared_sizes"
    ),
    "licenses": _judge_license,
    "statements": _judge_statements,
}

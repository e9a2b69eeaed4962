"""The rules of `fedtune gate`: a run that meets all of them, and defects that each fail the rules they should."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import AboutSpec, RunConfig
from fedtune.federation.lead import RoundResult
from fedtune.privacy.selection import Selection
from fedtune.report import gate_rules
from fedtune.report.attacks import AttackFinding, RunAttacks
from fedtune.report.checks import START, Check
from fedtune.report.derive.profile import bound_correct_guesses_per_100, bound_secret_chance, compute_hit_rate_ceiling
from fedtune.report.facts import (
    Audit,
    AuditBound,
    AuditMembership,
    BudgetVerdict,
    SiteFacts,
    StartAdapter,
    Verification,
)
from fedtune.report.gate_rules import Evidence, GateRules, judge_run, read_rules
from fedtune.report.group_scores import GroupScore
from fedtune.report.model import Assumption
from fedtune.runs.lineage import PRIVATE_BASES
from fedtune.spec import ConfigError
from fedtune.version import find_config_folder

from .shown import build_reports, change_facts, change_first_site

RULES = GateRules(
    name="strict",
    **dict.fromkeys(
        ("consistent", "files", "ledgers", "finished", "real_sites", "signed", "guarantee", "assumptions"), True
    ),
    max_epsilon=2.0,
    max_expected_failures=0.1,
    max_correct_of_100=60.0,
    max_lifetime_epsilon=8.0,
    max_secret_chance=0.001,
    max_audit_bound=2.0,
    min_audit_canaries=500,
    max_membership_auroc=0.6,
    max_reconstruction_advantage=0.1,
    max_extraction_advantage=0.1,
    max_attribute_advantage=0.1,
    max_group_gap=0.1,
    min_group_size=10,
    min_sites=2,
    min_declared_size=100,
    licenses=("apache-2.0", "mit"),
    statements=("curator", "access"),
)
BOUND = AuditBound(
    site=None, claimed_epsilon=1.1, lower_bound=0.4, best_possible=5.0, canaries=1000, guesses=1000, correct=560
)
ATTACK = AuditMembership(
    site=None, score="loss", members=90, non_members=90, auroc=0.5, auroc_low=0.45, auroc_high=0.55, hit_rates=(1,)
)
AUDIT = Audit(
    method="x", confidence=0.95, delta=1e-5, seeded=False, exceeded=False, bounds=(BOUND,), membership=(ATTACK,)
)
NOTHING_WRITTEN = AttackFinding(
    attack="extraction", measure="written_answers", sentence="Extraction cannot be done.", applies=False
)
ATTACKS = RunAttacks(
    run="run",
    adapter_sha256="00",
    epsilon=1.1,
    delta=1e-5,
    confidence=0.95,
    seconds=1.0,
    findings=(
        AttackFinding(
            attack="membership", measure="auroc", sentence="It picks 52 of 100.", strength=0.52, low=0.48, high=0.56
        ),
        AttackFinding(
            attack="reconstruction",
            measure="picked_from_update",
            sentence="It picks 2 %.",
            strength=0.02,
            low=0.01,
            high=0.03,
            guessing=0.01,
        ),
        AttackFinding(attack="reconstruction", measure="secret_of_10000", sentence="At most 0.1 %.", ceiling=0.001),
        NOTHING_WRITTEN,
        AttackFinding(
            attack="attribute", measure="guessed_labels", sentence="2 % more.", strength=0.02, low=-0.01, high=0.05
        ),
    ),
)
SEARCH = Selection(
    search="s", method="grid", primary_metric="accuracy", score=0.5, trials=8, delta=1e-5, epsilon=2.1, charges=()
)
VERIFIED = Verification(num_events=9, first="0", head="1", site_key="2", key_expected=True, anchor_sequence=9)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    composed = compose_run(["experiment=debug", "privacy.noise_multiplier=4.0"])
    return replace(composed, report=replace(composed.report, about=AboutSpec(curator="A hospital", access="everybody")))


@pytest.fixture
def evidence(config: RunConfig) -> Evidence:
    """A run at nine real sites that released their reports, with an audit and scores by group."""
    report = build_reports()["site_reports"]
    receipt = next(site.receipt for site in report.facts.sites if site.receipt)
    sites = tuple(
        replace(
            site,
            receipt=replace(receipt, site=site.site, simulated=False),
            statement=replace(site.statement, verification=VERIFIED),
        )
        for site in report.facts.sites
    )
    settings = {**report.facts.settings, "runtime": "deployment"}
    rounds = tuple(replace(round, sites=tuple(site.site for site in sites)) for round in report.facts.rounds)
    report = change_facts(report, sites=sites, settings=settings, attacks=ATTACKS, rounds=rounds)
    report = replace(report, assumptions=tuple(check for check in report.assumptions if check.status != "violated"))
    names = ("figures", "signature", "site keys", "files", "signed adapter")
    checks = {name: Check(name, "passed", "as it should be") for name in names}
    groups = (GroupScore("by ward", "a", 40, 0.9, 0.02), GroupScore("by ward", "b", 12, 0.8, -0.05))
    return Evidence(Path("run"), report, config, checks, audit=AUDIT, groups=groups)


def change_check(evidence: Evidence, name: str, state: Any) -> Evidence:
    return evidence._replace(checks={**evidence.checks, name: Check(name, state, "it is not")})


def leave_out_check(evidence: Evidence, left: str) -> Evidence:
    return evidence._replace(checks={name: check for name, check in evidence.checks.items() if name != left})


def change_run(evidence: Evidence, **changes: Any) -> Evidence:
    return evidence._replace(report=change_facts(evidence.report, **changes))


def change_site(evidence: Evidence, **changes: Any) -> Evidence:
    first, *rest = evidence.facts.sites
    return change_run(evidence, sites=(replace(first, **changes), *rest))


def change_statement(evidence: Evidence, **changes: Any) -> Evidence:
    statement = evidence.facts.sites[0].statement
    assert statement is not None
    return change_site(evidence, statement=replace(statement, **changes))


def change_audit(evidence: Evidence, **changes: Any) -> Evidence:
    return evidence._replace(audit=replace(AUDIT, **changes))


def change_attack(evidence: Evidence, attack: str, **changes: Any) -> Evidence:
    """Change every finding of one attack; with no changes, leave them out."""
    findings = [replace(check, **changes) if check.attack == attack else check for check in ATTACKS.findings]
    remaining = tuple(check for check in findings if changes or check.attack != attack)
    return change_run(evidence, attacks=replace(ATTACKS, findings=remaining))


def change_license(evidence: Evidence, name: str | None) -> Evidence:
    return change_run(evidence, provenance=replace(evidence.facts.provenance, model_license=name))


def change_epsilon(evidence: Evidence, epsilon: float | None) -> Evidence:
    return evidence._replace(report=replace(evidence.report, epsilon=epsilon))


def change_start(evidence: Evidence, **changes: Any) -> Evidence:
    start_fields = {"digest": "ab" * 32, "run": "r", "dataset": "d", "unit": "record", "delta": 1e-5, "epsilon": 0.1}
    start = StartAdapter(**start_fields | changes)
    return change_run(evidence, provenance=replace(evidence.facts.provenance, start_adapter=start))


def replace_lifetime(evidence: Evidence, epsilon: float | None) -> Evidence:
    statement = evidence.facts.sites[0].statement
    assert statement is not None
    return change_statement(evidence, lifetime=replace(statement.lifetime, epsilon=epsilon))


def violate(evidence: Evidence) -> Evidence:
    violated = Assumption(code="units_at_one_site_only", status="violated", evidence="site-1")
    return evidence._replace(report=replace(evidence.report, assumptions=(violated,)))


def exceed(evidence: Evidence) -> Evidence:
    exceeded = BudgetVerdict(state="exceeded", reasons=("above_target",))
    return evidence._replace(report=replace(evidence.report, verdict=exceeded))


def state_curator(evidence: Evidence, curator: str) -> Evidence:
    about = AboutSpec(curator=curator, access="everybody")
    return evidence._replace(config=replace(evidence.config, report=replace(evidence.config.report, about=about)))


def keep_one_receipt(evidence: Evidence) -> tuple[SiteFacts, ...]:
    first, *rest = evidence.facts.sites
    return first, *(replace(site, receipt=None) for site in rest)


def let_one_site_answer(evidence: Evidence) -> tuple[RoundResult, ...]:
    first = evidence.facts.sites[0].site
    return tuple(replace(round, sites=(first,)) for round in evidence.facts.rounds)


def lose_report(evidence: Evidence) -> Evidence:
    return evidence._replace(checks={})


Change = Callable[[Evidence], Evidence]
LOSSES = "max_epsilon max_expected_failures max_correct_of_100 max_secret_chance"
PRE_TRAINING = {key: PRIVATE_BASES["vaultgemma"][key] for key in ("digest", "dataset", "unit", "delta", "epsilon")}
AUDITED = "max_audit_bound min_audit_canaries"
ATTACKED = "max_reconstruction_advantage max_extraction_advantage max_attribute_advantage"
DEFECTS: dict[str, tuple[str, Change]] = {
    "report differs from the folder": (
        "consistent files real_sites signed",
        lambda e: e._replace(contradiction="epsilon differs"),
    ),
    "figures do not follow": ("consistent", lambda e: change_check(e, "figures", "failed")),
    "nobody compared the configuration": ("consistent", lambda e: change_check(e, "configuration", "missing")),
    "no report": ("consistent files real_sites signed", lose_report),
    "another model file": ("files", lambda e: change_check(e, "files", "failed")),
    "broken signature": ("signed", lambda e: change_check(e, "signature", "failed")),
    "no signature": ("signed", lambda e: change_check(e, "signature", "missing")),
    "receipts of strangers": ("real_sites signed", lambda e: change_check(e, "site keys", "failed")),
    "an adapter that no site signed": ("real_sites", lambda e: change_check(e, "signed adapter", "failed")),
    "nobody compared the adapter": ("real_sites", lambda e: leave_out_check(e, "signed adapter")),
    "unverified ledger": ("ledgers", lambda e: change_statement(e, verification=None)),
    "ledger may be older": (
        "ledgers",
        lambda e: change_statement(e, verification=replace(VERIFIED, anchor_sequence=1)),
    ),
    "no report of a site": ("ledgers max_lifetime_epsilon", lambda e: change_site(e, statement=None)),
    "unfinished run": ("finished", lambda e: change_run(e, rounds=e.facts.rounds[:1])),
    "planted canaries": ("finished", lambda e: change_run(e, canaries_planted=True)),
    "seeded noise": ("real_sites", lambda e: change_run(e, seeded_noise=True)),
    "budget exceeded": ("guarantee", exceed),
    "violated assumption": ("assumptions", violate),
    "epsilon beyond": ("max_epsilon", lambda e: change_epsilon(e, 2.1)),
    "no epsilon at all": ("max_epsilon max_secret_chance", lambda e: change_epsilon(e, None)),
    "starts beyond in total": ("max_epsilon max_correct_of_100", lambda e: change_start(e, epsilon=1.5)),
    "a start without a bound": (
        "max_epsilon max_correct_of_100 max_secret_chance",
        lambda e: change_start(e, epsilon=None),
    ),
    "a start of unknown epsilon": (LOSSES, lambda e: change_start(e, unit=None, delta=None, epsilon=None)),
    "a start with another unit": (LOSSES, lambda e: change_start(e, unit="user", epsilon=0.1)),
    "runs behind a base's pre-training": (LOSSES, lambda e: change_start(e, **PRE_TRAINING | {"delta": None})),
    "a start that strangers signed": (
        LOSSES,
        lambda e: change_start(e)._replace(start=Check(START, "missing", "it is not")),
    ),
    "starts too large for delta": (
        "max_expected_failures max_correct_of_100 max_secret_chance",
        lambda e: change_start(e, delta=0.01),
    ),
    "a search beyond": ("max_epsilon max_correct_of_100", lambda e: change_run(e, selection=SEARCH)),
    "too large for delta": (
        "max_expected_failures",
        lambda e: change_site(e, declared_size=10_001),
    ),
    "no bound on guesses": (
        "max_correct_of_100",
        lambda e: e._replace(report=change_first_site(e.report, meaning=None)),
    ),
    "too much over all runs": ("max_lifetime_epsilon", lambda e: replace_lifetime(e, 8.1)),
    "unbounded over all runs": ("max_lifetime_epsilon", lambda e: replace_lifetime(e, None)),
    "no audit": (AUDITED, lambda e: e._replace(audit=None)),
    "audit shows more": ("max_audit_bound", lambda e: change_audit(e, bounds=(replace(BOUND, lower_bound=2.1),))),
    "audit refutes the claim": ("max_audit_bound", lambda e: change_audit(e, exceeded=True)),
    "few canaries": (
        "min_audit_canaries",
        lambda e: change_audit(e, bounds=(replace(BOUND, canaries=499, guesses=9, correct=5),)),
    ),
    "membership found": (
        "max_membership_auroc",
        lambda e: change_audit(e, membership=(replace(ATTACK, auroc_high=0.7),)),
    ),
    "no attack": (ATTACKED, lambda e: change_run(e, attacks=None)),
    "no attack and no audit": (
        f"{AUDITED} max_membership_auroc {ATTACKED}",
        lambda e: change_run(e, attacks=None)._replace(audit=None),
    ),
    "membership found by an attack": ("max_membership_auroc", lambda e: change_attack(e, "membership", high=0.7)),
    "record rebuilt from an update": (
        "max_reconstruction_advantage",
        lambda e: change_attack(e, "reconstruction", strength=0.02, low=0.01, high=0.12),
    ),
    "update not attacked": ("max_reconstruction_advantage", lambda e: change_attack(e, "reconstruction")),
    "secret written": (
        "max_extraction_advantage",
        lambda e: change_attack(e, "extraction", applies=True, strength=0.1, low=0.0, high=0.2),
    ),
    "extraction not tried": ("max_extraction_advantage", lambda e: change_attack(e, "extraction", applies=True)),
    "extraction said to be impossible": (
        "max_extraction_advantage",
        lambda e: e._replace(config=replace(e.config, task="causal_lm", data=replace(e.config.data, labels=()))),
    ),
    "label guessed": ("max_attribute_advantage", lambda e: change_attack(e, "attribute", high=0.11)),
    "no scores by group": ("max_group_gap min_group_size", lambda e: e._replace(groups=())),
    "group gap": (
        "max_group_gap",
        lambda e: e._replace(groups=(e.groups[0]._replace(gap=-0.2), e.groups[1]._replace(units=40))),
    ),
    "small group": ("min_group_size", lambda e: e._replace(groups=(e.groups[0]._replace(units=9),))),
    "one site signed for its update": ("min_sites", lambda e: change_run(e, sites=keep_one_receipt(e))),
    "one site answered": ("min_sites", lambda e: change_run(e, rounds=let_one_site_answer(e))),
    "small cohort": ("min_declared_size", lambda e: change_site(e, declared_size=99)),
    "no license": ("licenses", lambda e: change_license(e, None)),
    "license not allowed": ("licenses", lambda e: change_license(e, "CC-BY-NC-4.0")),
    "nobody stated it": ("statements", lambda e: state_curator(e, "")),
    "stated by an invisible letter": ("statements", lambda e: state_curator(e, "\u200b")),
}


@pytest.mark.parametrize(
    ("figures", "key"),
    [
        ({"low": 0.3, "strength": 0.2, "high": 0.4}, "strength"),
        ({"low": 0.1, "strength": 0.2, "high": 1.1}, "strength"),
        ({"low": 0.1, "strength": 0.2, "high": math.nan}, "strength"),
        ({"low": 0.1, "strength": 0.2}, "strength"),
        ({"high": 0.2}, "strength"),
        ({"low": 0.1, "strength": 0.2, "high": 0.4, "guessing": 1.0}, "guessing"),
    ],
)
def test_attack_finding_with_impossible_figures_is_refused(figures: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        AttackFinding(attack="extraction", measure="written_secrets", sentence="It writes 2.", **figures)
    assert raised.value.key == key


def test_run_without_defects_passes_all_rules(evidence: Evidence) -> None:
    checks = judge_run(RULES, evidence)
    assert {check.name: check.text for check in checks if check.state != "passed"} == {}
    assert {check.name for check in checks} == {one.name for one in fields(GateRules)} - {"name", "secret_candidates"}


@pytest.mark.parametrize("start", [PRE_TRAINING, {"public": True, "delta": 0.5, "epsilon": None}])
def test_public_start_adapters_violate_no_rule(start: dict[str, Any], evidence: Evidence) -> None:
    assert {check.state for check in judge_run(RULES, change_start(evidence, **start))} == {"passed"}


@pytest.mark.parametrize("defect", DEFECTS)
def test_injected_defect_fails_exactly_the_affected_rules(defect: str, evidence: Evidence) -> None:
    failing, change = DEFECTS[defect]
    checks = judge_run(RULES, change(evidence))
    assert {check.name for check in checks if check.state != "passed"} == set(failing.split())


def test_missing_evidence_message_names_the_command_to_create_it(evidence: Evidence) -> None:
    for defect, rule, command in (
        ("no audit", "max_audit_bound", "fedtune audit"),
        ("no attack", "max_reconstruction_advantage", "fedtune attack"),
        ("update not attacked", "max_reconstruction_advantage", "fedtune attack"),
        ("extraction not tried", "max_extraction_advantage", NOTHING_WRITTEN.sentence),
        ("no attack and no audit", "max_membership_auroc", "fedtune attack"),
        ("no scores by group", "max_group_gap", "fedtune compare"),
        ("no report", "consistent", "fedtune report"),
        ("no report of a site", "max_lifetime_epsilon", "fedtune report site.toml --sign"),
        ("no license", "licenses", "model.license"),
        ("a start of unknown epsilon", "max_epsilon", "start from the folder of a finished run"),
        ("nobody stated it", "statements", "report.about"),
    ):
        (checks,) = [check for check in judge_run(RULES, DEFECTS[defect][1](evidence)) if check.name == rule]
        assert checks.state == "missing"
        assert command in checks.text


def test_max_epsilon_judges_the_sum_with_all_starts_that_are_not_public(evidence: Evidence) -> None:
    run_epsilon = evidence.report.epsilon
    assert run_epsilon is not None
    for changes, total in (
        ({"epsilon": 0.5}, f"{run_epsilon + 0.5:.4g}"),
        ({"epsilon": None}, "unbounded"),
        ({"epsilon": None, "unit": None}, "unknown"),
        ({"epsilon": None, "public": True}, f"{run_epsilon:.4g}"),
        (PRE_TRAINING, f"{run_epsilon:.4g}"),
    ):
        (checks,) = judge_run(GateRules(name="one", max_epsilon=8.0), change_start(evidence, **changes))
        assert checks.text.startswith(f"epsilon with all starts before this run is {total}")
        assert (checks.state == "passed") == (total not in ("unbounded", "unknown"))


def test_secret_chance_is_the_least_over_the_whole_trade_off_curve(evidence: Evidence) -> None:
    epsilon, delta = evidence.report.epsilon, evidence.facts.delta
    assert epsilon is not None
    for candidates in (10, 1000, 10**6):
        rules = GateRules(name="one", max_secret_chance=1.0, secret_candidates=candidates)
        chance = gate_rules._measure_secret(evidence, rules)
        pairs = [(one.epsilon_pld, one.delta) for one in evidence.report.sites[0].curve if one.epsilon_pld is not None]
        ceilings = [compute_hit_rate_ceiling(*pair, false_positive_rate=1 / candidates) for pair in pairs]
        assert chance is not None
        assert 1 / candidates < chance <= min(ceilings) * (1 + 1e-6)
        assert chance < 0.9 * compute_hit_rate_ceiling(epsilon, delta, false_positive_rate=1 / candidates)
        for limit, state in ((chance, "passed"), (chance * 0.99, "failed")):
            (found,) = judge_run(replace(rules, max_secret_chance=limit), evidence)
            assert found.state == state


def test_guesses_and_secrets_are_judged_by_the_sum_with_starts_and_search(evidence: Evidence) -> None:
    run_epsilon, delta = evidence.report.epsilon, evidence.facts.delta
    assert run_epsilon is not None
    rules = GateRules(name="one", max_secret_chance=1.0)
    for changed, epsilon, summed in (
        (change_start(evidence, epsilon=0.5), run_epsilon + 0.5, delta + 1e-5),
        (change_run(evidence, selection=SEARCH), 2.1, max(delta, 1e-5)),
        (change_start(change_run(evidence, selection=SEARCH), epsilon=0.5), 2.6, max(delta, 1e-5) + 1e-5),
    ):
        chance = bound_secret_chance(None, epsilon=epsilon, delta=summed, candidates=rules.secret_candidates)
        assert gate_rules._measure_secret(changed, rules) == pytest.approx(chance)
        expected = bound_correct_guesses_per_100(epsilon, summed)
        assert gate_rules._measure_right_guesses(changed, rules) == pytest.approx(expected)


def test_secret_chance_without_noise_or_epsilon_is_one(evidence: Evidence) -> None:
    rules = GateRules(name="one", max_secret_chance=0.5, secret_candidates=10)
    unnoised = change_run(evidence, plan=replace(evidence.facts.plan, noise_multiplier=0.0))
    for check in (change_epsilon(evidence, None), change_epsilon(unnoised, None)):
        assert gate_rules._measure_secret(check, rules) == 1
    # From a pair alone, as of charges that were not fixed beforehand.
    assert bound_secret_chance(None, epsilon=2.0, delta=1e-5, candidates=10**6) == pytest.approx(1.74e-5, rel=1e-3)


def test_gate_shows_what_the_roster_says_of_a_revoked_site(evidence: Evidence) -> None:
    message = "Each receipt is signed with the site's key. north was revoked at 2026-01-01."
    evidence = evidence._replace(checks={**evidence.checks, "site keys": Check("site keys", "passed", message)})
    for check in judge_run(GateRules(name="x", real_sites=True, signed=True), evidence):
        assert check.state == "passed"
        assert message in check.text


def test_unselected_gate_rules_are_not_evaluated(evidence: Evidence) -> None:
    assert judge_run(GateRules(name="none"), lose_report(evidence)) == ()


def test_limit_of_zero_is_judged(evidence: Evidence) -> None:
    (checks,) = judge_run(GateRules(name="none", max_group_gap=0.0), evidence)
    assert (checks.name, checks.state) == ("max_group_gap", "failed")


def test_shipped_gate_rules_are_loaded_by_name() -> None:
    default, tre = (read_rules(name)[0] for name in ("default", "tre"))
    assert (default.name, tre.name) == ("default", "tre")
    assert set(tre.limits) > set(default.limits), "what an environment asks for is more"
    assert default.max_epsilon is not None
    assert tre.max_epsilon is not None
    assert tre.max_epsilon < default.max_epsilon


@pytest.mark.parametrize("name", ["tre", "default", " TRE "])
def test_name_of_built_in_rules_is_refused_in_a_file_with_other_rules(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(f"name = '{name}'\nmin_sites = 0")
    with pytest.raises(ConfigError, match=r"rules\.toml: name = .*is the name of built-in rules") as refused:
        read_rules(str(path))
    assert (refused.value.value, refused.value.exit_code) == (name, 2)


def test_copy_of_built_in_rules_may_keep_their_name(tmp_path: Path) -> None:
    shipped = find_config_folder() / "gate" / "tre.toml"
    path = tmp_path / "rules.toml"
    path.write_text(f"# a copy\n{shipped.read_text()}")
    assert read_rules(str(path))[0] == read_rules("tre")[0]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("name = 'x'\nmax_epsilom = 3.0", "max_epsilom"),
        ("max_epsilon = 3.0", "name"),
        ("name = 'x'\nmax_epsilon = 'low'", "max_epsilon"),
        ("name = 'x'\nmax_epsilon = -1.0", "max_epsilon"),
        ("name = 'x'\nmax_secret_chance = 2.0", "max_secret_chance"),
        ("name = 'x'\nsecret_candidates = 1", "secret_candidates"),
        ("name = 'x'\nconsistent = 1", "consistent"),
        ("name =", "rules"),
    ],
)
def test_invalid_gate_rules_are_refused_with_their_key(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=key):
        read_rules(str(path))
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        read_rules(str(tmp_path / "absent.toml"))


def test_unknown_statement_is_refused(evidence: Evidence) -> None:
    with pytest.raises(ConfigError, match="statements"):
        judge_run(GateRules(name="x", statements=("motto",)), evidence)

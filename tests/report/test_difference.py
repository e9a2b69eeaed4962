"""Two reports beside each other: all that differs, nothing that does not, both values as they are."""

from dataclasses import replace

import pytest

from fedtune.report.difference import Change, differences
from fedtune.report.facts import Audit, AuditBound
from fedtune.spec import ConfigError

from .shown import Make, with_site


def test_equal_reports_differ_in_nothing_and_kinds_are_not_compared(a_report: Make, a_ledger_report: Make) -> None:
    assert differences(a_report(), a_report()) == differences(a_ledger_report(), a_ledger_report()) == ()
    with pytest.raises(ConfigError, match="first report is of a run and the second of a ledger"):
        differences(a_report(), a_ledger_report())


def test_a_changed_setting_is_named_once_with_both_values(a_report: Make) -> None:
    (row,) = a_report().sites[0].mechanisms
    other = replace(row, noise_multiplier=1.25, run="tighter-fedcba9876543210")
    key = "sites.north-hospital.mechanism.noise_multiplier"
    assert differences(a_report(), with_site(a_report(), mechanisms=(other,))) == (
        Change(group="settings", key=key, before=1.5, after=1.25, missing=None),
    )


def test_each_group_has_its_own(a_report: Make) -> None:
    report = a_report()
    one, *others = report.utility.rounds
    rounds = (replace(one, seconds=4.5, failed_sites={"south-hospital": "no_reply"}), *others)
    after = a_report(
        delta=1e-6,
        epsilon=0.9,
        utility=replace(report.utility, rounds=rounds, final={"accuracy": 0.8, "loss": 0.6}),
        provenance=replace(report.provenance, libraries={"torch": "2.9.0", "dp-accounting": "0.6.0"}),
    )
    assert [(change.group, change.key, change.before, change.after) for change in differences(report, after)] == [
        ("utility", "final.accuracy", 0.75, 0.8),
        ("privacy", "epsilon", report.epsilon, 0.9),
        ("settings", "delta", 1e-5, 1e-6),
        ("settings", "provenance.libraries.torch", "2.8.0", "2.9.0"),
        ("cost", "seconds", 10.0, 12.0),
        ("cost", "sites_that_failed", 1, 2),
    ]


def test_a_site_or_score_that_one_report_lacks_is_missing_and_not_zero(a_report: Make) -> None:
    report = a_report()
    changes = differences(report, a_report(sites=report.sites[:1]))
    assert {change.missing for change in changes} == {"after"}
    assert "sites.south-hospital.spent.epsilon" in {change.key for change in changes}
    utility = report.utility
    (found,) = differences(report, a_report(utility=replace(utility, final={**utility.final, "f1": 0.9})))
    assert (found.key, found.before, found.after, found.missing) == ("final.f1", None, 0.9, "before")
    assert {change.group for change in differences(a_report(utility=None), report)} == {"utility", "cost"}


def test_losing_the_guarantee_is_a_change_of_privacy(a_report: Make, a_report_without_privacy: Make) -> None:
    changes = {change.key: change for change in differences(a_report(), a_report_without_privacy())}
    assert (changes["verdict.state"].before, changes["verdict.state"].after) == ("within", "no_guarantee")
    assert changes["verdict.reasons"].after == "no_noise"
    assert (changes["epsilon"].after, changes["epsilon"].missing) == (None, None), "there, and unbounded"
    assert changes["target_epsilon"].after is None


def test_a_ledger_a_year_later(a_ledger_report: Make) -> None:
    report = a_ledger_report()
    (site,) = report.sites
    figures = {"lifetime": replace(site.lifetime, left=5.0), "approved": replace(site.approved, max_epsilon=7.0)}
    earlier = with_site(report, mechanisms=site.mechanisms[:1], **figures)
    changes = {change.key: change for change in differences(earlier, report)}
    assert changes["sites.north-hospital.runs.triage.noise_multiplier"].missing == "before"
    assert changes["sites.north-hospital.runs.triage.rounds"].after == 3
    assert changes["sites.north-hospital.lifetime.left"].before == 5.0
    assert changes["sites.north-hospital.approved.max_epsilon"].before == 7.0


def test_an_audit_belongs_to_privacy(a_report: Make) -> None:
    counts = {"canaries": 1000, "guesses": 10, "right": 9}
    bound = AuditBound(site="a", claimed_epsilon=1.0, lower_bound=0.3, best_possible=1.1, **counts)
    said = {"method": "gradient_canaries", "confidence": 0.95, "delta": 1e-5, "seeded": False, "exceeded": False}
    audit = Audit(**said, bounds=(bound,), membership=())
    changes = differences(a_report(), a_report(audit=audit))
    assert ("privacy", "audit.a.lower_bound", 0.3) in [(change.group, change.key, change.after) for change in changes]


def test_the_runs_configurations_are_settings(a_report: Make) -> None:
    before = {"training": {"learning_rate": 0.1, "optimizer": "adamw"}, "lora": {"target_modules": ["q", "v"]}}
    after = {"training": {"learning_rate": 0.2, "optimizer": "adamw"}, "lora": {"target_modules": ["q"]}}
    found = differences(a_report(), a_report(), settings=(before, after))
    assert [(change.group, change.key, change.before, change.after) for change in found] == [
        ("settings", "config.training.learning_rate", 0.1, 0.2),
        ("settings", "config.lora.target_modules", "q, v", "q"),
    ]

"""A ledger's report: against the ledger itself, and for ledgers that promise nothing."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy import filter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Kind
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.release import Reason
from fedtune.privacy.site_policy import Dataset
from fedtune.report import from_ledger, signing
from fedtune.report.derive import ledger_figures
from fedtune.report.model import to_json
from fedtune.spec import ConfigError, RunError

from ..books import Books
from ..conftest import run_proposal
from .shown import find_assumption, read_status, require_sound


@pytest.fixture
def charged_ledger(books: Any) -> Books:
    """Two runs: `r` with two rounds, and `s` with more noise and one; nothing is over yet."""
    site_books = books()
    site_books.charge(run_proposal(), 1, 2)
    site_books.charge(run_proposal(run="s", noise_multiplier=6.0), 1)
    return site_books


def test_empty_ledger_reports_no_spending_and_its_declared_sizes(books: Any) -> None:
    datasets = tuple(Dataset(id=name, declared_size=size) for name, size in (("patients", 100), ("archive", 50)))
    site_books = books(dataset=datasets)
    report = require_sound(from_ledger.build_ledger_report(site_books.ledger))
    (site,) = report.sites
    assert (report.verdict.state, report.verdict.reasons, report.epsilon) == ("within", ("nothing_spent",), 0.0)
    assert (site.steps, report.facts.releases, site.mechanisms, site.curve) == ((), (), (), ())
    site_books.charge(run_proposal(), 1)
    facts = from_ledger.build_ledger_report(site_books.ledger).known
    assert facts["declared_sizes"] == {"a": 150}, "the sites of a ledger are one, whatever its data sets"
    assert (facts["declared_total"], facts["dataset"]) == (150, "patients, archive")


def test_report_figures_match_the_ledger(charged_ledger: Books) -> None:
    report = require_sound(from_ledger.build_ledger_report(charged_ledger.ledger))
    history = verify(charged_ledger.ledger).history
    (site,) = report.sites
    assert (site.site, site.source, report.facts.kind) == ("a", "own_ledger", "ledger")
    expected = filter.epsilon_filter(history.count_total_charges(), order=history.order, delta=history.delta)
    assert report.epsilon == site.spent.epsilon == site.lifetime.epsilon == expected
    assert (site.spent.rounds, site.spent.steps) == (3, 6)
    assert [(m.run, m.rounds, m.noise_multiplier) for m in site.mechanisms] == [("r", 2, 4.0), ("s", 1, 6.0)]
    assert site.lifetime.with_reserved > site.lifetime.epsilon, "both runs are open"
    runs = [(run.run, run.state, run.rounds, run.max_rounds) for run in site.lifetime.runs]
    assert runs == [("r", "open", 2, 4), ("s", "open", 1, 4)]
    assert report.facts.date == history.last_time.date().isoformat()
    assert report.verdict.state == "within"


def test_approvals_show_person_ticket_and_reason_but_denials_do_not(books: Any) -> None:
    site_books = books()
    site_books.open().approve(run_proposal(), by="Anna Weber", ticket="DPO-7", why="agreed")
    site_books.open().approve(run_proposal(noise_multiplier=5.0), by="somebody else")
    site_books.charge(run_proposal(), 1)
    site_books.open().deny(run_proposal(), "not told", by="Bo Lind")
    report = require_sound(from_ledger.build_ledger_report(site_books.ledger))
    (run,) = report.facts.runs
    approval = {"what": "approved", "by": "Anna Weber", "ticket": "DPO-7", "why": "agreed", "day": report.facts.date}
    assert run.approvals == (approval,)
    assert "not told" not in json.dumps(to_json(report)), "a denial's reason stays in the ledger"


def test_lifetime_figures_account_for_expired_runs_and_the_current_period(charged_ledger: Books) -> None:
    verified = verify(charged_ledger.ledger)
    life = from_ledger.compute_lifetime_budget(verified)
    assert ([run.state for run in life.runs], life.with_reserved > life.epsilon) == (["open", "open"], True)
    assert life.period_epsilon == life.epsilon
    later = verified.history.last_time + timedelta(days=400)
    facts = from_ledger.collect_ledger_facts(verified.events, verified.history, verified=verified, most=0, now=later)
    after = ledger_figures.compute_lifetime(facts)
    assert [run.state for run in after.runs] == ["expired", "expired"]
    assert (after.with_reserved, after.epsilon, after.period_epsilon) == (life.epsilon, life.epsilon, 0.0)


def test_steps_list_rounds_and_switch_to_runs_for_long_histories(
    charged_ledger: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = from_ledger.build_ledger_report(charged_ledger.ledger).sites
    every = site.steps
    assert [(step.run, step.round) for step in every] == [("r", 1), ("r", 2), ("s", 1)]
    epsilons = [step.epsilon for step in every]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == site.spent.epsilon
    monkeypatch.setattr(from_ledger, "MAX_STEPS", 2)
    (site,) = from_ledger.build_ledger_report(charged_ledger.ledger).sites
    assert [(step.run, step.round) for step in site.steps] == [("r", None), ("s", None)]
    assert [step.epsilon for step in site.steps] == [every[1].epsilon, every[2].epsilon]


def test_releases_and_refusals_are_counted_by_run_and_reason(charged_ledger: Books) -> None:
    charged_ledger.charge(run_proposal(run="s", noise_multiplier=6.0), 2, committed=False)
    for run, request in (("r", "q"), ("r", "another"), ("never", "q"), ("seen", "q")):
        charged_ledger.refuse(Reason.MAX_RANK, run=run, request=request)
    charged_ledger.open().make_offer(run_proposal(run="t"))
    report = from_ledger.build_ledger_report(charged_ledger.ledger)
    assert {(item.run, item.kind, item.reason): item.count for item in report.facts.releases} == {
        ("r", "update", None): 2,
        ("s", "update", None): 1,
        ("s", "reservation_without_update", None): 1,
        ("r", "refusal", "max_rank"): 2,
        # Whatever names a lead makes up for runs that the site refuses, there is one line for them.
        ("", "refusal", "max_rank"): 2,
        ("", "offer", None): 1,
    }
    assert report.sites[0].spent.rounds == 4, "a round that was reserved is charged"
    days = {event.time[:10] for event in verify(charged_ledger.ledger).events}
    assert all(item.first in days and item.last in days and item.first <= item.last for item in report.facts.releases)


def test_report_contains_no_record_data_paths_or_times_of_day(charged_ledger: Books) -> None:
    report = from_ledger.build_ledger_report(charged_ledger.site_toml)
    text = signing.report_to_json(report)
    assert text == signing.report_to_json(from_ledger.build_ledger_report(charged_ledger.site_toml)), (
        "equal ledgers give equal bytes"
    )
    assert "f1" * 32 not in text, "a fingerprint of records must stay in the ledger"
    assert str(charged_ledger.folder) not in text
    for name in ("site_key.pem", "ledger.db", "path", 'columns"'):
        assert name not in text
    (site,), events = report.sites, verify(charged_ledger.ledger).events
    shown_times = {report.facts.date, *(step.time for step in site.steps)}
    shown_times |= {time for release in report.facts.releases for time in (release.first, release.last)}
    assert shown_times == {events[-1].time[:10]}
    for event in events:
        if event.kind in (Kind.RESERVE, Kind.COMMIT, Kind.PLAN):
            assert event.time not in text


def test_site_policy_supplies_the_expected_key_and_anchor(books: Any) -> None:
    made = books(anchor="elsewhere/anchor.json")
    made.charge(run_proposal(), 1)
    alone = from_ledger.build_ledger_report(made.ledger).facts
    assert (alone.verification.key_expected, alone.verification.rollback_excluded) == (False, False)
    report = from_ledger.build_ledger_report(made.site_toml)
    check = report.facts.verification
    assert (check.key_expected, check.rollback_excluded, check.anchor_sequence) == (True, True, check.num_events)
    assert (read_status(report, "no_event_missing"), read_status(report, "policy_noted")) == ("verified", "verified")
    by_hand = from_ledger.build_ledger_report(made.ledger, anchor=made.folder / "elsewhere" / "anchor.json")
    assert by_hand.facts.verification.rollback_excluded
    # Under another key than the site's it is not verified.
    (made.folder / "site_key.pem").unlink()
    SigningKey.load_or_create(made.folder / "site_key.pem")
    assert from_ledger.build_ledger_report(made.ledger).verdict.state == "within"
    assert from_ledger.build_ledger_report(made.site_toml).verdict.reasons == ("ledger_not_verified",)


def test_unrecorded_policy_change_is_reported_as_violated(charged_ledger: Books) -> None:
    charged_ledger.edit(budget={"max_epsilon": 4.0})
    report = require_sound(from_ledger.build_ledger_report(charged_ledger.site_toml))
    assert read_status(report, "policy_noted") == "violated"
    assert report.assumptions[0].code == "policy_noted", "violated ones come first"
    assert report.facts.approved.max_epsilon == 4.0
    assert (
        report.sites[0].lifetime.remaining_epsilon
        < from_ledger.build_ledger_report(charged_ledger.ledger).sites[0].lifetime.remaining_epsilon
    )


@pytest.mark.parametrize("key", ["max_epsilon", "max_epsilon_per_period"])
def test_spending_above_the_current_policy_is_reported_as_exceeded(charged_ledger: Books, key: str) -> None:
    spent = from_ledger.build_ledger_report(charged_ledger.site_toml).epsilon
    charged_ledger.edit(budget={key: round(spent * 0.8, 3)})  # nobody opened the ledger since
    report = require_sound(from_ledger.build_ledger_report(charged_ledger.site_toml))
    name = "above_lifetime_cap" if key == "max_epsilon" else "above_period_cap"
    assert (report.verdict.state, report.verdict.reasons) == ("exceeded", (name,))
    assert getattr(report.facts.approved, key) == round(spent * 0.8, 3)
    charged_ledger.edit(budget={"max_epsilon": 50.0, "max_epsilon_per_period": 60.0})
    approved = from_ledger.build_ledger_report(charged_ledger.site_toml).facts.approved
    assert approved.max_epsilon == 5.0, "a cap that the ledger has not noted raises nothing"


def test_report_uses_the_period_of_the_current_policy(charged_ledger: Books) -> None:
    assert read_policy(charged_ledger.site_toml).budget.period == "year"
    charged_ledger.edit(budget={"period": "month", "max_epsilon_per_period": 0.1})
    report = from_ledger.build_ledger_report(charged_ledger.site_toml)
    assert report.verdict.reasons == ("above_period_cap",)
    assert (report.facts.approved.period, report.sites[0].lifetime.period) == ("month", "month")
    # And loosens nothing noted.
    charged_ledger.edit(recorded=True, budget={"period": "year"})
    charged_ledger.edit(budget={"period": "month", "max_epsilon_per_period": 39.0})
    report = from_ledger.build_ledger_report(charged_ledger.site_toml)
    assert report.verdict.reasons == ("above_period_cap",)
    assert (report.facts.approved.period, report.facts.approved.max_epsilon_per_period) == ("year", 0.1)


ANY = float("inf")
WITHIN = ("within", ())
LOOSENED = ("within", ("limits_loosened",))


@pytest.mark.parametrize(
    ("opened", "before", "after", "verdict"),
    [
        pytest.param({}, {}, {"max_epsilon": 0.4}, ("exceeded", ("above_lifetime_cap",)), id="lowered"),
        pytest.param({}, {}, {"max_epsilon_per_period": 0.4}, ("exceeded", ("above_period_cap",)), id="of a period"),
        pytest.param({}, {}, {"max_epsilon": 6.0}, ("within", ("cap_raised",)), id="raised after"),
        pytest.param({}, {"max_epsilon": 6.0}, {}, WITHIN, id="raised before"),
        pytest.param({"max_epsilon_per_run": 2.0}, {}, {"max_epsilon_per_run": None}, LOOSENED, id="run loosened"),
        pytest.param({"max_epsilon_per_run": 2.0}, {}, {"max_epsilon_per_run": 0.1}, WITHIN, id="of later runs"),
        pytest.param({"max_epsilon_per_run": 2.0}, {"max_epsilon_per_run": None}, {}, WITHIN, id="loosened before"),
        pytest.param({"max_epsilon_per_period": 3.0}, {}, {"max_epsilon_per_period": 4.0}, LOOSENED, id="of a period"),
        pytest.param({"max_epsilon_per_period": 3.0}, {}, {"period": "month"}, LOOSENED, id="a shorter period"),
        pytest.param({"max_epsilon": ANY}, {}, {}, ("no_guarantee", ("no_lifetime_cap",)), id="none"),
        pytest.param(
            {"max_epsilon": ANY}, {}, {"max_epsilon": 5.0}, ("no_guarantee", ("no_lifetime_cap",)), id="came after"
        ),
        pytest.param({"max_epsilon": ANY}, {"max_epsilon": 5.0}, {}, WITHIN, id="came before"),
    ],
)
def test_verdict_follows_the_caps_before_and_after_spending(
    opened: Any, before: Any, after: Any, verdict: Any, books: Any
) -> None:
    site_books = books(budget=opened)
    site_books.edit(recorded=True, budget=before)
    site_books.charge(run_proposal(), 1, 2)
    site_books.charge(run_proposal(run="s", noise_multiplier=6.0), 1)
    site_books.edit(recorded=True, budget=after)
    report = require_sound(from_ledger.build_ledger_report(site_books.ledger))
    (site,) = report.sites
    assert (report.verdict.state, report.verdict.reasons) == verdict
    assert (read_status(report, "cap_never_raised") == "violated") == ("cap_raised" in verdict[1])
    assert (site.meaning is None) == (verdict[0] == "no_guarantee")
    expected_caps = {"max_epsilon": 5.0, **opened, **before, **after}
    assert report.facts.approved.max_epsilon_per_run == expected_caps.get("max_epsilon_per_run")
    cap = expected_caps["max_epsilon"]
    assert report.facts.approved.max_epsilon == (None if cap == ANY else cap) == site.lifetime.caps[-1].max_epsilon
    assert (site.lifetime.remaining_epsilon is None) == (cap == ANY)
    assert (
        site.lifetime.remaining_epsilon != 0 or "above_lifetime_cap" in verdict[1] or "above_period_cap" in verdict[1]
    )


def test_old_anchor_excludes_rollback_only_up_to_its_event(books: Any, tmp_path: Path) -> None:
    site_books = books(anchor="anchor.json")
    site_books.charge(run_proposal(), 1)
    old = shutil.copy(site_books.folder / "anchor.json", tmp_path / "old.json")
    site_books.charge(run_proposal(), 2)
    backup = site_books.copy_ledger("backup.db")
    site_books.charge(run_proposal(), 3)
    shutil.copy(backup, site_books.ledger)  # the third round is gone, and the old anchor cannot tell
    report = require_sound(from_ledger.build_ledger_report(site_books.ledger, anchor=Path(old)))
    check = report.facts.verification
    assert (check.rollback_excluded, check.num_events - check.anchor_sequence) == (False, 2)
    assert read_status(report, "no_event_missing") == "assumed"
    assert (
        find_assumption(report, "no_event_missing").evidence == f"anchor: {check.anchor_sequence} / {check.num_events}"
    )
    assert report.known["rollback_excluded"] == "up_to_the_anchor"


@pytest.mark.parametrize(
    ("rounds", "more", "known"),
    [((1, 2), [], True), ((1,), [], False), ((1, 2), ["s"], False)],
    ids=["a whole plan", "a part of one", "two runs"],
)
def test_mechanism_curve_is_used_only_for_fully_planned_spending(
    rounds: Any, more: Any, known: bool, books: Any
) -> None:
    site_books = books()
    for run in ["r", *more]:
        site_books.charge(run_proposal(run=run, num_rounds=2, spare_rounds=0), *rounds)
    report = require_sound(from_ledger.build_ledger_report(site_books.site_toml))
    (site,) = report.sites
    figures = [site.meaning.correct_of_100_mechanism, *(rate.mechanism for rate in site.meaning.hit_rates)]
    assert [figure is not None for figure in figures] == [known] * len(figures)
    verification = {entry.code: entry.status for entry in report.assumptions}
    assert verification.get("ends_independent_of_releases") == ("assumed" if len(rounds) == 1 else None)
    assert (report.known["correct_of_100_mechanism"] == "not_computed") == (not known)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE events SET time = replace(time, '+00:00', '+00:01') WHERE sequence = 5", "event 5 was changed"),
        ("DELETE FROM events WHERE sequence = 4", "event 4 is missing"),
        ("UPDATE replies SET reply = x'00'", "the stored replies are not the newest"),
        ("UPDATE events SET detail = '{}' WHERE sequence = 6", "event 6"),
    ],
)
def test_report_of_a_tampered_ledger_states_no_guarantee(charged_ledger: Books, statement: str, message: str) -> None:
    charged_ledger.tamper(statement)
    for path in (charged_ledger.ledger, charged_ledger.site_toml):
        report = from_ledger.build_ledger_report(path)
        assert report.verdict.state == "no_guarantee"
        assert "ledger_not_verified" in report.verdict.reasons
        assert read_status(report, "ledger_intact") == "violated"
        approval = find_assumption(report, "ledger_intact").evidence
        assert message in approval
        assert str(charged_ledger.folder) not in approval
        (site,) = report.sites
        assert (report.facts.verification, site.meaning) == (None, None)
        assert {entry.status for entry in report.assumptions} <= {"violated", "assumed"}, "its own word shows nothing"


def test_missing_unreadable_or_foreign_ledger_raises_an_error(charged_ledger: Books, tmp_path: Path) -> None:
    for content in (b"", b"no database" * 200, b"SQLite format 3\0" + bytes(100)):
        (tmp_path / "ledger.db").write_bytes(content)
        with pytest.raises(RunError, match=r"ledger\.db"):
            from_ledger.build_ledger_report(tmp_path / "ledger.db")
    for name, approval in (
        ("none.db", "does not exist: pass the path of an existing ledger"),
        ("none.toml", r"none\.toml"),
    ):
        with pytest.raises(ConfigError, match=approval):
            from_ledger.build_ledger_report(tmp_path / name)
    with pytest.raises(ConfigError, match="anchor"):
        from_ledger.build_ledger_report(charged_ledger.ledger, anchor=tmp_path / "none.json")
    charged_ledger.edit(site="b")
    with pytest.raises(ConfigError, match=r"site\.toml: site = 'b': must be 'a'"):
        from_ledger.build_ledger_report(charged_ledger.site_toml)
    charged_ledger.ledger.unlink()
    with pytest.raises(ConfigError, match=r"ledger\.db.*does not exist: pass the path of an existing ledger"):
        from_ledger.build_ledger_report(charged_ledger.site_toml)

"""Arrival cohorts: who is charged for a run, and the register that prevents a corrected date from adding budget."""

import dataclasses
import hashlib
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.privacy import events
from fedtune.privacy.cohorts import Cohorts, compute_cohort_number, format_cohort_name
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import Reservation, SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Reason
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.site_policy import Dataset, Policy, Population
from fedtune.report.page.translations import load_catalog
from fedtune.show.budget_text import ArrivalRange, merge_adjacent_ranges
from fedtune.spec import ConfigError, RunError

from .builders import change_values, make_policy, make_proposal, plan, read_refusal_reason, train
from .conftest import Backups


def make_years(first: str | None, last: str) -> Cohorts:
    return Cohorts(period="year", first=first, last=last)


@pytest.fixture
def arrivals_policy() -> Policy:
    """Build a policy with yearly cohorts, each with a budget for ten rounds of a run."""
    return make_policy(
        population={"unit": "user", "arrivals": "year"}, dataset=(Dataset(id="notes", declared_size=2000),)
    )


@pytest.fixture
def ledger(open_ledger: Any, arrivals_policy: Policy) -> Any:
    return lambda **changes: open_ledger(**{"policy": arrivals_policy, **changes})


def ask(run: str, first: str | None, last: str, **about: Any) -> Proposal:
    """Build a proposal that admits these years."""
    return make_proposal(run=run, plan={"unit": "user", "cohorts": make_years(first, last), **about})


ONCE = ask("r", None, "2024").plan.event()
"""The cost of one round for each admitted person."""


def charge_round(ledger: SiteLedger, proposal: Proposal, arrivals: Mapping[str, int], *, round: int = 1) -> set[str]:
    """Charge a round, and return the people whom the sampler may draw."""
    reservation = ledger.reserve(proposal, round=round, request=f"{proposal.run} {round}", arrivals=lambda: arrivals)
    assert isinstance(reservation, Reservation)
    assert reservation.admitted is not None
    return set(reservation.admitted)


@pytest.mark.parametrize("period", ["month", "quarter", "year"])
def test_cohort_names_match_the_period_and_are_unique(period: Any) -> None:
    names = {"2026-03": ("2026-03", "2026-Q1", "2026"), "2026-04": ("2026-04", "2026-Q2", "2026")}
    for month, key in (names | {"0001-12": ("0001-12", "0001-Q4", "0001")}).items():
        name, number = key[("month", "quarter", "year").index(period)], compute_cohort_number(month, period)
        assert format_cohort_name(number, period) == name
        assert Cohorts(period=period, first=name, last=name).span == (number, number)
    assert format_cohort_name(compute_cohort_number("", period), period) == "before"
    for text in ("2026-13", "2026-Q5", "26", "0000", "2026-Q1 ", "٢٠٢٦", "", "before", "2026-1", "2026-Q1-01"):
        with pytest.raises(ConfigError, match=r"^(last|first)"):
            Cohorts(period=period, last=text)


def test_cohort_ranges_are_ordered_and_round_trip_as_text() -> None:
    with pytest.raises(ConfigError, match="must not be before first = 2026"):
        make_years("2026", "2025")
    for key in (make_years(None, "2026"), make_years("2025", "2026"), make_years("2026", "2026")):
        assert Cohorts.from_text(str(key), "year") == key
    assert 0 in make_years(None, "2026")
    assert [year for year in (0, 2024, 2025, 2026, 2027) if year in make_years("2025", "2026")] == [2025, 2026]
    with pytest.raises(ConfigError):
        Cohorts.from_text("2026", "year")


def test_arrival_groups_have_readable_names() -> None:
    spans = [(0, None), (0, 1), (0, 2025), (1, None), (1, 2025), (2025, 2026), (2026, 2028), (2028, None)]
    groups = [ArrivalRange.from_cohort(*span, "year") for span in spans]
    assert [load_catalog("en").arrivals([group]) for group in groups] == [
        *(
            "Everybody",
            "People without a joining date",
            "People who joined by 2024, and those without a joining date",
            "People with a joining date",
        ),
        *("People who joined by 2024", "People who joined in 2025", "People who joined from 2026 to 2027"),
        "People who joined in 2028 or later",
    ]
    assert [group.dates for group in groups] == ["…", "?", "…–2024", "…", "…–2024", "2025", "2026–2027", "2028–…"]  # noqa: RUF001
    joined = merge_adjacent_ranges({2: groups[2], 3: groups[5], 5: groups[7]})
    assert joined == [ArrivalRange(first=None, last="2025"), groups[7]]


def test_cohorts_enter_the_plan_digest_only_if_set() -> None:
    limited = plan(unit="user", cohorts=make_years(None, "2026"))
    assert Plan.from_json(limited.to_json()) == limited
    assert (
        limited.digest() != plan(unit="user").digest() != plan(unit="user", cohorts=make_years("2026", "2026")).digest()
    )
    assert "cohorts" not in plan(unit="user").to_json()
    with pytest.raises(ConfigError, match="is only allowed with arrivals"):
        Plan.from_json(plan(unit="user").to_json() | {"cohorts": None})
    with pytest.raises(ConfigError, match="must be omitted for unit 'record'"):
        plan(cohorts=make_years(None, "2026"))


def test_arrivals_require_user_level_privacy_and_an_arrival_column(arrivals_policy: Policy) -> None:
    with pytest.raises(ConfigError, match="arrivals are stored by user id"):
        Population(name="patients", arrivals="year")
    dataset = Dataset(id="notes", declared_size=9, columns={"user": "who"})
    with pytest.raises(ConfigError, match="must name the column for role 'arrival', because population"):
        dataclasses.replace(arrivals_policy, dataset=(dataset,))


def test_plan_must_use_the_arrival_calendar_of_the_policy(arrivals_policy: Policy) -> None:
    proposal = ask("r", None, "2026")
    arrivals_policy.check(proposal)
    for cohorts in (Cohorts(period="month", last="2026-01"), None):
        plan = dataclasses.replace(proposal.plan, cohorts=cohorts)
        (refused,) = arrivals_policy.find_broken_rules(dataclasses.replace(proposal, plan=plan))
        assert (refused.reason, refused.allowed) == (Reason.COHORTS, "year")
    (refused,) = make_policy(population={"unit": "user"}, dataset=arrivals_policy.dataset).find_broken_rules(proposal)
    assert (refused.reason, refused.requested, refused.allowed) == (Reason.COHORTS, "year", "none")


def test_arrival_calendar_of_a_ledger_cannot_be_changed(ledger: Any, arrivals_policy: Policy) -> None:
    ledger()
    for arrivals in ("month", ""):
        with pytest.raises(RunError, match=rf"population\.arrivals = year, but the policy says {arrivals or 'none'}"):
            ledger(policy=change_values(arrivals_policy, population={"arrivals": arrivals}))


# Charges.


def test_every_cohort_has_the_full_budget_and_spending_is_their_maximum(ledger: Any) -> None:
    opened = ledger()
    train(opened, ask("first", None, "2024"), 1, 2, 3, 4, 5)
    train(opened, ask("second", "2024", "2025"), 1, 2, 3, 4, 5)
    history = opened.history
    assert history.count_total_charges(2024) == events.count_mechanisms([ONCE] * 10)
    assert (
        history.count_total_charges(0)
        == history.count_total_charges(2023)
        == history.count_total_charges(2025)
        == events.count_mechanisms([ONCE] * 5)
    )
    assert not history.count_total_charges(2026)
    assert history.count_total_charges() == history.count_total_charges(2024)
    assert history.epsilon() == history.epsilon(history.count_total_charges(2024))
    # A run that admits 2024 is refused, because that cohort's budget is spent, whether or not it has people.
    for first, last in ((None, "2026"), ("2024", "2024"), ("2024", "2026")):
        assert read_refusal_reason(train, opened, ask("more", first, last), 1) is Reason.MAX_EPSILON
    train(opened, ask("new", "2025", "2030"), 1, 2, 3, 4, 5)
    train(opened, ask("newer", "2026", "2026"), 1, 2, 3, 4, 5)
    assert read_refusal_reason(train, opened, ask("newest", "2026", "2026"), 1) is Reason.MAX_EPSILON


def test_reserved_rounds_of_open_runs_count_for_their_cohorts(ledger: Any) -> None:
    opened = ledger()
    train(opened, ask("open", "2024", "2025", num_rounds=10), 1)
    assert read_refusal_reason(opened.require_acceptable, ask("r", "2025", "2026", num_rounds=1)) is Reason.MAX_EPSILON
    opened.require_acceptable(ask("r", "2026", "2026", num_rounds=10))
    opened.require_acceptable(ask("r", None, "2023", num_rounds=10))
    assert opened.make_offer(ask("r", "2025", "2026")).max_rounds == 0
    assert opened.make_offer(ask("r", "2026", "2027")).max_rounds == 5


def test_period_cap_applies_to_each_cohort_separately(ledger: Any, arrivals_policy: Policy) -> None:
    opened = ledger(policy=change_values(arrivals_policy, budget={"max_epsilon_per_period": 7.0}))
    train(opened, ask("first", None, "2024", num_rounds=2), 1, 2)
    assert read_refusal_reason(train, opened, ask("again", "2024", "2025"), 1) is Reason.MAX_EPSILON_PER_PERIOD
    train(opened, ask("new", "2025", "2025", num_rounds=2), 1, 2)


def test_ledger_without_arrivals_keeps_its_file_format(path: Path, open_ledger: Any) -> None:
    opened = open_ledger()
    train(opened, make_proposal(), 1, 2)
    with sqlite3.connect(path) as file:
        tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables == {"events", "replies"}
        assert file.execute("SELECT DISTINCT cohort FROM events").fetchall() == [("",)]
        details = "".join(detail for (detail,) in file.execute("SELECT detail FROM events"))
    head = opened.head().to_bytes().decode()
    for word in ("arrivals", "register", "cohorts"):
        assert word not in details + head
    # Golden digests of the policy and proposal above; `leads` and `lead` do not affect privacy.
    assert (
        make_policy(allow={"leads": ()}).digest() == "7c6c13d8acb333ed1239780473095210f56afed912cc05ec4f2194446088255b"
    )
    assert make_proposal(lead="ab" * 32).digest() == "dd21f59459324392713bef1754ca7da963b6c82d1867de7c801051175921c0f3"
    assert opened.history.charges() == {(key, ""): n for key, n in opened.history.count_total_charges().items()}


# The register.


def test_first_admission_of_a_person_fixes_the_cohort(ledger: Any) -> None:
    opened = ledger()
    arrivals = {"ann": 2024, "ben": 2025, "cy": 0}
    assert charge_round(opened, ask("one", "2024", "2024"), arrivals) == {"ann"}
    # Her date is corrected to a later and an earlier one; her loss was charged to 2024.
    assert charge_round(opened, ask("two", "2025", "2025"), arrivals | {"ann": 2025}) == {"ben"}
    assert charge_round(opened, ask("three", None, "2023"), arrivals | {"ann": 2020, "ben": 0}) == {"cy"}
    assert charge_round(ledger(), ask("four", "2024", "2025"), {"ann": 0, "ben": 2031, "cy": 2024}) == {"ann", "ben"}
    # A date may change freely before the first admission.
    assert charge_round(opened, ask("five", "2026", "2026"), {"dora": 2027}) == set()
    assert charge_round(opened, ask("five", "2026", "2026"), {"dora": 2026}, round=2) == {"dora"}


def test_retries_and_later_rounds_reread_the_arrival_register(ledger: Any) -> None:
    opened, proposal = ledger(), ask("one", "2024", "2024")
    assert charge_round(opened, proposal, {"ann": 2024}) == {"ann"}
    assert charge_round(opened, proposal, {"ann": 2026, "ben": 2024}) == {"ann", "ben"}
    assert charge_round(opened, proposal, {}, round=2) == set()
    assert charge_round(opened, proposal, {"ann": 2026}, round=3) == {"ann"}


def test_number_and_format_of_events_do_not_depend_on_records(ledger: Any, path: Path) -> None:
    opened, proposal = ledger(), ask("one", "2024", "2024")
    for round, arrivals in ((1, {}), (2, {"ann": 2024}), (3, {"ann": 2024}), (4, {"ben": 2020})):
        before = opened.history.length
        charge_round(opened, proposal, arrivals, round=round)
        assert opened.history.length == before + 1 + (round == 1)
    charges = [event for event in verify(path).events if event.cohort]
    assert [event.cohort for event in charges] == ["2024..2024"] * 4
    assert [sorted(event.detail) for event in charges] == [["event", "register", "salt"]] * 4
    entries = [event.detail["register"] for event in charges]
    assert entries[0] == "0" * 64 != entries[1]
    assert entries[1] == entries[2] == entries[3]


def test_ledger_file_contains_no_names_or_plain_name_hashes(ledger: Any, path: Path) -> None:
    charge_round(ledger(), ask("one", "2024", "2024"), {"Ann Example": 2024})
    data = path.read_bytes()
    for guess in (b"Ann Example", hashlib.sha256(b"Ann Example").digest()[:8]):
        assert guess not in data


def test_refused_and_rolled_back_rounds_register_nobody(ledger: Any, path: Path) -> None:
    opened = ledger()
    train(opened, ask("first", "2024", "2024", num_rounds=10), *range(1, 11))
    second_run, date = ask("again", "2024", "2024"), Mock(side_effect=ZeroDivisionError)
    assert read_refusal_reason(opened.reserve, second_run, round=1, request="q", arrivals=date) is Reason.MAX_EPSILON
    stored = {"round": 10, "request": "digest first 10", "arrivals": date}
    assert opened.reserve(ask("first", "2024", "2024", num_rounds=10), **stored) == b"reply"
    assert not date.called, "neither a refusal nor a stored reply may read a date"
    with pytest.raises(ZeroDivisionError):
        opened.reserve(ask("new", "2026", "2026"), round=1, request="q", arrivals=date)
    assert not ledger().history.runs.keys() & {"again", "new"}
    with store.open_for_reading(path) as file:
        assert register.read_rows(file) == []


OTHER_UNIT = "x'000102030405060708090a0b0c0d0e0f'"


@pytest.mark.parametrize(
    "change",
    [
        *("DELETE FROM arrivals", "UPDATE arrivals SET cohort = 2026", "UPDATE arrivals SET sequence = sequence + 1"),
        *(f"INSERT INTO arrivals VALUES ({unit}, 2024, 4)" for unit in (OTHER_UNIT, "x'00'")),
        f"UPDATE arrivals SET unit = {OTHER_UNIT}",
    ],
)
def test_arrival_register_is_append_only_and_tampering_is_detected(ledger: Any, path: Path, change: str) -> None:
    charge_round(ledger(), ask("one", "2024", "2024"), {"ann": 2024})
    verify(path)
    triggers = [statement for statement in register.SCHEMA if "TRIGGER" in statement]
    with sqlite3.connect(path) as file:
        for statement in ("UPDATE arrivals SET cohort = 2026", "DELETE FROM arrivals"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                file.execute(statement)
        for name in ("changed", "deleted"):
            file.execute(f"DROP TRIGGER arrivals_are_never_{name}")
        for statement in (change, *triggers):
            file.execute(statement)
    for access in (lambda: verify(path), lambda: charge_round(ledger(), ask("two", "2025", "2025"), {"ann": 2025})):
        with pytest.raises(RunError, match="register of arrivals"):
            access()


# Restoring a backup.


@pytest.fixture
def backups(ledger: Any, path: Path) -> Backups:
    """A ledger that was backed up before its first run."""
    backups = Backups(ledger, path)
    backups.open()
    backups.back_up()
    return backups


def test_cohorts_survive_a_restore_without_lost_charges(backups: Backups) -> None:
    opened = backups.open()
    charge_round(opened, ask("one", "2024", "2024"), {"ann": 2024})
    backups.back_up()
    opened.end_run("one")
    restored = backups.put_back(anchor=opened.head())
    assert not restored.history.count_total_charges(0)
    assert charge_round(restored, ask("three", "2024", "2024"), {"ann": 2026, "ben": 2024}) == {"ann", "ben"}


@pytest.mark.parametrize("lost_head", [("2024", "2024"), ("2026", "2026")])
def test_charges_after_a_restore_do_not_depend_on_records(backups: Backups, lost_head: tuple[str, str]) -> None:
    """No figure reveals whether the lost rounds had new people, and nobody else's admission depends on it."""
    opened = backups.open()
    charge_round(opened, ask("one", "2024", "2024"), {"ann": 2024})
    backups.back_up()
    sizes = []
    for arrivals in ({"ann": 2024}, {"ann": 2024, "ben": 2026}, {}):
        opened = backups.put_back()
        charge_round(opened, ask("two", *lost_head), arrivals)
        anchor = opened.head()
        restored = backups.put_back(anchor=anchor)
        figures = [restored.history.count_total_charges(cohort) for cohort in (0, 2024, 2026)]
        later = charge_round(restored, ask("three", "2024", "2026"), {"ann": 2024, "cy": 2026, **arrivals}) - {"ben"}
        sizes.append((figures, later, anchor.arrivals, anchor.charged))
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][1] == {"ann"}


def test_people_trained_on_an_unanchored_branch_are_not_new_arrivals(backups: Backups) -> None:
    """The lost branch charged the same rounds as the anchor's branch, but registered people whom the latter lacks."""
    opened = backups.open()
    charge_round(opened, ask("run", "2024", "2024"), {})
    anchor = opened.head()
    assert charge_round(backups.put_back(), ask("run", "2024", "2024"), {"ann": 2024}) == {"ann"}
    restored = backups.put_back(anchor=anchor)
    assert charge_round(restored, ask("later", "2026", "2026"), {"ann": 2026}) == set()


def test_unknown_people_join_the_oldest_cohort_after_lost_rows(backups: Backups) -> None:
    opened = backups.open()
    charge_round(opened, ask("one", "2024", "2024"), {"ann": 2024})
    backups.back_up()
    charge_round(opened, ask("two", "2025", "2025"), {"ben": 2025})
    restored = backups.put_back(anchor=opened.head())
    history = restored.history
    assert history.count_total_charges(0) == events.count_mechanisms([ONCE] * 2), (
        "ben may be anybody unknown to the restored register"
    )
    assert history.count_total_charges(2024) == history.count_total_charges(2025) == events.count_mechanisms([ONCE])
    # His date is now 2026; whether cy is new is unknown, too.
    arrivals = {"ann": 2026, "ben": 2026, "cy": 2026}
    assert charge_round(restored, ask("three", "2024", "2026"), arrivals) == {"ann"}
    assert charge_round(restored, ask("four", None, "2023"), arrivals) == {"ben", "cy"}
    assert verify(backups.path).history.cohorts() == [0, 1, 2024, 2025, 2026, 2027]


def test_people_registered_on_both_branches_join_the_oldest_cohort(backups: Backups) -> None:
    opened = backups.open()
    charge_round(opened, ask("two", "2025", "2025"), {"ben": 2025})
    anchor = opened.head()
    restored = backups.put_back()
    # trained on before the gap is charged
    assert charge_round(restored, ask("here", "2026", "2026"), {"ben": 2026}) == {"ben"}
    restored.charge_gap(anchor)
    assert charge_round(restored, ask("three", "2025", "2026"), {"ben": 2026}) == set()
    assert charge_round(restored, ask("four", None, "2023"), {"ben": 2026}) == {"ben"}
    assert restored.history.count_total_charges(0) == events.count_mechanisms([ONCE] * 3)


def test_second_restore_remembers_that_rows_were_lost(backups: Backups) -> None:
    opened = backups.open()
    charge_round(opened, ask("two", "2025", "2025"), {"ben": 2025})
    restored = backups.put_back(anchor=opened.head())
    second_run = backups.put_back(anchor=restored.head())  # no entry was written since the backup
    assert second_run.history.lost_rows
    assert charge_round(second_run, ask("three", "2026", "2026"), {"ben": 2026}) == set()


def restore_beside_lost_ledger(backups: Backups, *, lost_person: str, restored_person: str) -> tuple[SiteLedger, Head]:
    """Restore a ledger from its backup next to the head of a lost branch; each has admitted somebody since."""
    opened = backups.open()
    charge_round(opened, ask("lost", "2025", "2025"), {lost_person: 2025})
    lost_head = opened.head()
    restored = backups.put_back()
    charge_round(restored, ask("here", "2026", "2026"), {restored_person: 2026})
    backups.back_up()
    return restored, lost_head


def test_doubts_of_a_lost_ledger_survive_a_second_restore(backups: Backups) -> None:
    """Entries after an event are in doubt; the newer backup contains that event, too."""
    restored, lost_head = restore_beside_lost_ledger(backups, lost_person="ben", restored_person="ben")
    restored.charge_gap(lost_head)
    second_run = backups.put_back(anchor=restored.head())
    assert charge_round(second_run, ask("three", "2026", "2026"), {"ben": 2026}) == set()


def test_local_doubts_cover_charges_of_another_branch(backups: Backups) -> None:
    """A register entry in doubt here counts for the oldest cohort even if another branch never doubted it."""
    restored, lost_head = restore_beside_lost_ledger(backups, lost_person="ann", restored_person="ben")
    doubting = backups.path.with_name("doubting.db")
    restored.charge_gap(lost_head)
    shutil.copy(backups.path, doubting)
    cohorts = backups.put_back()
    assert charge_round(cohorts, ask("there", "2026", "2026"), {"ben": 2026}) == {"ben"}
    shutil.copy(doubting, backups.path)
    reopened = backups.open()
    reopened.charge_gap(cohorts.head())
    assert charge_round(reopened, ask("last", "2026", "2026"), {"ben": 2026}) == set()
    assert reopened.history.count_total_charges(0) == events.count_mechanisms([ONCE] * 3), (
        "both of ben's rounds and the lost one must count"
    )

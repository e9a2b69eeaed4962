"""User-level sites: each round trains on users, and with arrival dates only on users admitted to the run."""

import json
import logging
from typing import Any
from unittest.mock import Mock

import pytest

import fedtune.sites.work as site_work
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.data.values import read_value
from fedtune.federation import site_round
from fedtune.model.adapter import Adapter
from fedtune.privacy.cohorts import Cohorts
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger import register, store
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.release import Reason
from fedtune.sites.real_site import SiteProcess
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import ConfigError
from fedtune.training.users import UserExamples

from ..cases import read_cases
from .conftest import LABELS, make_letters, write_records
from .test_work import train_at_north

COLUMNS = {"text": "text", "label": "label", "user": "id", "arrival": "since"}
"""Columns of the lead's files."""
PEOPLE = read_cases(__file__, "people")


def make_cohort_settings(first: str | None, last: str, **privacy: Any) -> dict[str, Any]:
    cohorts = Cohorts(period="year", first=first, last=last)
    about = {"unit": "user", "records_per_user": 5, "cohorts": cohorts}
    heldout = {"heldout_fraction": 0.5} if "metrics" in privacy else {}
    return {"data": {"columns": COLUMNS} | heldout, "privacy": about | privacy}


def write(site: Any, people: dict[str, list[str]]) -> None:
    """Write the site's file: one record per person and date."""
    rows = [(f"a letter of {person}", LABELS[0], person, date) for person, dates in people.items() for date in dates]
    write_records(site.data, rows, header=("body", "kind", "who", "came"))


@pytest.fixture
def site(station: Any) -> Any:
    cohort_site = station(**make_cohort_settings("2024", "2025"))
    write(cohort_site, PEOPLE)
    return cohort_site


@pytest.fixture
def sampled_users(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The users that each round trained on."""
    sampled: list[set[str]] = []
    limited = site_work.SiteWork._prepare_round

    def watch_round(self: Any, *args: Any, **kwargs: Any) -> Any:
        users = [record.fields["user"] for record in self.records.training]
        selected = limited(self, *args, **kwargs)
        assert len(selected[0]) == len(set(users))
        sampled.append(set(users))
        return selected

    monkeypatch.setattr(site_work.SiteWork, "_prepare_round", watch_round)
    return sampled


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        *(("2024", "2025", {"ann", "ben"}), ("2025", "2025", {"ben"}), (None, "2024", {"ann", "cy", "dora", "fay"})),
        *(("2026", "2030", {"eve"}), ("2030", "2030", set())),
    ],
)
def test_round_samples_only_admitted_cohorts(
    station: Any, sampled_users: Any, first: Any, last: str, expected: set[str]
) -> None:
    site = station(**make_cohort_settings(first, last))
    write(site, PEOPLE)
    site.update()
    assert sampled_users == [expected]
    with store.open_for_reading(site.folder / "ledger.db") as file:
        assert len(register.read_rows(file)) == len(expected)


def test_corrected_arrival_date_does_not_reset_the_budget(site: Any, sampled_users: list[set[str]]) -> None:
    site.update()
    write(site, PEOPLE | {"ann": ["2026-01-01"], "ben": [""], "gus": ["2026-07-01"]})
    site.restart()
    site.update(round=2)
    later, before = (
        make_letters(**make_cohort_settings("2026", "2026")),
        make_letters(**make_cohort_settings(None, "2023")),
    )
    site.update(later)
    site.update(before)
    assert sampled_users == [{"ann", "ben"}, {"ann", "ben"}, {"eve", "gus"}, {"cy", "dora", "fay"}]
    verify(site.folder / "ledger.db")


def test_held_out_people_are_admitted_and_registered(station: Any, sampled_users: Any, exact_scores: list[Any]) -> None:
    site = station(**make_cohort_settings("2024", "2024", metrics="noised"))
    write(site, {f"person {n}": [("2024-05-01", "2026-01-01")[n % 2]] for n in range(60)})
    site.update()
    assert all(int(person.split()[1]) % 2 == 0 for person in sampled_users[0])
    assert len(sampled_users[0]) > 5 < len(exact_scores[0])
    assert len(sampled_users[0]) + len(exact_scores[0]) == 30
    with store.open_for_reading(site.folder / "ledger.db") as file:
        assert len(register.read_rows(file)) == 30


def test_excluded_people_are_skipped_silently(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    one = site.ask()
    write(site, {"eve": ["2026-01"]})
    site.restart()
    other = site.ask(round=2)
    assert len(one.body.to_bytes()) == len(other.body.to_bytes())
    assert one.receipt.sequence + 2 == other.receipt.sequence, "the events must be the same with or without people"
    assert not any(word in caplog.text for word in ("eve", "2026", "admitted", "cohort"))


def test_arrival_dates_are_read_on_schedule_after_acceptance(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    pad, work = site_round._pad_duration, SiteProcess.work
    monkeypatch.setattr(site_round, "_pad_duration", lambda every_s: order.append("schedule") or pad(every_s))
    monkeypatch.setattr(SiteProcess, "work", lambda *args: order.append("records") or work(*args))
    site.update()
    assert order == ["schedule", "records", "records"]
    site.update()
    assert len(order) == 3, "resending a stored reply must not read the file"
    site.edit(limits={"max_local_steps": 1})
    assert site.refusal(round=2) is Reason.MAX_LOCAL_STEPS
    assert len(order) == 3


def test_unreadable_file_causes_no_charge(site: Any) -> None:
    site.data.write_bytes(b"\xff\xfe not a table")
    site.real.work = None  # an arbitrary error of the reader
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}


def test_cohort_settings_must_match_the_policy(site: Any) -> None:
    sent = select_settings_for_sites(site.config)
    assert sent.data.columns == {role: role for role in COLUMNS}, "the column's name must not be sent"
    assert "cohorts" not in make_letters().decisive()["privacy"], "a run without cohorts must keep its name"
    with pytest.raises(ConfigError, match="has no column for role 'arrival', which privacy"):
        make_letters(
            **make_cohort_settings(None, "2026") | {"data": {"columns": {"text": "t", "label": "l", "user": "u"}}}
        )
    without_cohorts = make_letters(data={"columns": COLUMNS}, privacy={"unit": "user", "records_per_user": 5})
    assert site.refusal(without_cohorts) is Reason.COHORTS
    changed = dict(sent.to_json())
    changed["privacy"] = changed["privacy"] | {"cohorts": {"period": "year", "first": "2024", "last": "2026"}}
    assert site.refusal(settings=json.dumps(changed)) is Reason.PLAN_CHANGED
    for invalid in ({"period": "year"}, {"period": "year", "last": 2026}, "2026", []):
        changed["privacy"] = changed["privacy"] | {"cohorts": invalid}
        assert site.refusal(settings=json.dumps(changed)) is Reason.SETTINGS
    assert read_policy(site.site_toml).population.arrivals == "year"
    assert site.ledger().history.runs == {}


@pytest.mark.parametrize(
    ("value", "month"),
    [
        *[("2026-03-14", "2026-03"), (" 2026-03 ", "2026-03"), ("2026-03-14T09:30:00+02:00", "2026-03")],
        *[("14.3.2026", ""), ("2026", ""), ("2026-13", ""), (2026, ""), (True, ""), ([], ""), ({}, ""), (1e300, "")],
        *[("9" * 100_000, ""), ("0000-01-01", ""), ("٢٠٢٦-٠٣", ""), (" ", ""), ("nan", "")],
    ],
)
def test_arrival_dates_are_parsed_to_months(value: object, month: str) -> None:
    assert read_value(value, "arrival", at="") == month


# A site with a user-level population: it trains on users, and scores each user once.

BY_USER: dict[str, Any] = {
    "data": {"columns": {"text": "text", "label": "label", "user": "who"}},
    "privacy": {"unit": "user", "records_per_user": 5},
}


def test_user_level_site_trains_on_its_users(
    station: Any, first_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The column "kind" also serves as the user: three users with at least 13 records each.
    seen, site = list[Any](), station(**BY_USER)
    train = site_work.train_round
    monkeypatch.setattr(site_work, "train_round", lambda *of, **rest: seen.append(of[2]) or train(*of, **rest))
    assert Adapter(site.update().tensors).digest() != first_adapter.digest()
    (examples,) = seen
    assert isinstance(examples, UserExamples)
    assert len(examples) == 3
    assert site.ledger().history.opening.unit == "user"


def test_user_level_site_refuses_record_level_runs_and_excess_records(station: Any) -> None:
    assert station("south").refusal(make_letters(**BY_USER)) is Reason.UNIT, "and vice versa"
    site = station(**BY_USER)
    assert site.refusal(make_letters()) is Reason.UNIT
    site.edit(limits={"max_records_per_user": 4})
    assert site.refusal() is Reason.MAX_RECORDS_PER_USER
    assert site.ledger().history.runs == {}


def test_record_with_several_users_is_skipped(station: Any) -> None:
    site = station(**BY_USER)
    # Skipped individually: a lead's settings must not make the answer depend on whether some record fits.
    write_records(site.data, [("letter", LABELS[0]), ("ours", f"{LABELS[0]},{LABELS[1]}")])
    site.update()
    write_records(site.data, [("ours", f"{LABELS[0]},{LABELS[1]}")])
    site.restart()
    site.update(round=2)


def make_records(users: dict[str, int]) -> list[Record]:
    """Make this many records of each user."""
    each = [(n, user) for user, count in users.items() for n in range(count)]
    return [Record({"text": f"letter {n} of {user}", "label": LABELS[n % 2 * 2], "user": user}) for n, user in each]


def test_user_adds_one_score_regardless_of_record_count(lead_key: SigningKey, exact_scores: Any) -> None:
    data = {"heldout_fraction": 0.5, "columns": {"text": "text", "label": "label", "user": "who"}}
    config = make_letters(data=data, privacy={"metrics": "noised", "unit": "user"})
    shared = RunModel(LoadedModel(config), config)
    for users in ({"one": 9, "another": 1}, {"one": 9}, {}):
        records = SiteRecords(training=make_records({"third": 3}), heldout=make_records(users))
        assert train_at_north(shared, lead_key, records).scores is not None
        assert exact_scores[-1].shape == (len(users),)
        assert ((exact_scores[-1] >= 0) & (exact_scores[-1] <= 1)).all()
    assert exact_scores[0][0] == exact_scores[1][0], "one user must not affect another's score"


def test_dropping_the_model_keeps_the_records_of_a_cohort() -> None:
    of_site, shared = SiteRecords(training=make_records({"one": 2, "another": 1}), heldout=[]), Mock()
    work = site_work.SiteWork("north", shared, of_site, declared_size=3, max_adapter_value=2.0)
    limited = work._restrict_to(frozenset({"one"}))
    work.drop_model()
    assert not any(hasattr(one, "shared") for one in (work, limited)), "two models would fill the memory"
    assert (len(work.records.training), len(limited.records.training)) == (3, 2)

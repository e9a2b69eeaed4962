"""A site whose population is protected by user: it trains on users, and scores each once."""

from collections.abc import Callable
from typing import Any

import pytest

import fedtune.sites.work as site_work
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.model.adapter import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import Reason
from fedtune.sites.shared_model import SharedModel
from fedtune.training.users import UserExamples

from .conftest import LABELS, letters, write_records
from .test_work import do

BY_USER: dict[str, Any] = {
    "data": {"columns": {"text": "text", "label": "label", "user": "who"}},
    "privacy": {"unit": "user", "records_per_user": 5},
}


@pytest.fixture
def site(station: Callable[..., Any]) -> Any:
    """The site north, whose column "kind" also says whose a record is: three users with 13 records or more."""
    return station(**BY_USER)


def test_it_trains_on_its_users(site: Any, first_adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    train = site_work.train_round
    monkeypatch.setattr(site_work, "train_round", lambda *of, **rest: seen.append(of[2]) or train(*of, **rest))
    assert Adapter(site.update().tensors).digest() != first_adapter.digest()
    (examples,) = seen
    assert isinstance(examples, UserExamples)
    assert len(examples) == 3
    assert site.ledger().history.opened.unit == "user"


def test_it_refuses_runs_of_records_and_more_than_it_lets_a_user_contribute(station: Any) -> None:
    assert station("south").refusal(letters(**BY_USER)) is Reason.UNIT, "as a site of records does runs by user"
    site = station(**BY_USER)
    assert site.refusal(letters()) is Reason.UNIT
    site.edit(limits={"max_records_per_user": 4})
    assert site.refusal() is Reason.MAX_RECORDS_PER_USER
    assert site.ledger().history.runs == {}


def test_a_record_of_several_users_costs_nobody_an_answer(site: Any) -> None:
    # Left out by itself: what a lead asks for must not make the answer depend on whether some record fits it.
    write_records(site.data, [("letter", LABELS[0]), ("ours", f"{LABELS[0]},{LABELS[1]}")])
    site.update()
    write_records(site.data, [("ours", f"{LABELS[0]},{LABELS[1]}")])
    site.restart()
    site.update(round=2)


def records(users: dict[str, int]) -> list[Record]:
    """So many of each user."""
    return [
        Record({"text": f"letter {number} of {user}", "label": ("invoice", "praise")[number % 2], "user": user})
        for user, count in users.items()
        for number in range(count)
    ]


def test_a_user_adds_one_score_to_the_sum_however_many_records_it_has(lead_key: SigningKey, scored: Any) -> None:
    columns = {"text": "text", "label": "label", "user": "who"}
    by_user = {"metrics": "noised", "unit": "user"}
    config = letters(data={"heldout_fraction": 0.5, "columns": columns}, privacy=by_user)
    shared = SharedModel(config)
    for users in ({"one": 9, "another": 1}, {"one": 9}, {}):
        own = SiteRecords(training=records({"third": 3}), heldout=records(users))
        assert do(shared, lead_key, own).scores is not None
        assert scored[-1].shape == (len(users),)
        assert ((scored[-1] >= 0) & (scored[-1] <= 1)).all()
    assert scored[0][0] == scored[1][0], "nor does one user move another's score"

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedtune.federation.aggregation import INVALID_UPDATE, NO_REPLY, RoundReplies, sort_replies
from fedtune.federation.protocol import Reply
from fedtune.model import Adapter
from fedtune.privacy.release import Reason, Refusal, Update

Make = Callable[..., Update]


def sort(adapter: Adapter, body: Update | Refusal) -> RoundReplies:
    return sort_replies({"a": Reply(body=body, receipt=None)}, asked=["a"], run="r", round=1, sent=adapter)


def test_a_fitting_update_is_kept(adapter: Adapter, update: Make) -> None:
    sorted_out = sort(adapter, update(tensors={name: 2 * value for name, value in adapter.tensors.items()}))
    assert sorted_out.failures == {}
    np.testing.assert_array_equal(sorted_out.updates["a"].tensors["head"], 2 * adapter.tensors["head"])


def test_scores_are_kept_beside_their_update(adapter: Adapter, update: Make) -> None:
    assert sort(adapter, update()).scores == {}
    assert sort(adapter, update(scores=(0.5, -0.25))).scores == {"a": (0.5, -0.25)}
    assert sort(adapter, update(scores=(0.5, -0.25), round=2)).scores == {}, "an invalid update has none either"


def with_value(value: float) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        head = tensors["head"].copy()
        head[-1] = value
        return tensors | {"head": head}

    return change


_FAULTS = {
    "nan": with_value(np.nan),
    "infinite": with_value(-np.inf),
    "wrong shape": lambda tensors: tensors | {"head": np.ones((4, 1), np.float32)},
    "broadcastable": lambda tensors: tensors | {"head": np.ones(1, np.float32)},
    "float64": lambda tensors: tensors | {"head": np.ones(4, np.float64)},
    "integers": lambda tensors: tensors | {"head": np.ones(4, np.int32)},
    "texts": lambda tensors: tensors | {"head": np.array(["a", "b", "c", "d"])},
    "extra tensor": lambda tensors: tensors | {"zz": np.ones(1, np.float32)},
    "missing tensor": lambda tensors: {"head": tensors["head"]},
    "renamed": lambda tensors: {"b.lora_A": tensors["b.lora_A"], "Head": tensors["head"]},
    "reordered": lambda tensors: dict(reversed(tensors.items())),
    "nothing": lambda tensors: {},
}


@pytest.mark.parametrize("fault", list(_FAULTS))
def test_an_update_that_does_not_fit_is_dropped(adapter: Adapter, update: Make, fault: str) -> None:
    sorted_out = sort(adapter, update(tensors=_FAULTS[fault](dict(adapter.tensors))))
    assert (sorted_out.updates, sorted_out.failures) == ({}, {"a": INVALID_UPDATE})


@pytest.mark.parametrize("changes", [{"run": "other"}, {"round": 2}, {"site": "b"}])
def test_an_update_of_another_round_run_or_site_is_dropped(
    adapter: Adapter, update: Make, changes: dict[str, object]
) -> None:
    assert sort(adapter, update(**changes)).failures == {"a": INVALID_UPDATE}


@pytest.mark.parametrize("reason", list(Reason))
def test_a_refusal_is_reported_by_its_reason(adapter: Adapter, reason: Reason) -> None:
    refusal = Refusal(site="a", run="r", round=1, reason=reason, asked="9", allowed="at most 3")
    sorted_out = sort(adapter, refusal)
    assert (sorted_out.updates, sorted_out.failures) == ({}, {"a": reason.value})
    assert sorted_out.refusals == {"a": refusal}


def test_sites_keep_the_order_in_which_they_were_asked(adapter: Adapter, update: Make) -> None:
    replies = {site: Reply(body=update(site=site), receipt=None) for site in ("c", "a", "b")}
    sorted_out = sort_replies(replies, asked=["a", "b", "c", "d"], run="r", round=1, sent=adapter)
    assert list(sorted_out.updates) == ["a", "b", "c"]
    assert sorted_out.failures == {"d": NO_REPLY}


def test_who_was_not_asked_is_not_heard(adapter: Adapter, update: Make) -> None:
    replies = {"stranger": Reply(body=update(site="stranger"), receipt=None)}
    sorted_out = sort_replies(replies, asked=["a"], run="r", round=1, sent=adapter)
    assert (sorted_out.updates, sorted_out.failures) == ({}, {"a": NO_REPLY})

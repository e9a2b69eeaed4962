"""Validation of updates and refusals at the lead, and rounding on the wire."""

import contextlib
import math
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.federation.bfloat16 import MAX_ROUNDING, add_difference, round_difference
from fedtune.federation.protocol import Reply, compute_answer_digest
from fedtune.federation.replies import BEYOND_PLAN, INVALID_UPDATE, LEFT_OUT, NO_REPLY, UNSIGNED_REPLY, RoundReplies
from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Difference, Reason, Refusal, Update
from fedtune.spec import RunError
from fedtune.training.update_bound import UpdateBound

from ..conftest import run_proposal
from .conftest import make_receipt, make_update

Check = Callable[..., RoundReplies]
UNBOUNDED = UpdateBound(value=defaultdict(lambda: math.inf), norm=math.inf)


def sign_body(body: Update | Refusal) -> Reply:
    """Build a reply with this body, signed by its site."""
    try:
        digest = compute_answer_digest(body)
    except ValueError:  # a body that no site could sign
        digest = "00" * 32
    return Reply(body=body, receipt=make_receipt(body.site, reply=digest))


@pytest.fixture
def check(adapter: Adapter, tmp_path: Path) -> Iterator[Check]:
    """Validate replies, or the body of site a, in round 1."""
    store = UpdateStore(tmp_path / "arrived", adapter)

    def make(
        body_or_replies: Any, bound: UpdateBound = UNBOUNDED, *, sites: str = "a", noise: float = 0.0, **changes: Any
    ) -> RoundReplies:
        plan = replace(run_proposal().plan, metrics_noise_multiplier=noise)
        fields = {"round": 1, "sent": adapter, "left_out": "", "update_dtype": "float32"} | changes
        reaches = dict.fromkeys(sites, bound)
        result = RoundReplies(proposal=run_proposal(plan=plan), reaches=reaches, arrived=store, **fields)
        replies = body_or_replies if isinstance(body_or_replies, dict) else {"a": sign_body(body_or_replies)}
        for site, reply in replies.items():
            result.add_reply(site, reply)
        return result

    with store:
        yield make


def test_matching_update_is_accepted(adapter: Adapter, check: Check) -> None:
    result = check(make_update(tensors={name: 2 * value for name, value in adapter.tensors.items()}))
    assert result.failures == {}
    arrived = result.arrived
    received = arrived.build_adapter(arrived.read_values("a", start=0, count=arrived.sent.num_values))
    np.testing.assert_array_equal(received.tensors["head"], 2 * adapter.tensors["head"])


def test_released_scores_are_kept_with_their_update(check: Check) -> None:
    assert check(make_update()).scores == {}
    assert check(make_update(scores=(0.5, -0.25)), noise=3.0).scores == {"a": (0.5, -0.25)}
    assert check(make_update(scores=(0.5, -0.25), round=2), noise=3.0).scores == {}, "scores must be dropped, too"
    assert check(make_update(scores=(0.5, 1e6)), noise=3.0).failures == {}
    for value in (1e10, -1e10, 1e200, 1.7e308):  # values too large to compute with
        assert check(make_update(scores=(0.5, value)), noise=3.0).failures == {"a": INVALID_UPDATE}
    # Scores are accepted exactly if the plan releases them.
    assert check(make_update(scores=(0.5, 0.5)), noise=0.0).failures == {"a": INVALID_UPDATE}
    assert check(make_update(scores=None), noise=3.0).failures == {"a": INVALID_UPDATE}


def test_unsigned_or_mismatched_refusal_is_not_final(check: Check) -> None:
    refusal = Refusal(site="a", run="r", round=1, reason=Reason.MAX_EPSILON)
    for reply, failure in (
        (Reply(body=refusal, receipt=None), "max_epsilon"),
        (replace(sign_body(replace(refusal, reason=Reason.PAUSED)), body=refusal), UNSIGNED_REPLY),
        (sign_body(replace(refusal, round=0)), UNSIGNED_REPLY),
        (sign_body(replace(refusal, run="s")), UNSIGNED_REPLY),
    ):
        result = check({"a": reply})
        assert (result.failures, result.refusals) == ({"a": failure}, {})


_FAULTS: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "nan": lambda tensors: tensors | {"head": np.array([1, 1, 1, np.nan], np.float32)},
    "infinite": lambda tensors: tensors | {"head": np.array([1, 1, 1, -np.inf], np.float32)},
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
def test_update_with_invalid_tensors_is_dropped(adapter: Adapter, check: Check, fault: str) -> None:
    result = check(make_update(tensors=_FAULTS[fault](dict(adapter.tensors))))
    # Strings have no canonical bytes, so nobody can have signed them.
    reason = UNSIGNED_REPLY if fault == "texts" else INVALID_UPDATE
    assert (result.sites, result.failures) == ((), {"a": reason})


@pytest.mark.parametrize("changes", [{"run": "other"}, {"round": 2}, {"site": "b"}])
def test_update_of_another_round_run_or_site_is_dropped(check: Check, changes: dict[str, object]) -> None:
    assert check(make_update(**changes)).failures == {"a": UNSIGNED_REPLY}, "nothing shows that this round was charged"


@pytest.mark.parametrize(
    "fault", ["no receipt", "of another answer", "of no answer", "not signed", "one value changed"]
)
def test_update_without_a_matching_receipt_is_rejected(check: Check, adapter: Adapter, fault: str) -> None:
    reply = sign_body(make_update())
    changed = dict(adapter.tensors) | {"head": np.array([1, 1, 1, 1.25], np.float32)}
    reply = {
        "no receipt": replace(reply, receipt=None),
        "of another answer": replace(reply, receipt=make_receipt(reply=compute_answer_digest(make_update(round=2)))),
        "of no answer": replace(reply, receipt=make_receipt()),
        "not signed": replace(reply, receipt=replace(reply.receipt, charged_rounds=9)),
        "one value changed": replace(reply, body=make_update(tensors=changed)),
    }[fault]
    result = check({"a": reply})
    assert (result.sites, result.failures) == ((), {"a": UNSIGNED_REPLY})


def test_update_exceeding_the_plan_bound_counts_as_a_site_failure(adapter: Adapter, check: Check) -> None:
    update = make_update(tensors={name: value + np.float32(0.5) for name, value in adapter.tensors.items()})
    assert check(update, UpdateBound(value=dict.fromkeys(adapter.tensors, 0.5), norm=2.0)).failures == {}
    for value, norm in ((0.49, math.inf), (1.0, 1.5)):
        bound = UpdateBound(value=dict.fromkeys(adapter.tensors, value), norm=norm)
        assert check(update, bound).failures == {"a": BEYOND_PLAN}


def move_update(adapter: Adapter, value: float) -> Difference:
    """Build a bfloat16 update that moves every value by the same amount."""
    bits = np.float32(value).view(np.uint32) >> 16
    return Difference({name: np.full(sent.shape, bits, np.uint16) for name, sent in adapter.tensors.items()})


def test_received_difference_is_added_to_the_sent_adapter(adapter: Adapter, check: Check) -> None:
    result = check(make_update(tensors=move_update(adapter, 0.5)), update_dtype="bfloat16")
    assert result.failures == {}
    received = result.arrived.build_adapter(result.arrived.read_values("a", start=0, count=adapter.num_values))
    for name, value in adapter.tensors.items():
        np.testing.assert_array_equal(received.tensors[name], value + np.float32(0.5))


@pytest.mark.parametrize("fault", ["nan", "infinite", "reshaped", "renamed", "whole", "unasked", "masked"])
def test_update_in_another_format_is_dropped(adapter: Adapter, check: Check, fault: str) -> None:
    valid = move_update(adapter, 0.5)
    tensors = {
        "nan": move_update(adapter, math.nan),
        "infinite": move_update(adapter, -math.inf),
        "reshaped": Difference({name: half.ravel() for name, half in valid.halves.items()}),
        "renamed": Difference({name.upper(): half for name, half in valid.halves.items()}),
        "whole": adapter.tensors,
        "unasked": valid,
        "masked": b"0" * 20,
    }[fault]
    result = check(make_update(tensors=tensors), update_dtype="float32" if fault == "unasked" else "bfloat16")
    assert (result.sites, result.failures) == ((), {"a": INVALID_UPDATE})


def test_update_bound_allows_only_bfloat16_rounding(adapter: Adapter, check: Check) -> None:
    # Honest training changed each value by 0.5 + 2**-9, the value with the largest rounding error.
    trained = {name: value + np.float32(0.5 + 2.0**-9) for name, value in adapter.tensors.items()}
    rounded = round_difference(trained, adapter.tensors)
    change = 0.5 + 2.0**-9
    bound = UpdateBound(value=dict.fromkeys(adapter.tensors, change), norm=change * math.sqrt(adapter.num_values))
    for tensors, failures in (
        (rounded, {}),
        (move_update(adapter, 0.5 + 2.0**-8), {}),
        (move_update(adapter, 0.5 + 2.0**-7), {"a": BEYOND_PLAN}),
    ):
        assert check(make_update(tensors=tensors), bound, update_dtype="bfloat16").failures == failures
    # Moving a value toward 0 is always allowed, and rounding may take it past 0.
    zero_bound = UpdateBound(value=dict.fromkeys(adapter.tensors, 0.0), norm=0.0)
    large = Adapter({name: np.full_like(value, 1001.7) for name, value in adapter.tensors.items()})
    zeroed = round_difference({name: np.zeros_like(value) for name, value in large.tensors.items()}, large.tensors)
    assert check(make_update(tensors=zeroed), zero_bound, sent=large, update_dtype="bfloat16").failures == {}


@pytest.mark.parametrize("reason", list(Reason))
def test_refusal_is_reported_with_its_reason(check: Check, reason: Reason) -> None:
    refusal = Refusal(site="a", run="r", round=1, reason=reason, requested="9", allowed="at most 3")
    result = check(refusal)
    assert (result.sites, result.failures) == ((), {"a": reason.value})
    assert result.refusals == {"a": refusal}


def test_replies_keep_site_order_and_ignore_excluded_or_unknown_sites(check: Check) -> None:
    def check_sites(*names: str, **options: str) -> tuple[tuple[str, ...], dict[str, str]]:
        result = check({site: sign_body(make_update(site=site)) for site in names}, **options)
        return result.sites, result.failures

    assert check_sites("c", "a", "b", sites="abcd") == (("a", "b", "c"), {"d": NO_REPLY})
    for names in ("a", "ac"):
        assert check_sites(*names, sites="abc", left_out="c") == (("a",), {"b": NO_REPLY, "c": LEFT_OUT})
    assert check_sites("stranger") == ((), {"a": NO_REPLY})


def round_trip_values(values: np.ndarray) -> np.ndarray:
    """Return the decoded values of an update relative to a zero adapter."""
    sent = {"w": np.zeros_like(values)}
    return add_difference(sent, round_difference({"w": values}, sent))["w"]


def test_bfloat16_rounding_matches_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    # Around each of 256 exponents with both signs: ends of a binade, ties and their neighbors.
    edges = (np.arange(512, dtype=np.uint32)[:, None] << 23) + np.array([0, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF])
    values = np.concatenate([bits, edges.ravel().astype(np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert (round_trip_values(values) + 0.0).tobytes() == (expected + 0.0).tobytes()  # adding 0.0 turns -0 into 0
    assert np.isnan(round_trip_values(np.array([0x7FC00001, 0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32))).all()


def test_received_adapter_equals_the_sent_adapter_plus_the_rounded_difference() -> None:
    rng = np.random.default_rng(1)
    sent = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 5)), ("b", (4,)))}
    trained = {name: value + np.float32(1e-3) * rng.normal(size=value.shape) for name, value in sent.items()}
    trained = {name: value.astype(np.float32) for name, value in trained.items()}
    received = add_difference(sent, round_difference(trained, sent))
    for name, value in received.items():
        assert (value.dtype, value.shape) == (np.float32, sent[name].shape)
        change = np.abs(value.astype(np.float64) - sent[name])
        assert (np.abs(value - trained[name]) <= MAX_ROUNDING * change + 2.0**-23 * np.abs(value)).all()
    unchanged = add_difference(sent, round_difference(sent, sent))
    assert all((unchanged[name] == sent[name]).all() for name in sent), "a frozen tensor must stay unchanged"


def test_stored_updates_are_read_back_in_pieces(tmp_path: Path, adapter: Adapter) -> None:
    with UpdateStore(tmp_path / "arrived", adapter) as store:
        store.put("a", adapter.tensors)
        store.put("b", {name: value + 1 for name, value in adapter.tensors.items()})
        values = store.read_values("a", start=0, count=store.sent.num_values)
        assert store.build_adapter(values).digest() == adapter.digest()
        pieces = [store.read_values("a", start=start, count=3) for start in range(0, store.sent.num_values, 3)]
        np.testing.assert_array_equal(np.concatenate(pieces), values)
        np.testing.assert_array_equal(store.read_values("b", start=0, count=store.sent.num_values), values + 1)


def test_update_folder_is_private_and_removed_after_the_round(tmp_path: Path, adapter: Adapter) -> None:
    folder = tmp_path / "checkpoints" / "arrived"
    UpdateStore(folder, adapter).__enter__().put("a", adapter.tensors)  # left behind by a lead that was killed
    with contextlib.suppress(KeyError), UpdateStore(folder, adapter) as store:
        assert list(folder.iterdir()) == []
        store.put("a", adapter.tensors)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        raise KeyError
    assert not folder.exists()


def test_full_disk_error_names_the_folder_and_required_bytes(tmp_path: Path, adapter: Adapter) -> None:
    with UpdateStore(tmp_path / "arrived", adapter) as store:
        (tmp_path / "arrived" / "a").symlink_to("/dev/full")
        with pytest.raises(
            RunError, match=rf"arrived cannot store the updates \(No space.*{4 * store.sent.num_values} byt"
        ):
            store.put("a", adapter.tensors)

"""Runs whose sites train different ranks: proposals, policies, offers and updates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.api.compose import compose_run
from fedtune.codec import decode
from fedtune.config import parse
from fedtune.federation.bfloat16 import round_difference
from fedtune.federation.replies import INVALID_UPDATE, RoundReplies
from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import cut_to_rank
from fedtune.privacy.proposal import Proposal
from fedtune.privacy.release import Offer, Reason
from fedtune.spec import ConfigError

from ..conftest import make_site_policy, run_proposal
from .conftest import make_update, read_reason
from .test_replies import UNBOUNDED, sign_body

SENT = Adapter(
    {
        "b.lora_A.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
        "b.lora_B.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
        "head.weight": np.ones(4, np.float32),
    }
)
RANKS = {"rank": 4, "ranks": {"a": 2, "b": 4}}


def receive(folder: Path, tensors: Any, *, dtype: str) -> tuple[dict[str, str], Any]:
    """Return the lead's failures and, if there are none, the adapter that it keeps of site a."""
    with UpdateStore(folder / "arrived", SENT) as arrived:
        fields = {"round": 1, "sent": SENT, "reaches": {"a": UNBOUNDED}, "update_dtype": dtype}
        replies = RoundReplies(proposal=run_proposal(**RANKS), arrived=arrived, **fields)
        replies.add_reply("a", sign_body(make_update(tensors=tensors)))
        if replies.failures:
            return replies.failures, None
        return {}, arrived.build_adapter(arrived.read_values("a", start=0, count=SENT.num_values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_update_of_a_smaller_rank_is_padded_with_the_sent_adapter(tmp_path: Path, dtype: str) -> None:
    trained = {name: value + 1 for name, value in cut_to_rank(SENT.tensors, 2).items()}
    sent = trained if dtype == "float32" else round_difference(trained, cut_to_rank(SENT.tensors, 2))
    failures, received = receive(tmp_path, sent, dtype=dtype)
    assert failures == {}
    assert received.has_same_shapes(SENT)
    change = {name: (received.tensors[name] - value).tolist() for name, value in SENT.tensors.items()}
    assert change["b.lora_A.weight"] == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert change["b.lora_B.weight"] == [[1, 1, 0, 0]] * 2
    assert change["head.weight"] == [1] * 4


@pytest.mark.parametrize("rank", [1, 3, None])
def test_update_of_another_rank_is_invalid(tmp_path: Path, rank: int | None) -> None:
    failures, _ = receive(tmp_path, cut_to_rank(SENT.tensors, rank), dtype="float32")
    assert failures == {"a": INVALID_UPDATE}


def test_proposal_names_ranks_only_if_they_differ() -> None:
    ranked, plain = run_proposal(**RANKS), run_proposal()
    assert "ranks" not in plain.to_json()
    assert decode(Proposal, json.loads(json.dumps(ranked.to_json()))) == ranked
    assert ranked.digest() != run_proposal(rank=4).digest()
    assert (ranked.find_rank("a"), ranked.find_rank("c"), plain.find_rank("a")) == (2, None, None)
    for rank in (0, 5):
        with pytest.raises(ConfigError, match="ranks"):
            run_proposal(rank=4, ranks={"a": rank})


def test_policy_limits_the_rank_of_its_own_site() -> None:
    policy_a, policy_b, policy_c = (make_site_policy(site, allow={"max_rank": 2}) for site in "abc")
    proposal = run_proposal(**RANKS)
    policy_a.check(proposal)
    for policy in (policy_b, policy_c):  # c has no rank in the run, so it would train the whole adapter
        (violation,) = policy.find_broken_rules(proposal)
        assert (violation.reason, violation.requested, violation.allowed) == (Reason.MAX_RANK, "4", "at most 2")
    assert policy_b.lower_rank(proposal).ranks == {"a": 2, "b": 2}
    assert policy_c.lower_rank(proposal) == proposal


def test_policy_limits_the_shared_rank_by_the_rank_of_its_own_site() -> None:
    policy = make_site_policy("a", allow={"max_rank": 2})
    policy.check(run_proposal(rank=32, ranks={"a": 2}))
    (violation,) = policy.find_broken_rules(run_proposal(rank=33, ranks={"a": 2, "b": 33}))
    assert violation.reason is Reason.MAX_RANK
    assert (violation.requested, violation.allowed) == ("a shared adapter of rank 33", "at most 32")


def test_site_of_a_smaller_largest_rank_offers_it_on_request(station: Any) -> None:
    site = station(allow={"max_rank": 1})
    assert read_reason(site.invite(**RANKS)) is Reason.MAX_RANK
    offer = site.invite(fields={"less": True}, **RANKS).body
    assert isinstance(offer, Offer)
    assert (offer.rank, offer.max_rounds) == (1, site.propose().plan.num_rounds)
    assert read_reason(site.invite(fields={"less": True}, rank=4)) is Reason.MAX_RANK, "ranks must not differ here"


def compose(*overrides: str) -> Any:
    return compose_run(["experiment=debug", "lora.rank=4", "privacy.noise_multiplier=4", *overrides])


def test_settings_name_each_sites_rank() -> None:
    config = compose("federation.num_sites=3", "federation.ranks=[1,4]")
    assert config.federation.site_ranks == {"site-1": 1, "site-2": 4, "site-3": 1}
    assert config.proposal(lead="ab" * 32, plan=config.plan()).ranks == config.federation.site_ranks
    plain = compose("federation.num_sites=3")
    assert config.digest() != plain.digest()
    assert "ranks" not in plain.decisive()["federation"], "a run without ranks must keep its name"


def test_lead_lowers_ranks_to_the_offers() -> None:
    config = compose("federation.num_sites=3", "federation.ranks=[1,4]")

    def make_offer(site: str, rank: int | None) -> Offer:
        return Offer(site=site, run="r", max_rounds=1, min_noise=4.0, rank=rank)

    assert config.can_use_offer(make_offer("site-2", 2))
    fitted = config.fit_to_offers([make_offer("site-1", 1), make_offer("site-2", 2)])
    assert fitted.federation.ranks == (1, 2, 1)
    assert fitted.federation.num_rounds == config.federation.num_rounds
    assert config.fit_to_offers([make_offer("site-2", 4)]) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.ranks=[0]"], "must be a finite number of at least 1"),
        (["federation.ranks=[2,5]"], "must be at most lora.rank = 4"),
        (["federation.ranks=[1,2,3,4,4]"], "must have at most one rank for each of "),
        (["federation.ranks=[2]", "lora.kind=dora"], "requires lora.kind = lora, not dora"),
        (["federation.ranks=[2]", "federation.algorithm=scaffold", "training=sgd"], "algorithm scaffold: the average"),
        (["federation.ranks=[2]", "federation.algorithm=fedmedian"], "algorithm fedmedian: the median"),
        (["federation.ranks=[2]", "federation.aggregation=secure", "training.local_steps=1"], "aggregation = plain"),
    ],
)
def test_invalid_rank_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        compose(*overrides)
    assert error.value.key == "federation.ranks"


def test_settings_of_ranks_survive_a_round_trip() -> None:
    config = compose("federation.num_sites=2", "federation.ranks=[2,4]")
    assert parse(json.loads(json.dumps(config.to_json()))) == config

"""Held-out scores where a user is the unit: one score a user goes into the noised sum, however many records it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fedtune.sites.work as work_module
from fedtune.config import RunConfig
from fedtune.data import Record
from fedtune.data.load import SiteRecords
from fedtune.federation.protocol import RoundRequest
from fedtune.privacy.keys import SigningKey
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.work import SiteWork


def records(users: dict[str, int]) -> list[Record]:
    """So many of each user."""
    return [
        Record({"text": f"letter {number} of {user}", "label": ("invoice", "praise")[number % 2], "user": user})
        for user, count in users.items()
        for number in range(count)
    ]


def test_a_user_adds_one_score_to_the_sum_however_many_records_it_has(
    letters: Callable[..., RunConfig], lead_key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"text": "text", "label": "label", "user": "who"}
    by_user = {"metrics": "noised", "unit": "user"}
    config = letters(data={"heldout_fraction": 0.5, "columns": columns}, privacy=by_user)
    shared = SharedModel(config)
    summed: list[npt.NDArray[np.float64]] = []
    original = work_module.noised_scores

    def watched(scores: npt.NDArray[np.float64], **settings: Any) -> tuple[float, float]:
        summed.append(scores)
        return original(scores, **settings)

    monkeypatch.setattr(work_module, "noised_scores", watched)
    proposal = config.proposal(lead=lead_key.public, plan=config.plan())
    request = RoundRequest(
        proposal=proposal, round=1, site="north", adapter_digest="ab" * 32, receipt=None, expires=1e12
    )
    for users in ({"one": 9, "another": 1}, {"one": 9}, {}):
        own = SiteRecords(training=records({"third": 3}), heldout=records(users))
        work = SiteWork("north", shared, own, declared_size=40, max_adapter_value=math.inf)
        assert work.do(request, shared.initial_adapter, 1, fingerprint_key=b"k").scores is not None
        assert summed[-1].shape == (len(users),)
        assert ((summed[-1] >= 0) & (summed[-1] <= 1)).all()
    assert summed[0][0] == summed[1][0], "nor does one user move another's score"

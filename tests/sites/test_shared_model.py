"""A model is tried before a private run may train on it, and whatever did not pass is tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedtune.config import RunConfig
from fedtune.data import Shapes
from fedtune.privacy.release import Reason, Refusal
from fedtune.sites import shared_model
from fedtune.sites.shared_model import SharedModel
from fedtune.spec import ConfigError

Tries = list[tuple[Shapes, bool]]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a try comes to: how far an example moves, or an error; nothing was tried before."""
    found: dict[str, Any] = {"moved": 0.0}
    monkeypatch.setattr(shared_model, "_passed", {})
    return found


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any]) -> Tries:
    """The shapes of each try, and whether a move was allowed."""
    made: Tries = []

    def check(model: Any, shapes: Shapes, *, inexact_allowed: bool, **_: Any) -> float:
        made.append((shapes, inexact_allowed))
        if isinstance(outcome["moved"], Exception):
            raise outcome["moved"]
        if outcome["moved"] and not inexact_allowed:
            raise ConfigError("model.path", "tiny", "gives an example another gradient")
        return float(outcome["moved"])

    monkeypatch.setattr(shared_model, "check_examples_alone", check)
    return made


def test_a_model_is_tried_once_for_private_runs_alone(letters: Callable[..., RunConfig], tries: Tries) -> None:
    assert SharedModel(letters(privacy={"mechanism": "none", "noise_multiplier": None})).moved == 0
    assert tries == []
    for _ in range(2):
        assert SharedModel(letters()).moved == 0
    assert len(tries) == 1


def test_a_model_that_fails_is_tried_and_refused_each_time(
    letters: Callable[..., RunConfig], tries: Tries, outcome: dict[str, Any]
) -> None:
    outcome["moved"] = ConfigError("model.path", "tiny", "mixes the examples of a batch")
    for number in (1, 2, 3):
        with pytest.raises(ConfigError, match="mixes the examples"):
            SharedModel(letters())
        assert len(tries) == number
    outcome["moved"] = 0.0
    SharedModel(letters())


def test_a_machine_that_is_not_exact_is_taken_where_that_was_allowed_alone(
    letters: Callable[..., RunConfig], tries: Tries, outcome: dict[str, Any]
) -> None:
    outcome["moved"] = 1e-7
    for _ in range(2):
        with pytest.raises(ConfigError, match="another gradient"):
            SharedModel(letters())
    assert SharedModel(letters(), inexact_allowed=True).moved == 1e-7
    with pytest.raises(ConfigError, match="another gradient"):
        SharedModel(letters())
    assert {shapes.row_shares for shapes, _ in tries} == {(1, 2, 4, 8), (1,)}, "plainer shapes are tried too"


def test_another_clip_norm_is_another_try(letters: Callable[..., RunConfig], tries: Tries) -> None:
    # It is what a move is measured in, and smaller ones bring other gradients below the bound.
    SharedModel(letters())
    SharedModel(letters(privacy={"max_grad_norm": 0.25}))
    assert len(tries) == 2


def test_a_site_serves_no_request_on_a_model_that_fails_and_charges_nothing(
    station: Callable[..., Any], tries: Tries, outcome: dict[str, Any]
) -> None:
    site = station()  # made with a model that passes
    outcome["moved"] = ConfigError("model.path", "tiny", "mixes the examples of a batch")
    shared_model._passed.clear()
    before = len(tries)
    for number in (1, 2):
        reply = site.ask()
        assert isinstance(reply.body, Refusal)
        assert reply.body.reason is Reason.SITE_ERROR
        assert (reply.body.asked, reply.body.allowed) == (None, None)
        assert len(tries) == before + number
    assert site.ledger().history.runs == {}


def test_a_model_that_served_a_run_without_privacy_is_tried_before_a_private_one(
    station: Callable[..., Any], letters: Callable[..., RunConfig], tries: Tries
) -> None:
    site = station(privacy={"mechanism": "none", "noise_multiplier": None})
    shared_model._passed.clear()
    before = len(tries)
    site.update()
    assert len(tries) == before
    site.update(letters(name="second"))
    assert len(tries) == before + 1

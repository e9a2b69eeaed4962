"""A model is tried before a private run may train on it, and what came of it is judged each time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.config import RunConfig
from fedtune.data import Shapes
from fedtune.privacy.release import Reason, Refusal
from fedtune.sites import shared_model
from fedtune.sites.session import Session
from fedtune.sites.shared_model import SharedModel
from fedtune.spec import ConfigError
from fedtune.tasks import save_task_model

Tries = list[Shapes]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a try comes to: how far an example moves, or an error; nothing was tried before."""
    found: dict[str, Any] = {"moved": 0.0}
    monkeypatch.setattr(shared_model, "_measured", {})
    return found


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any]) -> Tries:
    """The shapes of each try."""
    made: Tries = []

    def moved(model: Any, shapes: Shapes, **_: Any) -> float:
        made.append(shapes)
        if isinstance(outcome["moved"], Exception):
            raise outcome["moved"]
        return float(outcome["moved"])

    monkeypatch.setattr(shared_model, "moved_by_others", moved)
    return made


def test_a_model_is_tried_once_for_private_runs_alone(letters: Callable[..., RunConfig], tries: Tries) -> None:
    assert SharedModel(letters(privacy={"mechanism": "none", "noise_multiplier": None})).moved == 0
    assert tries == []
    for _ in range(2):
        assert SharedModel(letters()).moved == 0
    assert len(tries) == 1


def test_a_model_that_cannot_be_tried_is_tried_and_refused_each_time(
    letters: Callable[..., RunConfig], tries: Tries, outcome: dict[str, Any]
) -> None:
    outcome["moved"] = ConfigError("model.path", "tiny", "cannot be trained on examples of 24 tokens here")
    for number in (1, 2, 3):
        with pytest.raises(ConfigError, match="cannot be trained"):
            SharedModel(letters())
        assert len(tries) == number
    outcome["moved"] = 0.0
    SharedModel(letters())


@pytest.mark.parametrize(("moved", "message"), [(0.3, "mixes the examples"), (1e-7, "another gradient")])
def test_who_asks_again_gets_no_other_draw_of_the_try(
    letters: Callable[..., RunConfig], tries: Tries, outcome: dict[str, Any], moved: float, message: str
) -> None:
    outcome["moved"] = moved
    for _ in range(3):
        with pytest.raises(ConfigError, match=message):
            SharedModel(letters())
        assert len(tries) == 2, "once, and once more with plainer shapes"
        outcome["moved"] = 0.0


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
    assert {shapes.row_shares for shapes in tries} == {(1, 2, 4, 8), (1,)}, "plainer shapes are tried too"


def test_another_chat_template_wants_a_model_that_was_checked_for_it(letters: Callable[..., RunConfig]) -> None:
    prompted = {"labels": (), "columns": {"prompt": "p", "completion": "c"}}

    def settings(kind: str) -> RunConfig:
        return letters(
            task="causal_lm", model={"path": "random:llama", "sha256": None}, data={**prompted, "chat_template": kind}
        )

    kept = SharedModel(settings("none"))
    assert kept.serves(settings("none"), declared_size=kept_size(kept), inexact_allowed=False)
    assert not kept.serves(settings("model"), declared_size=kept_size(kept), inexact_allowed=False)
    with pytest.raises(ConfigError, match=r"data\.chat_template = 'model'"):
        SharedModel(settings("model"))


def test_a_run_begins_in_the_adapter_that_it_was_proposed_with_and_no_other(
    letters: Callable[..., RunConfig], tries: Tries, tmp_path: Path
) -> None:
    shared = SharedModel(letters())
    save_task_model(shared.model, tmp_path)
    digest = shared.initial_adapter.digest()

    def begun(digest: str) -> SharedModel:
        return shared.for_run(letters(model={"adapter": str(tmp_path), "adapter_sha256": digest}))

    assert begun(digest).first_adapter().digest() == digest
    with pytest.raises(ConfigError, match=rf"model\.adapter_sha256 = .*must be {digest}, that of the adapter"):
        begun("ab" * 32).first_adapter()  # of the one that lay in the folder before


def kept_size(shared: SharedModel) -> int:
    return sum(shared.config.declared_sizes().values())


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
    shared_model._measured.clear()
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
    shared_model._measured.clear()
    before = len(tries)
    site.update()
    assert len(tries) == before
    site.update(letters(name="second"))
    assert len(tries) == before + 1


class Others:
    """Stands in for the processes of other devices, which turn out to be of no use."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tried = 0

    def try_others(self, *_: Any) -> None:
        self.tried += 1

    def ready(self) -> None:
        raise ConfigError("runtime.num_devices", 2, "needs devices that compute the same gradients")


def test_devices_that_nobody_asked_for_need_not_be_of_use(
    letters: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_model, "Devices", Others)
    with pytest.raises(ConfigError, match="num_devices = 2: needs devices"):
        SharedModel(letters(runtime={"num_devices": 2}))
    monkeypatch.setattr(shared_model, "processes_that_pay", lambda *_, **__: 2)
    shared = SharedModel(letters())
    assert isinstance(shared._devices, Others)
    assert shared._devices.tried == 1
    assert shared.devices is None
    assert "the run goes on in one process" in caplog.text


@pytest.mark.parametrize(
    ("main", "counts"),
    [("/venv/bin/fedtune", True), ("/x/fedtune/__main__.py", True), ("/home/me/study.py", False), (None, False)],
)
def test_only_the_command_itself_begins_processes_that_nobody_asked_for(
    letters: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, main: str | None, counts: bool
) -> None:
    # Each runs the main program's file again, and a script would begin its runs once more.
    asked: list[float] = []
    monkeypatch.setattr(shared_model, "processes_that_pay", lambda _, *, gradients: asked.append(gradients) or 1)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=main))
    config = letters()
    SharedModel(config)
    SharedModel(config, session=Session())
    steps = config.federation.num_rounds * config.training.local_steps
    expected = steps * config.privacy.sampling_rate * sum(config.declared_sizes().values())
    assert asked == [pytest.approx(expected) if counts else 0.0, 0.0]


def test_a_run_that_leaves_records_out_learns_nothing_from_those_that_cannot_be_encoded() -> None:
    def within(*, leave_out: bool, lenient: bool = False) -> int | None:
        task = SimpleNamespace(tokenise=lambda records, tokenizer, *, data, lenient_within: lenient_within)
        model, data = SimpleNamespace(task=task, num_ids=7), SimpleNamespace(skips_unusable=leave_out)
        shared: Any = SimpleNamespace(model=model, tokenizer=None, config=SimpleNamespace(data=data))
        return SharedModel.tokenised(shared, [], lenient=lenient)  # type: ignore[return-value]

    assert (within(leave_out=False), within(leave_out=True), within(leave_out=False, lenient=True)) == (None, 7, 7)

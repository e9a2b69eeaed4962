"""A model is tried before a private run may train on it, and each run checks the result."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.data import Shapes
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.privacy.release import Reason, Refusal
from fedtune.sites import shared_model
from fedtune.sites.shared_model import LoadedModel, RunModel
from fedtune.spec import ConfigError
from fedtune.tasks.saved import save_task_model
from fedtune.training import batch_invariance

from .conftest import make_letters

PROMPTED = {"labels": (), "columns": {"prompt": "p", "completion": "c"}}
LLAMA = {"path": "random:llama", "sha256": None}


class Tries(list[Shapes]):
    """A stub for the trial that records its shapes; the next result is a given influence or an error."""

    moved: float | Exception = 0.0

    def try_model(self, model: Any, shapes: Shapes, **_: Any) -> float:
        self.append(shapes)
        if isinstance(self.moved, Exception):
            raise self.moved
        return self.moved


@pytest.fixture
def trial_calls(monkeypatch: pytest.MonkeyPatch) -> Tries:
    """A stub instead of the trial, and no cached results."""
    tries = Tries()
    monkeypatch.setattr(shared_model, "max_batch_influence", tries.try_model)
    monkeypatch.setattr(shared_model, "_measured", {})
    return tries


def test_model_trial_runs_once_per_clip_norm_for_private_runs(trial_calls: Tries) -> None:
    assert LoadedModel(make_letters(privacy={"mechanism": "none", "noise_multiplier": None})).moved == 0
    assert trial_calls == []
    for _ in range(2):
        assert LoadedModel(make_letters()).moved == 0
    assert len(trial_calls) == 1
    # The influence is measured in clip norms, and a smaller one brings other gradients below the bound.
    LoadedModel(make_letters(privacy={"max_grad_norm": 0.25}))
    assert len(trial_calls) == 2


def test_weak_signal_is_refused_before_the_model_trial(trial_calls: Tries) -> None:
    noise = {"noise_multiplier": 400.0}
    weak, allowed = (make_letters(privacy=noise, training={"ignore_weak_signal": on}) for on in (False, True))
    with pytest.raises(ConfigError, match=r"training\.ignore_weak_signal"):
        LoadedModel(weak, leads=True)
    assert trial_calls == []
    LoadedModel(allowed, leads=True)
    assert len(trial_calls) == 1


@pytest.mark.parametrize("second", [{"lora": {"rank": 3}}, {"privacy": {"max_grad_norm": 0.25}}], ids=["rank", "clip"])
def test_each_new_setting_undergoes_the_batch_invariance_trial(second: Any, monkeypatch: Any) -> None:
    """Without a stub: a second setting that mixes records must be refused although the first one passed."""
    assert shared_model.max_batch_influence is batch_invariance.max_batch_influence
    assert shared_model.fit_to_memory is batch_invariance.fit_to_memory
    LoadedModel(make_letters())
    build = shared_model.build_task_model

    def build_mixing(spec: Any, *, device: Any) -> Any:
        model = build(spec, device=device)
        embeddings = model.base.get_base_model().embeddings
        embeddings.register_forward_hook(lambda module, inputs, hidden: hidden + hidden.mean(dim=0, keepdim=True))
        return model

    monkeypatch.setattr(shared_model, "build_task_model", build_mixing)
    with pytest.raises(ConfigError, match=r"mixes the examples|differently depending on the other examples"):
        LoadedModel(make_letters(**second))


def test_failed_trial_is_repeated_and_refused_each_time(trial_calls: Tries) -> None:
    trial_calls.moved = ConfigError("model.path", "tiny", "cannot be trained on examples of 24 tokens on this machine")
    for number in (1, 2, 3):
        with pytest.raises(ConfigError, match="cannot be trained"):
            LoadedModel(make_letters())
        assert len(trial_calls) == number
    trial_calls.moved = 0.0
    LoadedModel(make_letters())


@pytest.mark.parametrize(
    ("moved", "message"), [(0.3, "mixes the examples"), (1e-7, "gradient differently depending on the other examples")]
)
def test_repeated_requests_do_not_repeat_the_trial(trial_calls: Tries, moved: float, message: str) -> None:
    trial_calls.moved = moved
    for _ in range(3):
        with pytest.raises(ConfigError, match=message):
            LoadedModel(make_letters())
        assert len(trial_calls) == 2, "one trial, and one more with simpler shapes"
        trial_calls.moved = 0.0


def test_inexact_gradients_are_accepted_only_with_permission(trial_calls: Tries) -> None:
    trial_calls.moved = 1e-7
    for _ in range(2):
        with pytest.raises(ConfigError, match="gradient differently depending on the other examples"):
            LoadedModel(make_letters())
    assert LoadedModel(make_letters(), inexact_allowed=True).moved == 1e-7
    with pytest.raises(ConfigError, match="gradient differently depending on the other examples"):
        LoadedModel(make_letters())
    assert {shapes.row_shares for shapes in trial_calls} == {(1, 2, 4, 8), (1,)}, "simpler shapes must be tried, too"


def test_changed_chat_template_requires_a_checked_model() -> None:
    without_template, chats = (
        make_letters(task="causal_lm", model=LLAMA, data={**PROMPTED, "chat_template": kind})
        for kind in ("none", "model")
    )
    loaded = LoadedModel(without_template)
    size = sum(without_template.declared_sizes().values())
    assert loaded.is_reusable_for(without_template, declared_size=size, inexact_allowed=False)
    assert not loaded.is_reusable_for(chats, declared_size=size, inexact_allowed=False)
    with pytest.raises(ConfigError, match=r"data\.chat_template = 'model'"):
        LoadedModel(chats)


def test_run_starts_only_from_the_adapter_of_its_proposal(trial_calls: Tries, tmp_path: Path) -> None:
    shared = LoadedModel(make_letters())
    save_task_model(shared.model, tmp_path)
    digest = compute_adapter_digest(tmp_path)

    def begin_run(digest: str) -> RunModel:
        return RunModel(shared, make_letters(model={"adapter": str(tmp_path), "adapter_sha256": digest}))

    assert begin_run(digest).first_adapter().digest() == shared.initial_adapter.digest()
    with pytest.raises(ConfigError, match=rf"model\.adapter_sha256 = .*must be {digest}, the digest of model.adapter"):
        begin_run("ab" * 32).first_adapter()  # of the adapter that was in the folder before


def test_runs_of_one_loaded_model_share_neither_settings_nor_records(trial_calls: Tries) -> None:
    loaded = LoadedModel(make_letters())
    first_run, second_run = (RunModel(loaded, make_letters(seed=seed)) for seed in (1, 2))
    assert (first_run.config.seed, second_run.config.seed, first_run.records is second_run.records) == (1, 2, False)


def test_site_refuses_requests_without_charge_if_the_trial_fails(station: Any, trial_calls: Tries) -> None:
    site = station()  # created with a model that passes
    trial_calls.moved = ConfigError("model.path", "tiny", "mixes the examples of a batch")
    shared_model._measured.clear()
    before = len(trial_calls)
    for number in (1, 2):
        reply = site.ask()
        assert isinstance(reply.body, Refusal)
        assert (reply.body.reason, reply.body.requested, reply.body.allowed) == (Reason.SITE_ERROR, None, None)
        assert reply.receipt.charged_rounds == 0
        assert len(trial_calls) == before + number
    assert site.ledger().history.runs == {}


def test_model_trial_runs_when_a_private_run_follows_a_plain_run(station: Any, trial_calls: Tries) -> None:
    site = station(privacy={"mechanism": "none", "noise_multiplier": None})
    shared_model._measured.clear()
    before = len(trial_calls)
    site.update()
    assert len(trial_calls) == before
    site.update(make_letters(name="second"))
    assert len(trial_calls) == before + 1


def test_unusable_optional_devices_fall_back_to_one_process(monkeypatch: Any, caplog: Any) -> None:
    other_devices = Mock()  # processes of other devices, which turn out to be unusable
    other_devices.prepare_workers.side_effect = ConfigError(
        "runtime.num_devices",
        2,
        "must be 1 on this machine: its devices do not compute bit-identical gradients",
    )
    monkeypatch.setattr(shared_model, "Devices", lambda *_, **__: other_devices)
    with pytest.raises(ConfigError, match="num_devices = 2: must be 1 on this machine: its devices"):
        LoadedModel(make_letters(runtime={"num_devices": 2}))
    monkeypatch.setattr(shared_model, "choose_num_processes", lambda *_, **__: 2)
    other_devices.start_trials.reset_mock()
    assert LoadedModel(make_letters()).devices is None
    other_devices.start_trials.assert_called_once()
    assert "the run continues in one process" in caplog.text


@pytest.mark.parametrize(
    ("main", "counts"),
    [("/venv/bin/fedtune", True), ("/x/fedtune/__main__.py", True), ("/home/me/study.py", False), (None, False)],
)
def test_only_the_command_line_starts_extra_processes(
    monkeypatch: pytest.MonkeyPatch, main: str | None, counts: bool
) -> None:
    # Each process runs the main program's file again, so a script would start its runs again.
    calls: list[float] = []
    monkeypatch.setattr(shared_model, "choose_num_processes", lambda _, *, gradients: calls.append(gradients) or 1)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=main))
    config = make_letters()
    LoadedModel(config)
    LoadedModel(config, alone=True)
    steps = config.federation.num_rounds * config.training.local_steps
    expected = steps * config.privacy.sampling_rate * sum(config.declared_sizes().values())
    assert calls == [pytest.approx(expected) if counts else 0.0, 0.0]


def test_unencodable_records_are_ignored_if_bad_records_are_skipped() -> None:
    def find_highest_id(*, leave_out: bool, lenient: bool = False) -> int | None:
        task = SimpleNamespace(tokenize=lambda records, tokenizer, *, data, lenient_within: lenient_within)
        model, data = SimpleNamespace(task=task, num_ids=7), SimpleNamespace(skips_bad_records=leave_out)
        shared: Any = SimpleNamespace(model=model, tokenizer=None, config=SimpleNamespace(data=data))
        return RunModel.tokenize_records(shared, [], lenient=lenient)  # type: ignore[return-value]

    assert (
        find_highest_id(leave_out=False),
        find_highest_id(leave_out=True),
        find_highest_id(leave_out=False, lenient=True),
    ) == (None, 7, 7)

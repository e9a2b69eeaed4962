"""What a start adapter inherits: derived from the folder of its run, and bound by the settings of the next run."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints, LeadState
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.report.from_run import _read_start_adapter, read_run
from fedtune.runs.environment import derive_start
from fedtune.spec import ConfigError

from ..conftest import edit_config, edit_json, list_tiny_overrides, read_result

DIGEST = "ab" * 32
ENTRY: dict[str, Any] = {"digest": DIGEST, "from": "a", "dataset": "b", "unit": "record", "delta": 1e-5, "epsilon": 2.0}


def derive(folder: Path) -> float | None:
    config = compose_run(list_tiny_overrides(into=folder.parent))
    epsilon: float | None = derive_start(replace(config, model=replace(config.model, adapter=str(folder))))[
        "start_epsilon"
    ]
    return epsilon


def edit_state(folder: Path, change: Callable[[LeadState], LeadState]) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", read_saved_config(folder).digest())
    checkpoints.save(change(checkpoints.load()))


def edit_receipts(folder: Path, **changes: Any) -> None:
    edit_state(folder, lambda s: replace(s, receipts={k: replace(value, **changes) for k, value in s.receipts.items()}))


def edit_epsilon(folder: Path, epsilon: float | None) -> None:
    edit_json(folder / "run.json", privacy=read_result(folder)["privacy"] | {"epsilon": epsilon})


def move_adapter(state: LeadState) -> LeadState:
    return replace(state, adapter=Adapter({name: value + 1 for name, value in state.adapter.tensors.items()}))


def test_start_epsilon_is_derived_and_decides_the_name_of_the_run(folder: Path, tmp_path: Path) -> None:
    words = list_tiny_overrides(f"model.adapter={folder}", into=tmp_path)
    config = compose_run(words)
    spent = read_result(folder)["privacy"]
    assert config.privacy.start == {
        "start_epsilon": pytest.approx(spent["epsilon"]),
        "start_delta": spent["delta"],
        "start_unit": "record",
        "start_keys": None,
    }, "one machine signed as all sites"
    assert compose_run([*words, f"privacy.start_delta={spent['delta']}"]) == config, "as in a saved config.yaml"
    for key in ("start_epsilon", "start_delta", "start_unit"):
        no_start = replace(config, privacy=replace(config.privacy, **{key: None}))
        assert no_start.digest() != config.digest(), "sites sign the name of the run"
    unknown = replace(config, privacy=replace(config.privacy, **dict.fromkeys(config.privacy.start)))
    with pytest.raises(ConfigError, match=r"privacy\.start_epsilon = 0\.1: must be"):
        compose_run([*words, "privacy.start_epsilon=0.1"])
    rounded = float(config.privacy.start_epsilon or 0.0) * (1 - 1e-7)
    other_start = compose_run([*words, f"privacy.start_epsilon={rounded}"])
    assert other_start.privacy.start_epsilon == rounded, "as derived on another machine"
    adapter_only = shutil.copytree(folder / "adapter", tmp_path / "alone" / "adapter")
    loose = compose_run([*words, f"model.adapter={adapter_only}"])
    assert (loose.digest(), loose.privacy.start_epsilon) == (unknown.digest(), None)
    with pytest.raises(
        ConfigError, match=r"start_epsilon = 0\.1: cannot be derived from the start's folder: set it to"
    ):
        compose_run([*words, f"model.adapter={adapter_only}", "privacy.start_epsilon=0.1"])
    with pytest.raises(ConfigError, match=r"privacy\.start_unit = 'user': must be record"):
        compose_run([*words, "privacy.start_unit=user"])
    with pytest.raises(ConfigError, match=r"privacy\.start_keys = .*: cannot be derived"):
        compose_run([*words, f"privacy.start_keys=[{DIGEST}]"])


def test_start_epsilon_requires_an_adapter_and_a_finite_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.start_epsilon = 0\.1: requires model\.adapter"):
        compose_run(list_tiny_overrides("privacy.start_epsilon=0.1", into=tmp_path))
    for invalid in (-0.1, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"start_epsilon = .*: must be a finite number of at least 0"):
            PrivacySpec(start_epsilon=invalid)


DEFECTS: dict[str, Callable[[Path], object]] = {
    "a lower epsilon": lambda folder: edit_epsilon(folder, 0.01),
    "no epsilon": lambda folder: edit_epsilon(folder, None),
    "no checkpoints": lambda folder: shutil.rmtree(folder / "checkpoints"),
    "no receipts": lambda folder: edit_state(folder, lambda state: replace(state, receipts={})),
    "no updates": lambda folder: edit_state(folder, lambda state: replace(state, rounds=())),
    "edited receipts": lambda folder: edit_receipts(folder, charged_rounds=1),
    "another adapter in the checkpoint": lambda folder: edit_state(folder, move_adapter),
    "other settings": lambda folder: edit_config(folder, privacy={"max_grad_norm": 0.5}),
    "seeded noise": lambda folder: edit_config(folder, runtime={"seeded_noise": True}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_start_epsilon_that_does_not_follow_from_the_folder_is_unknown(folder: Path, defect: str) -> None:
    assert derive(folder) is not None
    DEFECTS[defect](folder)
    assert derive(folder) is None


@pytest.mark.parametrize("bound", [2.0, None])
@pytest.mark.parametrize(
    "entry", [{}, {"epsilon": 0.0}, {"delta": 1e-300}, {"unit": "user"}, {"public": True, "epsilon": None}]
)
def test_report_reads_what_a_start_inherits_from_the_settings_alone(
    run_folder: Path, bound: float | None, entry: dict[str, Any]
) -> None:
    record = read_run(run_folder)
    config = replace(record.config, model=replace(record.config.model, adapter_sha256=DIGEST))
    privacy = replace(config.privacy, start_epsilon=bound, start_delta=1e-5, start_unit="record")
    config = replace(config, privacy=privacy)
    assert record.state is not None
    state = replace(record.state, start_adapter=ENTRY | entry)
    start = _read_start_adapter(replace(record, config=config, state=state))
    assert start is not None
    assert (start.epsilon, start.delta, start.unit, start.public) == (bound, 1e-5, "record", False)
    assert _read_start_adapter(replace(record, config=config, state=replace(record.state, start_adapter=None)))

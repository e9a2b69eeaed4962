import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fedtune
from fedtune.api.compose import compose_run
from fedtune.model.base_model import hash_model
from fedtune.model.spec import ModelSpec
from fedtune.runs import environment
from fedtune.runs.environment import Environment, read_environments, record_environment
from fedtune.spec import RUN_SCHEMA, RunError

from ..conftest import list_tiny_overrides

MODEL = hash_model(ModelSpec(path="random:bert"))


def note(folder: Path, *overrides: str) -> tuple[Environment, ...]:
    """Return the recorded environments after a run with these settings was started here."""
    # The parts of a loaded model that an environment records.
    shared: Any = SimpleNamespace(
        config=compose_run(list_tiny_overrides(*overrides, into=folder)),
        device=torch.device("cpu"),
        model=torch.nn.Linear(3, 2),
    )
    record_environment(folder, shared)
    return read_environments(folder)


def test_recorded_environment_describes_the_current_process(tmp_path: Path) -> None:
    assert read_environments(tmp_path) == ()
    (noted,) = note(tmp_path)
    assert (noted.python, noted.fedtune_version) == (platform.python_version(), fedtune.__version__)
    assert (noted.device, noted.libraries["torch"]) == ("cpu", torch.__version__)
    assert noted.machine.startswith(platform.machine())
    assert (noted.model_sha256, noted.total_parameters) == (MODEL, 8)
    text = (tmp_path / "environment.json").read_text()
    assert platform.node() not in text, "the machine's name must not be recorded"
    assert json.loads(text).keys() == {"schema_version", "environments"}
    assert json.loads(text)["schema_version"] == RUN_SCHEMA


def test_only_new_environments_are_recorded_with_their_randomness(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fedtune.model.base_model.hash_model", None)  # the hash of a pinned model is not computed again
    pinned = f"model.sha256={MODEL}"
    (noted,) = note(tmp_path, pinned)
    assert (noted.model_sha256, noted.sampling, noted.randomness) == (MODEL, "poisson", "operating_system")
    assert note(tmp_path, pinned) == (noted,)
    *_, seeded = note(tmp_path, pinned, "runtime.seeded_noise=true")
    assert (seeded.sampling, seeded.randomness) == ("poisson", "seeded")
    *_, of_real_sites = note(tmp_path, pinned, "runtime=deployment")  # the lead records nothing about them
    assert (of_real_sites.sampling, of_real_sites.randomness) == (None, None)
    monkeypatch.setattr(environment.platform, "python_version", lambda: "4.0.0")
    assert [entry.python for entry in note(tmp_path, pinned)] == [noted.python] * 3 + ["4.0.0"]


def test_damaged_environment_file_raises_a_run_error(tmp_path: Path) -> None:
    no_list, old_schema = {"schema_version": RUN_SCHEMA}, {"schema_version": RUN_SCHEMA - 1, "environments": []}
    empty: dict[str, Any] = {"environments": [{}]}
    for content in ("", *map(json.dumps, ([], {}, no_list, old_schema, no_list | empty))):
        (tmp_path / "environment.json").write_text(content)
        with pytest.raises(RunError, match=r"environment\.json is damaged"):
            read_environments(tmp_path)

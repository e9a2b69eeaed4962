import json
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fedtune
from fedtune.api.compose import compose_run
from fedtune.model.base_model import model_sha256
from fedtune.runs import environment
from fedtune.runs.environment import note_environment, read_environments
from fedtune.spec import RUN_SCHEMA, RunError

from ..conftest import tiny


@pytest.fixture
def shared(tmp_path: Path) -> Callable[..., Any]:
    """As much of a loaded model as an environment looks at."""
    return lambda *overrides: SimpleNamespace(
        config=compose_run(tiny(*overrides, into=tmp_path)), device=torch.device("cpu")
    )


def test_what_is_noted_is_this_process(shared: Callable[..., Any], tmp_path: Path) -> None:
    note_environment(tmp_path, shared())
    (noted,) = read_environments(tmp_path)
    assert (noted.python, noted.fedtune_version) == (platform.python_version(), fedtune.__version__)
    assert (noted.device, noted.libraries["torch"]) == ("cpu", torch.__version__)
    assert noted.machine.startswith(platform.machine())
    assert noted.model_sha256 == model_sha256(shared().config.model)
    assert (noted.sampling, noted.randomness) == ("poisson", "operating_system")
    text = (tmp_path / "environment.json").read_text()
    assert platform.node() not in text, "whose machine it is is nobody's business"


def test_of_real_sites_the_lead_notes_nothing(shared: Callable[..., Any], tmp_path: Path) -> None:
    note_environment(tmp_path, shared("runtime=deployment"))
    (noted,) = read_environments(tmp_path)
    assert (noted.sampling, noted.randomness) == (None, None)


def test_a_seeded_study_is_noted_as_one(shared: Callable[..., Any], tmp_path: Path) -> None:
    note_environment(tmp_path, shared("runtime.seeded_noise=true"))
    assert read_environments(tmp_path)[0].randomness == "seeded"


def test_a_pinned_model_is_not_hashed_again(
    shared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = model_sha256(shared().config.model)
    monkeypatch.setattr("fedtune.model.base_model.model_sha256", None)
    note_environment(tmp_path, shared(f"model.sha256={pinned}"))
    assert read_environments(tmp_path)[0].model_sha256 == pinned


def test_only_what_is_new_is_noted(shared: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_environment(tmp_path, shared())
    before = (tmp_path / "environment.json").read_bytes()
    note_environment(tmp_path, shared())
    assert (tmp_path / "environment.json").read_bytes() == before
    monkeypatch.setattr(environment.platform, "python_version", lambda: "4.0.0")
    note_environment(tmp_path, shared())
    assert [one.python for one in read_environments(tmp_path)][-1] == "4.0.0"
    assert len(read_environments(tmp_path)) == 2


def test_a_run_that_noted_nothing_has_none(tmp_path: Path) -> None:
    assert read_environments(tmp_path) == ()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "environments": []}',
                '{"schema_version": 2, "environments": [{}]}']
)  # fmt: skip
def test_a_damaged_note_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(RunError, match=r"environment\.json is damaged"):
        read_environments(tmp_path)


def test_the_file_has_a_version(shared: Callable[..., Any], tmp_path: Path) -> None:
    note_environment(tmp_path, shared())
    fields = json.loads((tmp_path / "environment.json").read_bytes())
    assert fields.keys() == {"schema_version", "environments"}
    assert fields["schema_version"] == RUN_SCHEMA

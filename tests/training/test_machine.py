"""Preparation of a model for this machine, and its error messages."""

import os
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from fedtune.model.frozen_linear import uses_onednn
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training import machine
from fedtune.training.machine import choose_micro_batch_shapes, count_usable_cores, prepare_model, resolve_device
from fedtune.training.spec import RuntimeSpec

from ..conftest import REPOSITORY

TINY = TaskModelSpec(model=ModelSpec(path="random:bert"), lora=LoraSpec(), task="classification", labels=("a", "b"))
SKIPS = replace(TINY, lora=LoraSpec(layers=(-1,)))
"""A model with a frozen first layer, whose output can be cached."""


def prepare_spec(spec: TaskModelSpec = TINY, *, max_length: int = 8, **runtime: Any) -> TaskModel:
    return prepare_model(lambda: build_task_model(spec), RuntimeSpec(num_threads=1, **runtime), max_length=max_length)


@pytest.mark.parametrize("page", ["conf/site.toml", "docs/configuration.md"])
def test_pages_state_the_defaults_of_the_code(page: str) -> None:
    text = " ".join((REPOSITORY / page).read_text().replace("\n#", "\n").split())
    assert f"{machine._TOKENS_OF_A_THREAD} per CPU thread, at most {machine._MAX_TOKENS:,}" in text
    assert f"{machine._TOKENS_ON_GPU:,} on a GPU" in text
    assert (machine._SHARE_OF_GPU, machine._SHARE_OF_MEMORY) == (2 / 5, 1 / 4)
    assert re.search("a quarter of (this|the) machine's memory.*, or two fifths of a GPU's", text)


def test_length_beyond_the_position_limit_is_refused(tmp_path: Path) -> None:
    """RoBERTa has 514 position rows for 512 tokens; a longer record once made a site fail."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=32, max_position_embeddings=514, **shape)).save_pretrained(tmp_path)
    spec = replace(TINY, model=ModelSpec(path=str(tmp_path)))
    max_positions = prepare_spec().base.config.max_position_embeddings
    for model_spec, length, last in ((TINY, max_positions + 1, max_positions), (spec, 513, 512), (spec, 514, 512)):
        with pytest.raises(
            ConfigError, match=rf"data\.max_length = {length}: must be at most {last}, the model's maximum length"
        ):
            prepare_spec(model_spec, max_length=length)
    shapes = choose_micro_batch_shapes(prepare_spec(spec, max_length=512), RuntimeSpec(), max_length=512)
    assert shapes.lengths[-1] == shapes.full == 512, "no length may exceed the last position"


def test_default_micro_batch_grows_with_threads() -> None:
    for threads, max_positions in ((1, 512), (2, 1024), (64, 2048)):
        runtime = RuntimeSpec(num_threads=threads)
        with patch.object(torch, "get_num_threads", return_value=threads):
            assert machine.micro_batch_tokens(runtime, torch.device("cpu")) == max_positions
            assert machine.micro_batch_tokens(replace(runtime, micro_batch_tokens=77), torch.device("cpu")) == 77
            assert machine.micro_batch_tokens(runtime, torch.device("cuda")) == 16384


def test_texts_per_record_divide_the_micro_batch() -> None:
    model = prepare_spec(replace(TINY, task="embedding", labels=(), texts=3), max_length=30)
    shapes = choose_micro_batch_shapes(model, RuntimeSpec(micro_batch_tokens=1200), max_length=30)
    assert max(rows * 3 * length for length in shapes.lengths for rows in shapes.rows(length)) <= 1200
    assert shapes.rows(24)[0] == 1200 // 3 // 24


@pytest.mark.parametrize("onednn", [True, False])
def test_onednn_can_be_disabled(onednn: bool) -> None:
    has_onednn = torch._C._has_mkldnn and platform.machine().lower() in ("x86_64", "amd64")
    assert uses_onednn(prepare_spec(onednn=onednn)) == (onednn and has_onednn)


def test_frozen_states_are_cached_if_they_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trains = prepare_spec(SKIPS), prepare_spec()
    a_mib = 2**20 // (4 * model.base.config.hidden_size)

    def find_most_states(runtime: RuntimeSpec, num_tokens: int) -> bool:
        fits, more = (
            machine.do_frozen_states_fit(model, runtime, num_tokens=count) for count in (num_tokens, num_tokens + 1)
        )
        return fits and not more

    assert find_most_states(RuntimeSpec(kept_states_mib=1), a_mib)
    assert not machine.do_frozen_states_fit(model, RuntimeSpec(kept_states_mib=0), num_tokens=1)
    assert machine.measure_frozen_states_mib(trains, num_tokens=10**9) == 0, "its first layer must train"
    assert machine.do_frozen_states_fit(trains, RuntimeSpec(kept_states_mib=0), num_tokens=10**9)
    # By default a quarter of the available memory is reserved for them.
    for text, mib in (("MemTotal: 9 kB\nMemAvailable:   40960 kB\n", 10), ("nothing of the kind\n", 1024)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert find_most_states(RuntimeSpec(), mib * a_mib)


def test_states_exceeding_memory_go_to_a_folder_with_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare_spec(SKIPS)
    a_mib = 2**20 // (4 * model.base.config.hidden_size)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=20 * 2**20))
    on_disk = RuntimeSpec(kept_states_mib=0, kept_states_folder=str(tmp_path))
    assert machine.find_frozen_states_folder(model, on_disk, num_tokens=10 * a_mib) == tmp_path
    assert machine.find_frozen_states_folder(model, on_disk, num_tokens=10 * a_mib + a_mib) is None, (
        "at most half of the free space may be used"
    )
    assert machine.find_frozen_states_folder(model, RuntimeSpec(kept_states_mib=0), num_tokens=1) is None
    missing = replace(on_disk, kept_states_folder=str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"runtime\.kept_states_folder = .*: must be a folder that this process can write to"
    ):
        machine.find_frozen_states_folder(model, missing, num_tokens=1)


def test_states_on_disk_are_private_and_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda name: (modes.append(os.stat(name).st_mode & 0o777), unlink(name)))
    states = machine.allocate_states(5, 3, dtype=torch.bfloat16, folder=tmp_path)
    states[:] = torch.arange(15).view(5, 3)
    assert states.dtype == torch.bfloat16
    assert states[4].tolist() == [12, 13, 14]
    assert modes == [0o600]
    assert list(tmp_path.iterdir()) == []
    assert machine.allocate_states(0, 3, dtype=torch.float32, folder=tmp_path).shape == (0, 3)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_refused_except_for_planning() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"runtime\.device = 'cuda': requires a GPU"):
        resolve_device("cuda")
    assert resolve_device("cuda", must_exist=False).type == "cpu"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to cores")
def test_process_on_one_core_uses_one_thread() -> None:
    # Threads compete if there are more threads than cores.
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert count_usable_cores() == 1
        prepare_model(lambda: build_task_model(TINY), RuntimeSpec(), max_length=8)
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("asked", "cores"), [("", 4), ("2", 2), ("9", 4), ("0", 4), ("2,1", 4)])
def test_omp_num_threads_can_lower_the_core_count(monkeypatch: pytest.MonkeyPatch, asked: str, cores: int) -> None:
    monkeypatch.setattr("fedtune.system.cpu_affinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert count_usable_cores() == cores


@pytest.mark.parametrize(
    ("runtime", "gradients", "gib", "processes"),
    [
        *(({}, 1e6, 64, 4), ({}, 1e6, 5, 2), ({}, 1e6, 1, 1), ({}, 1e3, 64, 1), ({"num_threads": 2}, 1e6, 64, 1)),
        *(({"kind": "ray"}, 1e6, 64, 1), ({"kind": "deployment"}, 1e6, 64, 1), ({"num_devices": 7}, 0.0, 1, 7)),
    ],
    ids=str,
)
def test_long_cpu_simulation_uses_one_process_per_core(
    monkeypatch: pytest.MonkeyPatch, runtime: dict[str, object], gradients: float, gib: int, processes: int
) -> None:
    monkeypatch.setattr(machine, "count_usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "_measure_memory_bytes", lambda: gib * 2**30)
    spec = RuntimeSpec(**({"device": "cpu"} | runtime))  # type: ignore[arg-type]
    assert machine.choose_num_processes(spec, gradients=gradients) == processes

"""Runs on the simulated accelerator, whose kernels are the CPU's, are bit-identical to CPU runs for tasks, formats and
units.

Tensors of two devices in one operator raise an error, as on a GPU.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .built import run_on_it

WORDS = ("card", "bank", "order", "item", "please", "where", "my", "the", "it", "is", "was", "now", "again", "bag")
GRADES = ("low", "mid", "high")

OWN = (
    *("data.validation_file=null", "data.test_file=null", "data.validation_fraction=0.2", "data.test_fraction=0.2"),
    *("data.train_fraction=1.0", "data.declared_sizes=20", "data.validation_rows=8", "data.test_rows=8"),
)
GRADED = f"data.labels=[{','.join(GRADES)}]"
PLAIN = ("data.labels=[]", "head.scale=1")
LLAMA = ("model=random_llama", *PLAIN)
RANGE = ("data.target_range=[0,4]", *PLAIN)
TASKS = {
    "classification": ("data.columns={text: text, label: grade}", GRADED),
    "multi_label": ("data.columns={text: text, labels: grades}", GRADED),
    "ordinal": ("data.columns={text: text, label: grade}", GRADED),
    "regression": ("data.columns={text: text, target: score}", *RANGE),
    "token_classification": (
        *("data.columns={tokens: words, tags: tags}", GRADED, "data.max_length=8", "data.windows=2", "data.stride=2"),
        *("head.init=zero", "head.center=false"),
    ),
    "causal_lm": ("data.columns={prompt: text, completion: other}", *LLAMA, "evaluation.generate=true"),
    "preference": ("data.columns={prompt: text, chosen: other, rejected: third}", *LLAMA),
    "embedding": ("data.columns={text: text, other: other, target: score}", *RANGE),
    "embedding of triplets": ("data.columns={anchor: text, positive: other, negative: third}", *PLAIN),
}


@pytest.fixture
def write_task_overrides(tmp_path: Path, tiny: Any) -> Callable[..., list[str]]:
    """Return a function for the overrides of a tiny seeded run of a task, with a file that suits every task."""
    draws = np.random.default_rng(4)

    def record(number: int) -> dict[str, Any]:
        grade, person, names = GRADES[number % 3], f"person {number // 3}", ("text", "other", "third")
        texts: dict[str, Any] = {name: " ".join(draws.choice(WORDS, size=draws.integers(2, 9))) for name in names}
        texts["words"] = texts["text"].split()
        texts["tags"] = [("O", f"B-{grade}", f"I-{grade}")[place % 3] for place, _ in enumerate(texts["words"])]
        return {**texts, "grade": grade, "grades": f"{grade};low", "score": number % 5, "person": person}

    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record(number)) + "\n" for number in range(72)))

    def make(task: str, *overrides: str, name: str) -> list[str]:
        return tiny(
            *(f"task={task.partition(' ')[0]}", f"data.train_file='{file}'", *OWN, *TASKS[task]),
            *("runtime.seeded_noise=true", "runtime.onednn=false", "runtime.micro_batch_tokens=128", *overrides),
            into=tmp_path,
            name=name,
        )

    return make


def run_commands_on_device(*commands: list[str], then: str = "", **settings: object) -> str:
    """Run commands of fedtune, and then code, in a process with the device; return their output."""
    code = "from tests.simulated_accelerator.tried import prefer_replays; prefer_replays()\n"
    code += f"from fedtune.cli.main import main\nfor words in {list(commands)!r}: assert main(words) == 0, words\n"
    code += then
    return run_on_it(code, **{"SIM_SDPA": "fused", **settings})


@pytest.fixture
def require_same_bits(
    write_task_overrides: Any, adapter_of: Any, result_of: Any, tmp_path: Path
) -> Callable[..., None]:
    """Require the same adapter and scores from a run on the CPU and a run on simulated devices."""

    def require(task: str, *overrides: str, devices: int = 1) -> None:
        counted = {"cpu": "runtime.num_devices=1", "auto": f"runtime.num_devices={devices}"}
        runs = (
            write_task_overrides(task, *overrides, f"runtime.device={one}", counted[one], name=one) for one in counted
        )
        commands = [["simulate", *run] for run in runs]
        then = "print('replays in steps:', torch.sim.replays)"
        printed = run_commands_on_device(*commands, then=then, SIM_DEVICES=devices)
        # Graphs are used neither for users nor without privacy.
        replayed = not {"privacy=none", "privacy.unit=user"} & {*overrides}
        assert printed.rstrip().endswith("replays in steps: 0") is not replayed
        cpu, sim = tmp_path / "cpu", tmp_path / "auto"
        assert read_device(sim).startswith("sim, a simulated device 0, deterministic algorithms, no TF32")
        assert read_device(cpu) == "cpu"
        assert adapter_of(sim) == adapter_of(cpu) != {}
        assert result_of(sim)["final"]["metrics"] == result_of(cpu)["final"]["metrics"]

    return require


def read_device(folder: Path) -> str:
    (environment,) = json.loads((folder / "environment.json").read_text())["environments"]
    return str(environment["device"])


@pytest.mark.by_day("classification")
@pytest.mark.by_day("causal_lm")
@pytest.mark.parametrize("task", TASKS)
def test_every_task_matches_cpu_bits_on_the_device(require_same_bits: Any, task: str) -> None:
    require_same_bits(task)


KEPT = ("lora.layers=[-1]", "runtime.kept_states_mib=100")
BY_USER = ("privacy.unit=user", "privacy.records_per_user=2", "+data.columns.user=person")


ALONE = ("privacy=none", "lora.kind=dora", "runtime.gradient_checkpointing=true")
ALONE += tuple(f"model.dtype={dtype}" for dtype in ("bfloat16", "mixed", "nf4"))
SUMS = ("federation.aggregation=secure", "federation.num_sites=3")
SCORES = ("privacy.metrics=noised", "data.heldout_fraction=0.3")
WAYS = [*((one,) for one in ALONE), KEPT, BY_USER, (*KEPT, *BY_USER), SUMS, SCORES]


@pytest.mark.nightly
@pytest.mark.parametrize("overrides", WAYS, ids=str)
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_every_dtype_and_training_mode_matches_cpu_bits(
    require_same_bits: Any, task: str, overrides: tuple[str, ...]
) -> None:
    require_same_bits(task, *overrides)


@pytest.mark.nightly
@pytest.mark.parametrize("overrides", [(), KEPT, BY_USER], ids=str)
@pytest.mark.parametrize("task", ["classification", "causal_lm", "preference"])
def test_two_devices_match_a_single_device_bit_for_bit(
    require_same_bits: Any, task: str, overrides: tuple[str, ...]
) -> None:
    require_same_bits(task, *overrides, devices=2)


@pytest.mark.nightly
def test_evaluate_and_generate_output_is_equal_on_the_device(write_task_overrides: Any, tmp_path: Path) -> None:
    run_commands_on_device(["simulate", *write_task_overrides("causal_lm", "runtime.device=auto", name="run")])
    data = ["--data", str(tmp_path / "records.jsonl")]
    for name, *words in (["evaluate", *data], ["generate", "--prompt", "my card", "--max-new-tokens", "9"]):
        cpu, sim = (
            run_commands_on_device([name, str(tmp_path / "run"), *words, "--device", device])
            for device in ("cpu", "auto")
        )
        assert cpu == sim != ""


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gradient", "records", "sensitivity"])
def test_audits_run_on_the_device(write_task_overrides: Any, kind: str) -> None:
    words = [
        word
        for word in write_task_overrides("classification", "runtime.device=auto", name="audited")
        if "seeded" not in word
    ]
    run_commands_on_device(["audit", *words, f"audit.kind={kind}", "audit.canaries=20", "audit.tries=3"])


@pytest.mark.nightly
def test_gpu_script_runs_on_the_simulated_device(tmp_path: Path) -> None:
    into = tmp_path / "results.json"
    words = ["run.py", "--tiny", "--into", str(into)]
    code = f"sys.path.insert(0, 'simulations/gpu'); sys.argv = {words!r}; import run; run.main()"
    run_on_it(code, timeout_s=900, SIM_DEVICES=2)
    (name,), (steps,) = zip(*json.loads(into.read_text()).items(), strict=True)
    assert name.startswith("sim, a simulated device")
    assert not [step for step, found in steps.items() if "error" in found]
    assert steps["several-devices"]["devices"] == 2
    assert steps["speed-8b"]["4 rows"]["private_peak_bytes"] > 0


@pytest.mark.nightly
@pytest.mark.by_day("1")
@pytest.mark.parametrize("devices", [1, 2])
def test_batch_dependent_attention_falls_back_to_products(
    write_task_overrides: Any, tmp_path: Path, devices: int
) -> None:
    overrides = ("federation.num_rounds=1", "runtime.device=auto", f"runtime.num_devices={devices}")
    run_commands_on_device(
        ["simulate", *write_task_overrides("causal_lm", *overrides, name="run")],
        SIM_SDPA="by_rows",
        SIM_DEVICES=devices,
    )
    assert read_device(tmp_path / "run").endswith("no TF32, unfused attention")


@pytest.mark.nightly
def test_device_without_float64_falls_back_to_the_cpu(write_task_overrides: Any, tmp_path: Path) -> None:
    run = [
        "simulate",
        *write_task_overrides("classification", "federation.num_rounds=1", "runtime.device=auto", name="run"),
    ]
    run_commands_on_device(run, SIM_NO_FLOAT64=1)
    assert read_device(tmp_path / "run") == "cpu"
    assert "device 'sim' does not support float64 and is not used" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.nightly
def test_gpu_script_runs_selected_tests_on_the_device() -> None:
    code = (
        "sys.path.insert(0, 'simulations/gpu'); import run; run.TESTED = ['four_bit', 'adapter_kinds']\n"
        "print(run.tests(run.Machine(device=run.resolve_device('auto'), tiny=True))['last_line'])"
    )
    assert " passed" in run_on_it(code, timeout_s=900, SIM_SDPA="fused")

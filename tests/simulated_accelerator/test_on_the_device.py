"""Clipping, synchronization and memory of training and scoring on the device."""

import pytest

from .built import run_on_it


def run_tried(function: str, **settings: object) -> list[str]:
    return run_on_it(f"from tests.simulated_accelerator import tried; tried.{function}()", **settings).splitlines()


def test_trial_clips_on_the_device_as_training_steps_do() -> None:
    as_it_is, by_company = map(float, run_tried("print_clipping_by_batch", SIM_SDPA="fused"))
    assert as_it_is == 0.0
    assert by_company > 1e-4


def test_norms_are_batch_invariant_unlike_the_native_reduction() -> None:
    found = [list(map(int, line.split())) for line in run_tried("print_norm_differences")]
    assert sum(by_cuda for _, by_cuda, _ in found) > 4, "the stand-in for CUDA's reduction must depend on the rows"
    assert [ours for _, _, ours in found] == [0] * 4


def test_micro_batch_without_usable_units_does_not_change_the_sum() -> None:
    assert run_tried("print_unusable_units") == ["0"] * 6


def test_replayed_step_never_waits_for_the_device_and_sums_the_same_bits() -> None:
    launched, expected, replayed, found = map(int, run_tried("print_waits_of_a_step", SIM_SDPA="fused"))
    assert launched > replayed == 0
    assert found == expected != 0


def test_graph_serves_only_the_clip_norm_and_tensors_of_its_capture() -> None:
    assert run_tried("print_capture", SIM_SDPA="fused") == ["None", "1", "0", "0"]


@pytest.mark.parametrize(
    ("graphs", "reason"),
    [
        ("refused", "this device captures no graph"),
        ("other_bits", "a replay differs from the same kernels one at a time"),
    ],
)
def test_steps_launch_their_kernels_if_a_replay_fails_or_differs(graphs: str, reason: str) -> None:
    assert run_tried("print_capture", SIM_SDPA="fused", SIM_GRAPHS=graphs) == [reason, "0", "0", "0"]


def test_users_synchronize_as_rarely_as_records() -> None:
    ((of_users, of_records),) = (map(int, line.split()) for line in run_tried("waits_for_the_device"))
    assert of_users == of_records


def test_trial_stores_weights_on_the_device_if_memory_allows() -> None:
    with_room, without = map(int, run_tried("print_weights_moved"))
    assert with_room == 0 < without


def test_scoring_without_memory_names_the_setting() -> None:
    (line,) = run_tried("print_scoring_error", SIM_MEMORY_MIB=64)
    assert line.startswith("evaluation.max_tokens = 4096: must be smaller: the device ran out of memory")


def test_accelerator_is_configured_for_deterministic_computation() -> None:
    code = (
        "import os; from fedtune.training.machine import resolve_device; resolve_device('auto')\n"
        "products = torch.backends.cuda.matmul\n"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'])\n"
        "print(products.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled())\n"
        "print(products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction)\n"
    )
    assert run_on_it(code).split() == ["True", ":4096:8", *["False"] * 5]


@pytest.mark.nightly
def test_repeatability_check_detects_a_nondeterministic_device() -> None:
    code = (
        "sys.path.insert(0, 'simulations/gpu'); import run\n"
        "machine = run.Machine(device=run.resolve_device('auto'), tiny=True)\n"
        "print(*run.repeats(machine).values())\n"
        "torch.use_deterministic_algorithms(False)\n"
        "print(*run.repeats(machine).values())\n"
    )
    assert run_on_it(code, SIM_SDPA="parted").splitlines() == ["True True True", "True True False"]

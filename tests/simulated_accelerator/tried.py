"""Functions that `run_on_it` calls in a process with the simulated accelerator."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data import Shapes
from fedtune.evaluation.scoring import evaluate_examples
from fedtune.lab.audit import sensitivity
from fedtune.model.spec import LoraSpec, ModelSpec, TaskModelSpec
from fedtune.spec import ConfigError
from fedtune.tasks.task_model import TaskModel, build_task_model
from fedtune.training import batch_invariance, captured, dp_step
from fedtune.training.captured import choose_sum_batch
from fedtune.training.examples import SiteExamples
from fedtune.training.machine import resolve_device
from fedtune.training.per_example import record_gradients
from fedtune.training.users import UserExamples

# The order in which CUDA sums rows of float64 for a norm (Reduce.cuh of torch), which depends on their number.

Values = npt.NDArray[np.float64]
_MAX_THREADS, _WARP = 512, 32  # per block


def compute_norms(rows: Values) -> Values:
    """Return the (n,) norms of n rows with 128 to about 100,000 values, a multiple of four, each reduced by one
    block.
    """
    return np.array([np.sqrt(_sum_of_squares(row, len(rows))) for row in rows])


def _sum_of_squares(row: Values, count: int) -> float:
    across, down = (min(1 << (most.bit_length() - 1), _MAX_THREADS) for most in (len(row) // 4, count))
    height = min(down, _MAX_THREADS // _WARP)
    width = min(across, _MAX_THREADS // height)
    if -(-len(row) // width) < min(height * 16, 256):
        height = 1
    each = np.zeros((width * height, 4))  # a thread reads four values at once
    for first in range(0, len(row), each.size):
        part = row[first : first + each.size].reshape(-1, 4)
        each[: len(part)] += part * part
    sums = (((each[:, 0] + each[:, 1]) + each[:, 2]) + each[:, 3]).reshape(height, width)
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    of_row = sums[0]
    while len(of_row) > _WARP:
        of_row = of_row[: len(of_row) // 2] + of_row[len(of_row) // 2 :]
    while len(of_row) > 1:
        of_row = of_row[::2] + of_row[1::2]
    return float(of_row[0])


SIM = torch.device("sim")


def prefer_replays() -> None:
    """Keep every graph, although replays on the simulated device are slower, and count only the replays of steps."""
    measured = iter((0.0, 1.0) * 1000)

    def measure_seconds(run: object) -> float:
        type(torch.sim).replays = 0  # type: ignore[attr-defined]
        return next(measured)

    captured.measure_seconds = measure_seconds


def build_model() -> TaskModel:
    lora = LoraSpec(rank=4, alpha=8.0)
    spec = TaskModelSpec(model=ModelSpec(path="random:llama", dtype="float32"), task="causal_lm", lora=lora, seed=3)
    return build_task_model(spec, device=resolve_device("auto"))


def measure_influence(within: TaskModel) -> float:
    shapes = Shapes.from_limits(max_length=15, max_tokens=64)
    return batch_invariance.max_batch_influence(within, shapes, keeps_states=False, max_grad_norm=1.0)


def print_clipping_by_batch() -> None:
    """Print the change of a contribution in the trial: with fedtune's norm, and with a norm that depends on the row
    count.
    """
    within = build_model()
    print(measure_influence(within))
    own: Any = dp_step._compute_squared_row_norms

    def scale_by_batch(values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = own(values)
        return found * (1 + 1e-3 * len(values)) if values.device.type == "sim" else found

    dp_step._compute_squared_row_norms = scale_by_batch
    print(measure_influence(within))


def print_weights_moved() -> None:
    """Print the bytes that the random weights of a trial copy to the host, with and without memory for two models."""
    within, memory = build_model(), batch_invariance.get_total_memory(SIM)
    for free in (memory, 0):
        batch_invariance.get_total_memory = lambda device, free=free: free  # type: ignore[misc]
        torch.sim.counters()  # type: ignore[attr-defined]
        with batch_invariance._randomize_weights(within, np.random.default_rng(0)):
            print(torch.sim.counters().get("bytes to host", 0))  # type: ignore[attr-defined]


def print_scoring_error() -> None:
    """Print the error message of a scoring that exceeds the device's memory."""
    within = build_model()
    draws = np.random.default_rng(0)
    dataset = sensitivity.generate_random_examples(within, [31] * 64, draws)
    taken = torch.empty(torch.accelerator.get_memory_info(SIM)[0] - 2**18, dtype=torch.uint8, device=SIM)
    try:
        evaluate_examples(within, dataset, pad_id=0, max_tokens=4096)
    except ConfigError as error:
        print(error)
    del taken


def print_unusable_units() -> None:
    """Print the contributions of one to three non-finite units, on the CPU and on the device."""
    for place in ("cpu", SIM):
        for units in (1, 2, 3):
            sums = dp_step.make_zero_sums({"a": torch.nn.Parameter(torch.zeros(3000, device=place))})
            dp_step.add_clipped(sums, {"a": torch.full((units, 3000), torch.nan, device=place)}, 1.0)
            print(int(sums["a"].abs().sum()))


def waits_for_the_device() -> None:
    """Print the number of synchronizations for users' means, and for the gradients of the same records."""
    within = build_model()
    draws = np.random.default_rng(0)
    shapes = Shapes.from_limits(max_length=31, max_tokens=256)
    records = SiteExamples(
        sensitivity.generate_random_examples(within, [31] * 16, draws), pad_id=0, shapes=shapes, device=SIM
    )
    users = UserExamples(records, [np.arange(first, first + 4) for first in range(0, 16, 4)], most_records=4)
    with record_gradients(within) as gradients:
        (batch,) = users.batch_units([np.arange(first, first + 4) for first in range(0, 16, 4)])
        torch.sim.counters()  # type: ignore[attr-defined]
        users.convert_gradients(gradients).compute_gradients(batch)
        of_users = torch.sim.counters()["waits"]  # type: ignore[attr-defined]
        for one in records.cut(np.arange(16)):
            gradients.compute_gradients(one)
    print(of_users, torch.sim.counters()["waits"])  # type: ignore[attr-defined]


def print_norm_differences() -> None:
    """Print the number of 32 rows whose norms differ alone and in a batch, for CUDA's reduction and for clipping."""

    def compute_as_cuda(values: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
        found = torch.from_numpy(compute_norms(values.cpu().numpy())).to(values.device)
        return found[:, None] if keepdim else found

    torch.linalg.vector_norm = compute_as_cuda
    draws = np.random.default_rng(0)
    for length in (768, 3072, 6144, 65_536):
        rows = torch.from_numpy(draws.standard_normal((32, length)).astype(np.float32)).to(SIM)
        whole = compute_as_cuda(rows.double(), dim=1), dp_step._compute_joint_norms({"a": rows})
        moved_rows = [0, 0]
        for first, last in ((0, 2), (2, 6), (6, 14), (14, 15), (15, 32)):
            part = rows[first:last]
            found = compute_as_cuda(part.double(), dim=1), dp_step._compute_joint_norms({"a": part})
            for kind in range(2):
                moved_rows[kind] += int((found[kind] != whole[kind][first:last]).sum())
        assert torch.allclose(whole[1].cpu(), rows.cpu().double().square().sum(dim=1).sqrt(), rtol=1e-14)
        print(length, *moved_rows)


def capture_batches(within: TaskModel, shapes: Shapes) -> str | None:
    made_up = batch_invariance.iter_dummy_batches(within, shapes, keeps_states=False, pad_id=0)
    return captured.capture_batches(within, made_up, max_grad_norm=1.0)


def print_waits_of_a_step() -> None:
    """Print the waits for the device of a step's micro-batches, launched one at a time and replayed."""
    prefer_replays()
    within = build_model()
    shapes = Shapes.from_limits(max_length=31, max_tokens=128)
    assert capture_batches(within, shapes) is None
    lengths = np.random.default_rng(0).integers(2, 31, size=40).tolist()
    dataset = sensitivity.generate_random_examples(within, lengths, np.random.default_rng(0))
    examples = SiteExamples(dataset, pad_id=0, shapes=shapes, device=SIM)
    batches = list(examples.cut(np.arange(40)))
    for compute in (dp_step.sum_batch, choose_sum_batch(within)):
        sums = dp_step.make_zero_sums(within.trainable())
        with record_gradients(within) as gradients:
            torch.sim.counters()  # type: ignore[attr-defined]
            dp_step.add_batches(sums, gradients, batches, 1.0, compute)
            print(torch.sim.counters().get("waits", 0))  # type: ignore[attr-defined]
        print(sum(int((total * (number + 1)).sum()) for number, total in enumerate(sums.values())))


def print_capture() -> None:
    """Print why micro-batches are not captured, and the replays with the same and with other clip norms and tensors."""
    prefer_replays()
    within = build_model()
    shapes = Shapes.from_limits(max_length=15, max_tokens=64)
    print(capture_batches(within, shapes))
    dataset = sensitivity.generate_random_examples(within, [9] * 4, np.random.default_rng(0))
    (batch,) = SiteExamples(dataset, pad_id=0, shapes=shapes, device=SIM).cut(np.arange(4))
    compute, names = choose_sum_batch(within), list(within.trainable())
    for clip_norm, frozen in ((1.0, ()), (2.0, ()), (1.0, names[:1])):
        before = torch.sim.replays  # type: ignore[attr-defined]
        with within.freeze_tensors(frozenset(frozen)), record_gradients(within) as gradients:
            compute(gradients, batch, clip_norm)
        print(torch.sim.replays - before)  # type: ignore[attr-defined]

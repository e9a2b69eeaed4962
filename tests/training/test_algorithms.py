"""Federated algorithms: their corrections of noised gradients, and that they receive nothing else."""

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig, parse
from fedtune.federation.rounds import describe_outcome
from fedtune.federation.sent_round import pack_adapter, pack_initial, unpack_adapter
from fedtune.model.adapter import Adapter
from fedtune.privacy.mechanism import add_gaussian_noise, compute_cell_width
from fedtune.privacy.randomness import SeededRandomness
from fedtune.spec import ConfigError
from fedtune.training import dp_step
from fedtune.training.algorithms.algorithm_registry import ALGORITHMS, get_algorithm
from fedtune.training.algorithms.local_algorithm import Arrays, LocalAlgorithm, NoisedGradient, RoundOutcome, SiteRound
from fedtune.training.local import TrainingRound, list_frozen_tensors, train_round
from fedtune.training.spec import TrainingSpec
from fedtune.training.update_bound import bound_round_update

from .conftest import build_trained, make_dummy_examples, make_examples, make_plan, make_work

PACKAGE = Path(dp_step.__file__).parents[1]
SIZES = {"a": 10, "b": 30}
PLAN = make_plan(sampling_rate=0.5, noise_multiplier=0.5, max_grad_norm=0.5, local_steps=3, num_rounds=4)
SGD = TrainingSpec(optimizer="sgd", learning_rate=0.5, local_steps=3)


def run_federation(
    name: str, *, rounds: int = 3, lost_in: int | None = None, plan: Any = PLAN, **own: float
) -> tuple[Adapter, Mapping[str, Arrays]]:
    """Train two sites for several rounds with seeded noise; return the adapter and the sites' states."""
    algorithm, model = get_algorithm(name, own or None), build_trained()
    data = {
        site: make_examples(make_dummy_examples("classification", seed=number)) for number, site in enumerate(SIZES)
    }
    adapter, states = Adapter.from_task_model(model), dict[str, Arrays]()
    kept = algorithm.initial_arrays(adapter.tensors)
    for round in range(1, rounds + 1):
        sent, updates = algorithm.select_sent_arrays(kept), {}
        frozen = list_frozen_tensors(model.spec.lora, algorithm, adapter.tensors, round=round, sent=sent)
        for site, size in SIZES.items():
            state = {} if round == lost_in else states.get(site, {})
            about = {"site": site, "round": round, "plan": plan, "training": SGD, "declared_size": size}
            work = make_work(**about, algorithm=algorithm, sent=sent, state=state, max_adapter_value=2.0)
            trained = train_round(model, adapter, data[site], work, randomness=SeededRandomness(5))
            updates[site], states[site] = trained
            bound = bound_round_update(
                *(SGD, plan),
                round=round,
                declared_size=size,
                sent=adapter,
                frozen=frozen,
                algorithm=algorithm,
                arrays=sent,
            )
            assert bound.allows(updates[site].tensors, sent=adapter), "the lead must accept honest updates"
        average = Adapter(
            {
                key: np.average([updates[site].tensors[key] for site in SIZES], axis=0, weights=list(SIZES.values()))
                .astype(np.float32)
                for key in adapter.tensors
            }
        )  # fmt: skip
        about = {"sites": tuple(SIZES), "sizes": SIZES, "training": SGD, "plan": plan, "round": round, "frozen": frozen}
        kept = algorithm.compute_next_arrays(kept, describe_outcome(average, sent=adapter, **about))
        adapter = average
    return adapter, states


GOLDEN_MOVES = {"fedavg": 1.172852, "fedprox": 0.931928, "scaffold": 1.173011, "aslora": 0.814795}
"""The L2 norm by which three rounds change the adapter."""


def test_algorithms_produce_different_adapters_under_seeded_noise() -> None:
    settings = {"fedavg": {}, "fedprox": {"mu": 0.5}, "scaffold": {}, "aslora": {}}
    adapters = {name: run_federation(name, **own)[0] for name, own in settings.items()}
    start = Adapter.from_task_model(build_trained()).tensors
    distances = {
        name: math.hypot(*(float(np.linalg.norm(value - start[key])) for key, value in expected.tensors.items()))
        for name, expected in adapters.items()
    }
    assert distances == pytest.approx(GOLDEN_MOVES, rel=1e-3)
    digests = {name: expected.digest() for name, expected in adapters.items()}
    assert len(set(digests.values())) == len(settings)
    assert digests["scaffold"] == run_federation("scaffold")[0].digest(), "the same seed must give the same bits"
    assert digests["fedprox"] != run_federation("fedprox", mu=0.25)[0].digest()


def test_scaffold_differs_from_fedavg_only_after_the_first_round() -> None:
    assert run_federation("scaffold", rounds=1)[0].digest() == run_federation("fedavg", rounds=1)[0].digest()
    assert run_federation("scaffold", rounds=2)[0].digest() != run_federation("fedavg", rounds=2)[0].digest()


def test_lost_scaffold_state_counts_as_zero() -> None:
    _, without_loss = run_federation("scaffold")
    _, with_loss = run_federation("scaffold", lost_in=3)
    assert without_loss.keys() == with_loss.keys() == SIZES.keys()
    for site in SIZES:
        assert with_loss[site].keys() == without_loss[site].keys()
        assert any((with_loss[site][name] != value).any() for name, value in without_loss[site].items())
        assert all(np.isfinite(value).all() for value in with_loss[site].values())


class Spy(LocalAlgorithm):
    """Algorithm that stores all of its inputs in a round."""

    name = "spy"
    seen: ClassVar[list[tuple[NoisedGradient, Arrays, SiteRound]]] = []

    def correct_gradient(self, gradient: NoisedGradient, weights: Arrays, round_state: SiteRound) -> Arrays:
        self.seen.append((gradient, weights, round_state))
        return gradient.values


def test_algorithm_receives_gradients_only_after_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[Any, Any]] = []

    def record_noise(given: Any, **kwargs: Any) -> Any:
        sums.append((given, noisy := add_gaussian_noise(given, **kwargs)))
        return noisy

    monkeypatch.setattr(dp_step, "add_gaussian_noise", record_noise)
    Spy.seen.clear()
    work: TrainingRound = make_work(plan=PLAN, training=SGD, algorithm=Spy())
    model = build_trained()
    train_round(
        *(model, Adapter.from_task_model(model), make_examples(make_dummy_examples("classification")), work),
        randomness=SeededRandomness(5),
    )
    assert len(sums) == len(Spy.seen) == PLAN.local_steps
    cells = PLAN.sampling_rate * work.declared_size / compute_cell_width(PLAN.max_grad_norm)
    for (summed, noisy), (gradient, weights, round_state) in zip(sums, Spy.seen, strict=True):
        assert gradient.values.keys() == weights.keys() == round_state.adapter.keys()
        for name, value in gradient.values.items():
            np.testing.assert_array_equal(value, (noisy[name] / cells).astype(np.float32))
            assert (value != (summed[name] / cells).astype(np.float32)).any()


def test_only_noisy_steps_create_noised_gradients() -> None:
    """The plain step of a run without privacy also creates one, and the third place averages noised gradients."""
    expected = {
        (path.relative_to(PACKAGE).as_posix(), function.name)
        for path in PACKAGE.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "NoisedGradient"
    }
    assert expected == {
        ("training/dp_step.py", "apply_gradient_sum"),
        ("training/local.py", "correct_plain_gradient"),
        ("training/local.py", "compute_next_state"),
    }


def test_algorithm_files_are_short_and_import_nothing_private() -> None:
    allowed = ("__future__", "collections.abc", "dataclasses", "typing", "numpy", "fedtune.spec", "fedtune.codec")
    for path in (PACKAGE / "training" / "algorithms").glob("*.py"):
        tree = ast.parse(path.read_text())
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        for module in modules:
            assert module is not None
            assert module.startswith((*allowed, "fedtune.training.algorithms")), f"{path.name} imports {module}"
        assert len(path.read_text().splitlines()) <= 200


def make_round(**arrays: Arrays) -> SiteRound:
    return SiteRound(**{"adapter": {}, "sent": {}, "state": {}, **arrays})


ONE, TWO, THREE = (np.full(2, value, np.float32) for value in (1, 2, 3))


def test_fedprox_pulls_towards_the_received_adapter() -> None:
    pulled = get_algorithm("fedprox", {"mu": 0.5}).correct_gradient(
        NoisedGradient({"w": ONE}), {"w": THREE}, make_round(adapter={"w": TWO})
    )
    np.testing.assert_array_equal(pulled["w"], [1.5, 1.5])


def test_scaffold_subtracts_site_and_adds_global_control_variate() -> None:
    scaffold, gradient = get_algorithm("scaffold"), NoisedGradient({"w": ONE})
    round_state = make_round(sent={"w": TWO}, state={"w": 3 * THREE, "rests": THREE})
    np.testing.assert_array_equal(scaffold.correct_gradient(gradient, {}, round_state)["w"], [-6, -6])
    np.testing.assert_array_equal(scaffold.correct_gradient(gradient, {}, replace(round_state, state={}))["w"], THREE)
    state = scaffold.compute_next_state(gradient, round_state)
    np.testing.assert_array_equal(state["w"], ONE)
    np.testing.assert_array_equal(state["rests"], THREE)


def test_lead_control_variate_is_the_mean_of_site_variates() -> None:
    """All sites take part, so the lead's arrays are the weighted mean of the sites' states."""
    _, states = run_federation("scaffold", rounds=2, plan=replace(PLAN, num_rounds=8))
    mean = {name: (states["a"][name] + 3 * states["b"][name]) / 4 for name in states["a"]}
    assert mean
    scaffold, model = get_algorithm("scaffold"), build_trained()
    adapter = Adapter.from_task_model(model).tensors
    step = dict.fromkeys(adapter, 2.0)
    gains = {name: value - 2.0 * mean[name] for name, value in adapter.items()}
    outcome = RoundOutcome(adapter=adapter, average=gains, step_sizes=step, share=0.25, noise=0.0)
    zero = scaffold.initial_arrays(adapter)
    for name, value in scaffold.compute_next_arrays(zero, outcome).items():
        np.testing.assert_allclose(value, mean[name] / 4, atol=1e-5)


LAYERS = ("x.q", "x.v")
FACTORS = {
    f"{layer}.lora_{factor}.weight": np.full((2, 2), size, np.float32)
    for layer in LAYERS
    for factor, size in (("A", 1.0), ("B", 0.5))
} | {"head.weight": np.ones(2, np.float32)}


def test_aslora_trains_each_factor_once_then_follows_the_score() -> None:
    aslora = get_algorithm("aslora", {"retry_after": 3})
    arrays, chosen = aslora.initial_arrays(FACTORS), []
    # Mean gradient of each factor: A's is larger in layer q, and B's in layer v.
    slopes = {"x.q.lora_A.weight": 3.0, "x.q.lora_B.weight": 1.0, "x.v.lora_A.weight": 0.1, "x.v.lora_B.weight": 1.0}
    for _ in range(6):
        frozen = aslora.select_frozen_tensors(FACTORS, aslora.select_sent_arrays(arrays))
        trained = {name: 2.0 for name in FACTORS if name not in frozen}
        chosen.append("".join("A" if f"{layer}.lora_A.weight" in trained else "B" for layer in LAYERS))
        average = {
            name: value - 2.0 * np.float32(slopes.get(name, 0) * (name in trained)) for name, value in FACTORS.items()
        }
        outcome = RoundOutcome(adapter=FACTORS, average=average, step_sizes=trained, share=1.0, noise=0.01)
        arrays = aslora.compute_next_arrays(arrays, outcome)
        assert "head.weight" in trained
    assert chosen == ["BB", "AA", "AB", "AB", "BB", "AA"], "each layer must retry its other factor after three rounds"


def test_aslora_score_subtracts_the_expected_noise() -> None:
    aslora = get_algorithm("aslora")
    average = {name: value - np.float32(0.1) for name, value in FACTORS.items()}
    sizes = dict.fromkeys([name for name in FACTORS if "lora_A" not in name], 1.0)
    outcome = RoundOutcome(adapter=FACTORS, average=average, step_sizes=sizes, share=1.0, noise=0.2)
    assert not aslora.compute_next_arrays(aslora.initial_arrays(FACTORS), outcome)["score"].any()


def test_algorithm_arrays_share_one_digest_with_the_adapter() -> None:
    adapter, arrays = Adapter({"head.weight": ONE}), {"head.weight": TWO}
    packed = pack_adapter(adapter, arrays)
    unpacked, settings = unpack_adapter(packed)
    assert unpacked.digest() == adapter.digest()
    np.testing.assert_array_equal(settings["head.weight"], TWO)
    assert packed.digest() != pack_adapter(adapter, {"head.weight": THREE}).digest()
    assert pack_adapter(adapter, {}) is adapter
    assert unpack_adapter(adapter) == (adapter, {})
    for algorithm in ALGORITHMS.values():
        factors = Adapter(FACTORS)
        state = algorithm.initial_arrays(FACTORS)
        assert pack_adapter(factors, algorithm.select_sent_arrays(state)).has_same_shapes(
            pack_initial(factors, algorithm)
        )


def parse_federation(**changes: Any) -> RunConfig:
    settings = compose_run(["experiment=debug", "name=x"]).to_json()
    settings["federation"] |= changes
    return parse(settings)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"fedavg"}))
def test_secure_aggregation_refuses_unsupported_algorithms(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_federation(aggregation="secure", algorithm=name, num_sites=3)
    reason = ALGORITHMS[name].not_in_sums
    assert str(refused.value) == f"federation.algorithm = '{name}': requires federation.aggregation = plain: {reason}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "fedyogi"}, "algorithm = 'fedyogi': must be one of fedavg, fedprox, scaffold, aslora"),
        ({"algorithm": "scaffold"}, "algorithm = 'scaffold': requires training.optimizer = sgd: the mean gradient"),
        ({"algorithm": "fedprox", "algorithm_settings": {"mu": 0.0}}, "algorithm_settings.mu = 0.0: must be a finite"),
        (
            {"algorithm": "fedprox", "algorithm_settings": {"nu": 1}},
            "algorithm_settings.nu = 1: is not a setting of fedp",
        ),
        (
            {"algorithm_settings": {"mu": 1.0}},
            "algorithm_settings.mu = 1.0: is not a setting of fedavg; its own settings: none",
        ),
        ({"algorithm": "aslora", "algorithm_settings": {"retry_after": 1}}, "algorithm_settings.retry_after = 1: must"),
    ],
)
def test_invalid_algorithm_settings_are_refused_with_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_federation(**changes)
    assert str(refused.value).startswith(f"federation.{message}")


def test_algorithm_settings_change_the_run_name() -> None:
    weak, strong = (parse_federation(algorithm="fedprox", algorithm_settings={"mu": mu}) for mu in (0.1, 0.2))
    assert weak.run_id() != strong.run_id()
    assert parse(json.loads(json.dumps(weak.to_json()))) == weak
    assert weak.federation.bound_algorithm.own.mu == 0.1


def test_update_beyond_the_algorithm_bound_is_refused() -> None:
    sent = Adapter({"head.weight": np.zeros(2, np.float32)})
    bounds = [
        bound_round_update(SGD, PLAN, round=1, declared_size=10, sent=sent, algorithm=algorithm, arrays=arrays)
        for algorithm, arrays in (
            (get_algorithm("fedavg"), {}),
            (get_algorithm("fedprox", {"mu": 0.5}), {}),
            (get_algorithm("scaffold"), {"head.weight": ONE}),
        )
    ]
    assert bounds[0].norm < bounds[1].norm < bounds[2].norm < np.inf
    for bound in bounds:
        assert bound.allows({"head.weight": np.full(2, 0.4 * bound.norm, np.float32)}, sent=sent)
        assert not bound.allows({"head.weight": np.full(2, 1.1 * bound.norm, np.float32)}, sent=sent)

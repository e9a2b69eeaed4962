"""How far honest training can go: real optimizers, on the largest gradients that a plan allows, stay within it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model import Adapter, LoraSpec
from fedtune.privacy.few_bits import Difference, most_level
from fedtune.privacy.run_plan import Plan
from fedtune.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rate
from fedtune.training.reach import Reach, reach
from fedtune.training.spec import TrainingSpec

PLAN = Plan(
    unit="record",
    delta=1e-5,
    sampling_rate=0.1,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    local_steps=5,
    num_rounds=4,
)
SIZE = 200
SPECS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "learning_rate": 2.0, "head_learning_rate": 0.5},
    {"optimizer": "sgd", "learning_rate": 2.0, "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adamw", "learning_rate": 1e-2},
    {"optimizer": "adamw", "learning_rate": 1e-2, "betas": (0.0, 0.999), "head_learning_rate": 0.1},
    {"optimizer": "adamw", "learning_rate": 0.5, "weight_decay": 5.0, "schedule": "cosine", "warmup_steps": 3},
    {"optimizer": "adamw", "learning_rate": 1e-2, "betas": (0.5, 0.0)},
]


@pytest.fixture
def sent() -> Adapter:
    draws = np.random.default_rng(0)
    return Adapter(
        {
            "a.lora_A": draws.normal(size=(4, 30)).astype(np.float32),
            "a.lora_B": np.zeros((30, 4), np.float32),
            "head.weight": draws.normal(size=(3, 8)).astype(np.float32),
        }
    )


def trained(spec: TrainingSpec, sent: Adapter, gradients: Any, *, round: int) -> dict[str, np.ndarray]:
    """What the real optimizer makes of these gradients, a function of step, name and shape."""
    parameters = {n: torch.nn.Parameter(torch.from_numpy(np.array(v))) for n, v in sent.tensors.items()}
    optimizer = make_optimizer(parameters, spec)
    first, total = (round - 1) * PLAN.local_steps, PLAN.local_steps * PLAN.num_rounds
    for step in range(PLAN.local_steps):
        set_learning_rate(optimizer, learning_rate_factor(spec, step=first + step, total_steps=total))
        for name, parameter in parameters.items():
            parameter.grad = torch.as_tensor(gradients(step, name, parameter.shape), dtype=torch.float32)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


@pytest.mark.parametrize("settings", SPECS, ids=str)
@pytest.mark.parametrize("round", [1, 3])
def test_what_honest_training_does_is_within_reach(settings: dict[str, Any], sent: Adapter, round: int) -> None:
    spec = TrainingSpec(**settings)
    bound = reach(spec, PLAN, round=round, declared_size=SIZE, sent=sent)
    denominator = PLAN.sampling_rate * SIZE
    draws = np.random.default_rng(round)
    direction = {name: draws.normal(size=value.shape) for name, value in sent.tensors.items()}
    length = math.sqrt(sum(float(np.square(value).sum()) for value in direction.values()))

    def honest(step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Three times the units that were declared, all of one opinion, and the plan's noise.
        return 3 * direction[name] / length + draws.normal(size=shape) / denominator

    def growing(step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 10.0 ** (step - 5))  # Adam goes furthest where gradients grow

    for gradients in (honest, growing):
        assert bound.includes(trained(spec, sent, gradients, round=round), sent=sent), gradients.__name__


@pytest.mark.parametrize("settings", SPECS[:5], ids=str)
def test_what_is_far_beyond_training_is_not(settings: dict[str, Any], sent: Adapter) -> None:
    bound = reach(TrainingSpec(**settings), PLAN, round=1, declared_size=SIZE, sent=sent)
    for name in sent.tensors:
        for value in (1e30, -1e30, 1e4):
            update = {key: np.array(tensor) for key, tensor in sent.tensors.items()}
            update[name].flat[3] = value
            assert not bound.includes(update, sent=sent), name


def test_many_small_moves_are_bound_by_their_norm(sent: Adapter) -> None:
    bound = reach(TrainingSpec(optimizer="sgd", learning_rate=1.0), PLAN, round=1, declared_size=SIZE, sent=sent)
    size = bound.value["a.lora_A"] * 0.99
    one = {name: np.array(value) for name, value in sent.tensors.items()}
    one["a.lora_B"].flat[0] = size
    assert bound.includes(one, sent=sent)
    everything = {name: value + np.copysign(np.float32(size), value) for name, value in sent.tensors.items()}
    assert not bound.includes(everything, sent=sent)


def test_a_move_towards_zero_is_free(sent: Adapter) -> None:
    nowhere = Reach(value=dict.fromkeys(sent.tensors, 0.0), norm=0.0)
    for factor in (1.0, 0.5, 0.0):
        smaller = {name: (factor * value).astype(np.float32) for name, value in sent.tensors.items()}
        assert nowhere.includes(smaller, sent=sent)
    other_sign = {name: (-0.01 * value).astype(np.float32) for name, value in sent.tensors.items()}
    assert not nowhere.includes(other_sign, sent=sent)


def test_gradients_that_nothing_clips_have_no_bound(sent: Adapter) -> None:
    plain = replace(PLAN, noise_multiplier=0.0)
    assert reach(TrainingSpec(optimizer="sgd"), plain, round=1, declared_size=SIZE, sent=sent).norm == math.inf
    assert reach(TrainingSpec(), plain, round=1, declared_size=SIZE, sent=sent).norm < math.inf, "Adam's steps have one"


SGD = TrainingSpec(optimizer="sgd", learning_rate=1.0)


def at_the_edge(bound: Reach, size: int, *, kind: str) -> np.ndarray:
    """A move of `size` values that honest training may make, as long as it may be where its kind allows."""
    value, norm = bound.value["a.lora_A"] * 0.9999, bound.norm * 0.9999
    draws = np.random.default_rng(size)
    one = np.zeros(size)
    if kind == "all in one value":
        one[size // 2] = value
    elif kind == "one value and as much as there may be beside it":
        one[1:] = min(value, math.sqrt(max(0.0, norm**2 - value**2) / max(1, size - 1)))
        one[0] = value
    elif kind == "equal values":
        one[:] = min(value, norm / math.sqrt(size))
    elif kind == "many values between two levels":
        one[:] = min(value, norm / math.sqrt(size)) / 2
        one[0] = value / 2
    else:
        one[:] = draws.normal(size=size)
        one[size // 3] = 5.0  # deviations, of the value that sets the step
        one *= min(value / np.abs(one).max(), norm / float(np.linalg.norm(one)))
    signed: np.ndarray = one * draws.choice((-1, 1), size=size)
    return signed


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1, 2, 16, 300, 20_000])
@pytest.mark.parametrize(
    "kind",
    [
        "all in one value",
        "one value and as much as there may be beside it",
        "equal values",
        "many values between two levels",
        "noise alone",
    ],
)
def test_rounding_to_few_bits_takes_no_honest_move_out_of_reach(kind: str, size: int, bits: int) -> None:
    for settings in (SGD, replace(SGD, weight_decay=0.1), TrainingSpec(weight_decay=0.5)):
        begin = np.linspace(-1, 1, size).astype(np.float32) * (settings.weight_decay > 0)
        sent = Adapter({"a.lora_A": begin, "a.lora_B": np.zeros(7, np.float32)})
        bound = reach(settings, PLAN, round=1, declared_size=SIZE, sent=sent)
        # Away from 0, where nothing is free; and decay besides, where it is.
        moves = np.copysign(at_the_edge(bound, size, kind=kind), begin + (begin == 0))
        decay = begin * min(1.0, bound.free.get("a.lora_A", 0.0)) * 0.1
        for moved in (moves, moves - decay):
            ends = {**sent.tensors, "a.lora_A": (begin + moved).astype(np.float32)}
            for about in range(20):
                found = Difference.between(sent.tensors, ends, bits=bits, about=str(about))
                assert bound.includes(found.added_to(sent.tensors), sent=sent, rounding=found)


def test_the_room_of_rounding_holds_all_that_rounding_adds() -> None:
    """As near as it comes: each value half a step between two levels, where rounding adds most."""
    begin = {"a": np.zeros(4000, np.float32)}
    ends = {"a": np.full(4000, 0.5 / 7, np.float32)}
    ends["a"][0] = 1.0
    norm = float(np.linalg.norm(ends["a"]))
    bound = Reach(value={"a": 1.0}, norm=norm * (1 + 1e-6))
    longest = 0.0
    for about in range(200):
        found = Difference.between(begin, ends, bits=4, about=str(about))
        got = found.added_to(begin)
        longest = max(longest, float(np.linalg.norm(got["a"])))
        assert bound.includes(got, sent=Adapter(begin), rounding=found)
    assert longest > 1.37 * norm, "rounding alone makes it longer"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_longest_step_makes_no_more_room_than_an_honest_rounding_needs(bits: int) -> None:
    """A site named it, moved many values by a level or more, and got a step's length for each of them."""
    names, each, most = ("m.lora_A.weight", "m.lora_B.weight"), 200_000, most_level(bits)
    sent = Adapter({name: np.zeros(each, np.float32) for name in names})
    bound = reach(SGD, replace(PLAN, local_steps=1), round=1, declared_size=2000, sent=sent)

    def accepted(count: int, step: float) -> bool:
        levels = np.zeros(each, np.int8)
        levels[:count] = 4
        forged = Difference(bits=bits, steps=dict.fromkeys(names, step), levels=dict.fromkeys(names, levels))
        return bound.includes(forged.added_to(sent.tensors), sent=sent, rounding=forged)

    for share in (1.0, 0.7, 0.4):  # of the longest step that one tensor may have
        step = float(np.float32(share * min(bound.value.values()) / most))
        before = bound.norm + math.sqrt(2 * each) * step
        assert not accepted(int((0.95 * before / (4 * step)) ** 2 / 2), step), share
        assert accepted(int((bound.norm / (4 * step)) ** 2 / 2), step), share
    # No tensor's step may be the longest where another's is: their largest values together are longer than the norm.
    alone = replace(bound, norm=1.2 * min(bound.value.values()))
    forged = Difference(
        bits=bits,
        steps=dict.fromkeys(names, min(bound.value.values()) / most),
        levels={name: np.zeros(each, np.int8) for name in names},
    )
    assert not alone.includes(forged.added_to(sent.tensors), sent=sent, rounding=forged)
    # Nor is any step longer than a value's share, whatever room the norm has: Adam's is that of all values together.
    roomy = Reach(value={name: 0.9 * value for name, value in bound.value.items()}, norm=1e3 * bound.norm)
    assert not roomy.includes(forged.added_to(sent.tensors), sent=sent, rounding=forged)


@pytest.mark.parametrize("settings", [SGD, TrainingSpec(weight_decay=0.1)], ids=["sgd", "adamw"])
def test_what_rests_in_a_round_moves_towards_zero_alone(settings: TrainingSpec, sent: Adapter) -> None:
    """With lora.alternate A rests in round 1, and in no round has it a part of what the others may move."""
    rests = LoraSpec(alternate=True).rests_in(1)
    sent = Adapter({name.replace("lora_A", "lora_A.weight"): value for name, value in sent.tensors.items()})
    resting = "a.lora_A.weight"
    bound = reach(settings, PLAN, round=1, declared_size=SIZE, sent=sent, rests=rests)
    for move in (0.01, -0.01):
        moved = sent.tensors[resting] + np.copysign(np.float32(move), move * sent.tensors[resting])
        assert not bound.includes({**sent.tensors, resting: moved}, sent=sent)
        found = Difference.between(sent.tensors, {**sent.tensors, resting: moved}, bits=8, about="")
        assert not bound.includes(found.added_to(sent.tensors), sent=sent, rounding=found)
    assert bound.includes({**sent.tensors, resting: sent.tensors[resting] / 2}, sent=sent), "into a site's own bound"
    others = Adapter({name: value for name, value in sent.tensors.items() if name != resting})
    assert bound.norm == reach(settings, PLAN, round=1, declared_size=SIZE, sent=others).norm
    plain = replace(PLAN, noise_multiplier=0.0)
    still = reach(settings, plain, round=1, declared_size=SIZE, sent=sent, rests=rests)
    assert not still.includes({**sent.tensors, resting: sent.tensors[resting] * 1.01}, sent=sent)

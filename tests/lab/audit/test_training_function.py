"""Audits of third-party training functions: an Opacus loop passes, and injected faults are detected."""

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import fedtune
from fedtune.spec import ConfigError

NOISE, STEPS, RATE = 2.0, 4, 1.0  # as one Gaussian mechanism with noise multiplier 1
CLAIM = {"noise_multiplier": NOISE, "sampling_rate": RATE, "steps": STEPS}


def make_records() -> tuple[Any, Any]:
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    return features, (features[:, 0] > 0).astype(np.int64)


def make_model(features: Any) -> torch.nn.Linear:
    model = torch.nn.Linear(features.shape[1], 2)
    torch.nn.init.zeros_(model.weight)  # known to the attacker, as the guarantee allows
    return model


def train_with_opacus(
    features: Any, labels: Any, *, noise: float = NOISE, clip: float = 1.0, noise_seed: int | None = None
) -> torch.nn.Module:
    """Train with the loop of Opacus's tutorial."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's own: of hooks, and that its generator is not a secure one
        from opacus import PrivacyEngine

        model: Any = make_model(features)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
        records = torch.utils.data.TensorDataset(torch.from_numpy(features), torch.from_numpy(labels))
        loader: Any = torch.utils.data.DataLoader(records, batch_size=int(RATE * len(records)))
        generator = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=clip,
            noise_generator=generator,
        )
        for _ in range(STEPS):
            for inputs, targets in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        result: torch.nn.Module = model._module
    return result


def train_on_means(features: Any, labels: Any) -> torch.nn.Module:
    """Train with a fault: the gradient of the batch's mean loss is clipped instead of per-record gradients."""
    model = make_model(features)
    inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
    for _ in range(STEPS):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= parameter.grad + NOISE / len(inputs) * torch.randn_like(parameter)
    return model


FAULTS = {
    "noise at half": partial(train_with_opacus, noise=NOISE / 2),
    "no clipping": partial(train_with_opacus, clip=1e6, noise=NOISE / 1e6),
    "mean reduction": train_on_means,
    "a shared generator": partial(train_with_opacus, noise_seed=7),
}


def test_audit_training_passes_an_opacus_loop() -> None:
    torch.manual_seed(0)
    result = fedtune.audit_training(train_with_opacus, make_records(), **CLAIM, canaries=1000)
    assert not result.refuted
    assert 0.5 < result.fdp_bound < result.claimed_epsilon
    assert result.lower_bound < result.fdp_bound
    assert "this is no proof" in str(result)


@pytest.mark.parametrize("fault", FAULTS)
def test_audit_training_refutes_faulty_functions(fault: str) -> None:
    torch.manual_seed(0)
    result = fedtune.audit_training(FAULTS[fault], make_records(), **CLAIM, canaries=1000)
    assert result.refuted, str(result)
    assert ("second training" in result.attack) == (fault == "a shared generator")
    assert "REFUTED" in str(result)


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"guesses": 2000}, "guesses"), ({"noise_multiplier": 0.0}, "noise_multiplier"), ({"sampling_rate": 2.0}, "rate")],
)
def test_audit_training_refuses_untestable_claims(changed: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        fedtune.audit_training(train_with_opacus, make_records(), **CLAIM | {"canaries": 1000} | changed)


def test_audit_training_refuses_data_and_models_of_wrong_shape() -> None:
    features, labels = make_records()
    with pytest.raises(ConfigError, match="must be features"):
        fedtune.audit_training(train_with_opacus, (features[0], labels), **CLAIM)
    with pytest.raises(ConfigError, match="at least two classes"):
        fedtune.audit_training(train_with_opacus, (features, 0 * labels), **CLAIM)
    with pytest.raises(ConfigError, match="must return a model with scores"):
        fedtune.audit_training(lambda *_: lambda rows: rows[:, 0], (features, labels), **CLAIM, canaries=20)

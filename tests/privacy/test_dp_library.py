"""dp-accounting without the parts of scipy that its import would load."""

import importlib
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from fedtune.privacy import dp_library
from fedtune.privacy.loss_distribution import _accumulate


def test_deferred_names_forward_to_the_real_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy.stats")
    with dp_library.defer_imports(("scipy.stats",)):
        stand_in = importlib.import_module("scipy.stats")
        norm = stand_in.norm
        assert importlib.import_module("scipy.stats") is stand_in
    assert "scipy.stats" not in sys.modules, "fedtune must not import scipy.stats"
    loaded: list[str] = []
    real = SimpleNamespace(norm=scipy.stats.norm)
    monkeypatch.setattr(dp_library, "import_module", lambda name: loaded.append(name) or real)
    assert not loaded
    assert norm.cdf(1.5) == scipy.stats.norm.cdf(1.5)
    assert norm(1.0, scale=2.0).cdf(1.5) == scipy.stats.norm(1.0, scale=2.0).cdf(1.5)
    assert loaded == 2 * ["scipy.stats"]
    assert isinstance(norm(scale=2.0), dp_library.CenteredNormal)
    assert loaded == 2 * ["scipy.stats"]


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 37.25])
def test_centered_normal_equals_scipys_at_every_value(scale: float) -> None:
    ours, real = dp_library.CenteredNormal(scale), scipy.stats.norm(scale=scale)
    draws = np.random.default_rng(0)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300, 40 * scale, -40 * scale])
    values = np.concatenate([5 * scale * draws.standard_normal(20_000), scale * draws.standard_cauchy(5_000), special])
    chances = np.concatenate([draws.random(20_000), 10.0 ** -draws.uniform(0, 300, 5_000), [0.0, 1.0, -1.0, np.nan]])
    for name, inputs in (("cdf", values), ("logcdf", values), ("ppf", chances)):
        assert np.array_equal(getattr(ours, name)(inputs), getattr(real, name)(inputs), equal_nan=True), name
        assert getattr(ours, name)(float(inputs[0])) == getattr(real, name)(float(inputs[0])), name


def test_accounting_of_a_gaussian_mechanism_does_not_load_scipys_statistics() -> None:
    code = (
        "import sys; from fedtune.privacy import accountant, events\n"
        "from fedtune.privacy.dp_library import GaussianDpEvent, PoissonSampledDpEvent\n"
        "print(accountant.epsilon_pld({PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)): 5}, 1e-5))\n"
        "print('scipy.stats' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    epsilon, loaded = process.stdout.split()
    assert 0 < float(epsilon) < 1
    assert loaded == "False"


def test_loaded_modules_are_not_deferred() -> None:
    before = sys.modules["scipy.stats"]
    with dp_library.defer_imports(("scipy.stats",)):
        assert importlib.import_module("scipy.stats") is before
    assert sys.modules["scipy.stats"] is before


def test_failed_import_leaves_no_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scipy.stats")
    with pytest.raises(ImportError, match="away"), dp_library.defer_imports(("scipy.stats",)):
        raise ImportError("away")
    assert "scipy.stats" not in sys.modules


def test_running_sums_decay_like_the_recurrence() -> None:
    import numpy as np
    from scipy import signal

    values = np.random.default_rng(0).random(100_001) * np.geomspace(1, 1e-200, 100_001)
    for width in (0.7, 0.3, 1e-3, 1e-4):
        for ordered in (values, values[::-1]):
            exact = signal.lfilter([1.0], [1.0, -math.exp(-width)], ordered)
            assert np.allclose(_accumulate(ordered, width), exact, rtol=1e-11, atol=0)

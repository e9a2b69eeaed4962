"""dp-accounting without the parts of scipy that its import would load."""

import importlib
import math
import sys
from types import SimpleNamespace

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
    assert "scipy.stats" not in sys.modules, "others import the module itself"
    loaded: list[str] = []
    real = SimpleNamespace(norm=scipy.stats.norm)
    monkeypatch.setattr(dp_library, "import_module", lambda name: loaded.append(name) or real)
    assert not loaded
    assert norm.cdf(1.5) == scipy.stats.norm.cdf(1.5)
    assert norm(scale=2.0).cdf(1.5) == scipy.stats.norm(scale=2.0).cdf(1.5)
    assert loaded == 2 * ["scipy.stats"]


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

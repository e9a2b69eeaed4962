"""Selection of the number format for `model.dtype=auto`, with a fake clock instead of measured times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedtune.model import frozen_linear
from fedtune.model.base_model import count_frozen_products, load_base
from fedtune.model.spec import ModelSpec
from fedtune.spec import ConfigError
from fedtune.training import number_format
from fedtune.training.number_format import choose_number_format, measure_products
from fedtune.training.spec import RuntimeSpec

SHAPES = {(8, 4): 3, (4, 8): 1}


class Clock:
    """Fake clock that advances only in frozen products."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def time(self, multiply: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """Run the product and advance the clock."""

        def multiply_slowly(*args: Any) -> Any:
            self.now += seconds
            return multiply(*args)

        return multiply_slowly


@pytest.fixture
def set_seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Set the fake duration of a product in each format."""
    multiply_exactly, rounded = frozen_linear.multiply_frozen, frozen_linear.multiply_bfloat16

    def set_both(*, float32: float, mixed: float) -> Clock:
        clock = Clock()
        monkeypatch.setattr(frozen_linear, "multiply_frozen", clock.time(multiply_exactly, float32))
        monkeypatch.setattr(frozen_linear, "multiply_bfloat16", clock.time(rounded, mixed))
        monkeypatch.setattr(
            number_format, "measure_products", lambda *args, **kwargs: measure_products(*args, **kwargs, clock=clock)
        )
        number_format._measure_model.cache_clear()
        return clock

    return set_both


@pytest.fixture(autouse=True)
def without_memory() -> Any:
    """Clear cached measurements before each test."""
    yield
    number_format._measure_model.cache_clear()


@pytest.mark.parametrize(("gain", "chosen"), [(1.06, "mixed"), (1.04, "float32"), (0.5, "float32")])
def test_faster_number_format_is_chosen_above_a_five_percent_gain(set_seconds: Any, gain: float, chosen: str) -> None:
    # Emulated bfloat16 calls the float32 product, so the fake second must be much longer.
    set_seconds(float32=gain * 1e-3, mixed=1e-3)
    seconds = number_format.measure_products(SHAPES, tokens=16, onednn=True)
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported() and frozen_linear._HAS_ONEDNN
    seconds = {**seconds, "mixed": seconds["mixed"] - emulated * seconds["float32"]}
    assert number_format.choose_faster(seconds) == chosen


def test_product_times_are_weighted_by_module_count(set_seconds: Any) -> None:
    set_seconds(float32=0.01, mixed=0.02)
    seconds = number_format.measure_products(SHAPES, tokens=16, formats=("float32",))
    assert seconds == {"float32": pytest.approx(0.04)}


def test_measurement_ends_after_the_allowed_time(set_seconds: Any) -> None:
    clock = set_seconds(float32=1 / 64, mixed=0.0)
    number_format.measure_products(SHAPES, tokens=16, formats=("float32",))
    assert clock.now == 9 * 2 / 64, "a tenth pass of two products would end after 0.3 s"
    clock = set_seconds(float32=1 / 4, mixed=0.0)
    number_format.measure_products(SHAPES, tokens=16, formats=("float32",))
    assert clock.now == 2 / 4, "at least one pass is needed"


def test_large_products_get_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = frozen_linear.multiply_frozen
    monkeypatch.setattr(frozen_linear, "multiply_frozen", lambda *args: rows.append(len(args[0])) or plain(*args))
    monkeypatch.setattr(number_format, "_MAX_OPERATIONS", 8 * 64 * 30)
    clock = iter(range(1000)).__next__  # each reading is a second later, which allows one pass
    measure_products({(8, 4): 1, (4, 8): 1}, tokens=512, formats=("float32",), clock=clock)
    measure_products({(800, 4): 1}, tokens=512, formats=("float32",), clock=clock)
    assert rows == [30, 30, 16]


def test_number_format_is_measured_once_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    seconds = {"float32": 1.06, "mixed": 1.0}
    monkeypatch.setattr(number_format, "measure_products", lambda shapes, **how: calls.append((shapes, how)) or seconds)
    model, runtime, texts = (
        ModelSpec(path="random:bert", dtype="auto"),
        RuntimeSpec(num_threads=3, device="cpu"),
        list[str](),
    )
    before = torch.get_num_threads()
    for _ in range(2):
        assert choose_number_format(model, runtime, told=texts.append) == "mixed"
    assert calls == [(count_frozen_products(model), {"tokens": 3 * 512, "onednn": True})]
    assert texts == 2 * ["Number format: mixed (model.dtype=auto; mixed precision is 1.06 times as fast as float32)"]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("allowed", "device", "chosen"),
    [({"float32", "nf4"}, "cpu", "float32"), ({"mixed"}, "cpu", "mixed"), ({"mixed", "float32"}, "meta", "float32")],
)
def test_number_format_without_alternative_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, allowed: set[str], device: str, chosen: str
) -> None:
    monkeypatch.setattr(number_format, "resolve_device", lambda _: torch.device(device))
    monkeypatch.setattr(number_format, "_measure_model", None)
    assert choose_number_format(ModelSpec(path="random:bert", dtype="auto"), RuntimeSpec(), allowed=allowed) == chosen


@pytest.mark.parametrize("path", ["random:bert", "random:llama"])
def test_counted_products_match_the_layers_converted_to_mixed(path: str) -> None:
    base = load_base(ModelSpec(path=path, dtype="mixed"))
    converted = [module for module in base.modules() if isinstance(module, frozen_linear.RoundedLinear)]
    counted = count_frozen_products(ModelSpec(path=path, dtype="auto"))
    assert sum(counted.values()) == len(converted)
    assert set(counted) == {tuple(module.weight.shape) for module in converted}


def test_unfixed_number_format_is_refused_at_loading() -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype = 'auto': must be a number format: call"):
        load_base(ModelSpec(path="random:bert", dtype="auto"))

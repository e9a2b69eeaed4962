"""fedtune in a federation of stock Flower processes: the same adapter and ledgers, by sites without a network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .books import check_same_adapter, check_whole
from .federation import NAMES
from .stock import StockFederation

DEBUG = (
    *("experiment=debug", "runtime.device=cpu", "runtime.num_threads=1", "runtime.seeded_noise=true"),
    *("model.dtype=float32", "data.validation_rows=10", "data.test_rows=10", "federation.num_rounds=2"),
)
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, command: Any) -> Iterator[StockFederation]:
    made = StockFederation(tmp_path_factory.mktemp("stock"), command)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_three_stock_supernodes_come_to_the_adapter_of_the_simulation(
    stock: StockFederation, in_one_process: Callable[..., Path]
) -> None:
    run = stock.submit("one", DEBUG)
    assert stock.until_over(run) == "finished:completed", stock.call("flwr", "log", run, "banks", "--show")
    check_same_adapter(stock, "one", in_one_process("one", *DEBUG), tolerance=0)
    check_whole(stock, "one", rounds=2)
    assert [site.answered("update", "one") for site in stock.sites.values()] == [2, 2, 2]
    assert set(stock.sites) == set(NAMES)

"""A round's updates wait on disk, where nobody else reads them, and are gone when they have been averaged."""

import contextlib
import stat
from pathlib import Path

import numpy as np
import pytest

from fedtune.federation.update_store import Arrived
from fedtune.model.adapter import Adapter
from fedtune.spec import RunError


def test_an_update_is_kept_value_by_value(tmp_path: Path, adapter: Adapter) -> None:
    with Arrived(tmp_path / "arrived", adapter) as arrived:
        arrived.put("a", adapter.tensors)
        arrived.put("b", {name: value + 1 for name, value in adapter.tensors.items()})
        whole = arrived.values("a", start=0, count=arrived.sent.num_values)
        assert arrived.adapter(whole).digest() == adapter.digest()
        pieces = [arrived.values("a", start=start, count=3) for start in range(0, arrived.sent.num_values, 3)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        np.testing.assert_array_equal(arrived.values("b", start=0, count=arrived.sent.num_values), whole + 1)


def test_the_folder_is_nobody_else_s_and_begins_and_ends_with_the_round(tmp_path: Path, adapter: Adapter) -> None:
    folder = tmp_path / "checkpoints" / "arrived"
    Arrived(folder, adapter).__enter__().put("a", adapter.tensors)  # of a lead that was killed
    with contextlib.suppress(KeyError), Arrived(folder, adapter) as arrived:
        assert list(folder.iterdir()) == []
        arrived.put("a", adapter.tensors)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        raise KeyError
    assert not folder.exists()


def test_a_full_disk_ends_the_round_with_its_folder_and_what_it_needs(tmp_path: Path, adapter: Adapter) -> None:
    with Arrived(tmp_path / "arrived", adapter) as arrived:
        (tmp_path / "arrived" / "a").symlink_to("/dev/full")
        with pytest.raises(
            RunError, match=rf"arrived takes no more of a round \(No space.*{4 * arrived.sent.num_values} byt"
        ):
            arrived.put("a", adapter.tensors)

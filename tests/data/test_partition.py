from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data import Record
from fedtune.data.partition import (
    PartitionSpec,
    assign_site,
    hash_unit,
    is_heldout,
    is_selected,
    partition_records,
    split_heldout,
)
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task

from ..cases import read_cases
from .conftest import make_data_spec

KEY = b"a key of these tests"
DATA = make_data_spec(labels=("a", "b", "c"), max_length=5)
SPECS = [
    PartitionSpec(),
    PartitionSpec(proportions=(1.0, 2.0, 3.0)),
    PartitionSpec(kind="dirichlet", alpha=0.3, proportions=(5.0, 1.0, 1.0)),
    PartitionSpec(kind="column", sites={"north": 0, "east": 1, "west": 1, "south": 2}),
]
RECORD = st.builds(
    lambda text, label, site: Record({"text": text, "label": label, "site": site}),
    st.sampled_from(["where is my card", "lost card", "a place", "my b c d"]),
    st.sampled_from("abc"),
    st.sampled_from(["north", "east", "west", "south"]),
)


def make_records(count: int, *, labels: int = 1) -> list[Record]:
    return [Record({"text": f"record {i}", "label": str(i % labels)}) for i in range(count)]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(RECORD, max_size=8), new=RECORD, place=st.integers(0, 8), spec=st.sampled_from(SPECS))
def test_added_record_does_not_move_any_other(
    rows: list[Record], new: Record, place: int, spec: PartitionSpec, encoder_tokenizer: Any
) -> None:
    """Compares site, side and tokens of all records with and without an additional record at any position."""

    def trace_records(records: list[Record]) -> list[tuple[int, list[Record], list[list[int]], list[int]]]:
        return [
            (site, side, [ids.tolist() for ids in dataset.input_ids], list(dataset.targets))
            for site, held in enumerate(partition_records(records, spec, num_sites=3, key=KEY))
            for side in split_heldout(held, fraction=0.4, key=KEY)
            for dataset in [get_task("classification").tokenize(side, encoder_tokenizer, data=DATA)]
        ]

    longer = [*rows[:place], new, *rows[place:]]
    added = 0
    for before, after in zip(trace_records(rows), trace_records(longer), strict=True):
        (_, side, ids, targets), (_, side_after, ids_after, targets_after) = before, after
        if len(side_after) > len(side):
            position = next(i for i, record in enumerate(side_after) if record is new)
            for column in (side_after, ids_after, targets_after):
                del column[position]
            added += 1
        assert (side, ids, targets) == (side_after, ids_after, targets_after)
    assert added == 1


def test_partition_assignments_match_golden_values() -> None:
    """Reproducing a run depends on these assignments, so they must not change."""
    record = Record({"text": "where is my card", "label": "arrival"})
    assert hash_unit(record, purpose="site", key=KEY) == 0.25777897070972655
    rows = make_records(12, labels=3)
    assert [assign_site(r, SPECS[1], num_sites=3, key=KEY) for r in rows] == [0, 2, 1, 1, 0, 1, 1, 2, 2, 2, 0, 0]
    assert [assign_site(r, SPECS[2], num_sites=3, key=KEY) for r in rows] == [0, 0, 1, 0, 0, 1, 0, 0, 1, 2, 0, 0]


def test_partition_hash_is_uniform_and_independent_across_purposes() -> None:
    rows = make_records(4000)
    site = np.array([hash_unit(record, purpose="site", key=KEY) for record in rows])
    heldout = np.array([hash_unit(record, purpose="heldout", key=KEY) for record in rows])
    counts, _ = np.histogram(site, bins=10, range=(0, 1))
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)
    assert abs(np.corrcoef(site, heldout)[0, 1]) < 5 / np.sqrt(4000)


def test_site_sizes_follow_proportions_under_dirichlet_skew() -> None:
    rows = make_records(6000, labels=60)
    sizes = [len(site) / 6000 for site in partition_records(rows, SPECS[1], num_sites=3, key=KEY)]
    assert sum(sizes) == pytest.approx(1)
    assert np.allclose(sizes, [1 / 6, 2 / 6, 3 / 6], atol=0.04)
    for alpha, tolerance in ((0.3, 0.12), (1e6, 0.03)):
        spec = PartitionSpec(kind="dirichlet", alpha=alpha, proportions=(6, 3, 1))
        sites = partition_records(rows, spec, num_sites=3, key=KEY)
        assert np.allclose([len(site) / 6000 for site in sites], [0.6, 0.3, 0.1], atol=tolerance)
        counts = [Counter(record.fields["label"] for record in site) for site in sites]
        top = [max(c[str(label)] for c in counts) / sum(c[str(label)] for c in counts) for label in range(60)]
        assert (np.mean(top) > 0.75) == (alpha < 1)


@given(alpha=st.floats(1e-6, 1e6), num_sites=st.integers(1, 40), label=st.text(max_size=3))
def test_dirichlet_partition_always_returns_a_valid_site(alpha: float, num_sites: int, label: str) -> None:
    spec = PartitionSpec(kind="dirichlet", alpha=alpha)
    record = Record({"text": "a", "label": label.encode(errors="replace").decode()})
    assert 0 <= assign_site(record, spec, num_sites=num_sites, key=KEY) < num_sites


def test_column_partition_must_match_the_number_of_sites() -> None:
    rows = [Record({"text": "a", "site": site}) for site in ("south", "east", "north", "west")]
    sites = partition_records(rows, SPECS[3], num_sites=3, key=KEY)
    assert [[record.fields["site"] for record in site] for site in sites] == [["north"], ["east", "west"], ["south"]]
    unknown = Record({"text": "a", "site": "up"}, file="a.csv", line=3)
    with pytest.raises(DataError, match=r"a\.csv:3, site = 'up': .*data\.partition\.sites"):
        assign_site(unknown, SPECS[3], num_sites=3, key=KEY)
    for spec, message in ((SPECS[1], "proportions = .*one number for each of 4 sites"), (SPECS[3], "from 0 to 3")):
        with pytest.raises(ConfigError, match=message):
            spec.check_sites(4)
    for spec in SPECS:
        spec.check_sites(3)


def test_held_out_fraction_is_selected_by_hash() -> None:
    rows = make_records(2000)
    train, heldout = split_heldout(rows, fraction=0.1, key=KEY)
    assert len(train) + len(heldout) == 2000
    assert 140 < len(heldout) < 260
    assert all(is_heldout(record, fraction=0.1, key=KEY) for record in heldout)
    assert split_heldout(rows, fraction=0.0, key=KEY) == (rows, [])
    assert all(is_selected(record, fraction=1.0, key=KEY) for record in rows)
    smaller = {i for i, record in enumerate(rows) if is_selected(record, fraction=0.1, key=KEY)}
    larger = {i for i, record in enumerate(rows) if is_selected(record, fraction=0.2, key=KEY)}
    assert smaller < larger
    assert Counter(is_selected(r, fraction=0.1, key=b"another") for r in rows)[True] > 100
    assert smaller != {i for i, record in enumerate(rows) if is_selected(record, fraction=0.1, key=b"another")}


@pytest.mark.parametrize(("settings_", "message"), read_cases(__file__, "partitions"))
def test_invalid_partition_settings_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PartitionSpec(**settings_)
    assert str(error.value).startswith(message)

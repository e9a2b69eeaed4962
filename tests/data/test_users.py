"""Assignment of records to users: no user can move another user, or be at two sites."""

import hmac
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data import Record, group_by_user
from fedtune.data.load import read_own_records
from fedtune.data.partition import PartitionSpec, hash_unit, is_selected, partition_records, split_heldout
from fedtune.spec import ConfigError, DataError

from .conftest import make_data_spec, write_jsonl

KEY = b"a key of these tests"
COLUMNS = {"text": "text", "user": "who"}
SPECS = [
    PartitionSpec(),
    PartitionSpec(proportions=(1.0, 2.0, 3.0)),
    PartitionSpec(kind="column", sites={"north": 0, "east": 1, "west": 1, "south": 2}),
]
HOME = {"ann": "north", "bob": "east", "cleo": "west", "dan": "south", "eve": "north"}
RECORD = st.builds(
    lambda user, text: Record({"user": user, "text": text, "site": HOME[user]}),
    st.sampled_from(sorted(HOME)),
    st.text("ab", max_size=3),
)


def trace_users(rows: list[Record], spec: PartitionSpec) -> dict[str, list[tuple[int, int, bool]]]:
    """Return each user's record assignments in order: site, side, and whether a smaller run would use the record."""
    found: dict[str, list[tuple[int, int, bool]]] = {}
    for site, held in enumerate(partition_records(rows, spec, num_sites=3, key=KEY, unit="user")):
        for side, records in enumerate(split_heldout(held, fraction=0.5, key=KEY, unit="user")):
            for record in records:
                used = is_selected(record, fraction=0.5, key=KEY, unit="user")
                found.setdefault(record.fields["user"], []).append((site, side, used))
    return found


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(RECORD, max_size=12), gone=st.sampled_from(sorted(HOME)), spec=st.sampled_from(SPECS))
def test_records_of_a_user_stay_together_and_move_no_others(rows: list[Record], gone: str, spec: PartitionSpec) -> None:
    everyone = trace_users(rows, spec)
    assert all(len(set(places)) == 1 for places in everyone.values())
    assert sum(map(len, everyone.values())) == len(rows)
    without = trace_users([record for record in rows if record.fields["user"] != gone], spec)
    assert without == {user: places for user, places in everyone.items() if user != gone}


def test_user_assignment_depends_only_on_the_hashed_id() -> None:
    rows = [Record({"user": user}) for user in ("b", "a", "b", "c", "a", "b")]
    assert [places.tolist() for places in group_by_user(rows)] == [[0, 2, 5], [1, 4], [3]]
    assert group_by_user([]) == []
    # A keyed hash of the id alone: it changes with the key but not with other fields of the record.
    hashes = [
        hash_unit(Record(fields), purpose="site", key=key, unit="user")
        for fields, key in (
            *(({"user": "ann", "text": "a"}, KEY), ({"user": "ann", "text": "b", "label": "c"}, KEY)),
            *(({"user": "bob", "text": "a"}, KEY), ({"user": "ann", "text": "a"}, b"another")),
        )
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    # Reproducing a run depends on this hash, so it must not change.
    digest = hmac.new(KEY, b'site\0{"user":"ann"}', "sha256").digest()
    assert hashes[0] == (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def test_user_at_two_sites_is_refused_and_counted() -> None:
    rows = [Record({"user": who, "site": site}) for who in "xyz" for site in ("north", "south")][:5]
    rows = [replace(row, file="all.jsonl", line=line) for line, row in enumerate(rows)]
    message = r"all\.jsonl:1, site = 'south': must be the same for all records of a user, because privacy\.unit is user"
    with pytest.raises(DataError, match=message) as error:
        partition_records(rows, SPECS[2], num_sites=3, key=KEY, unit="user")
    assert "2 users would be split" in str(error.value)
    assert "data.partition.kind=file" in str(error.value)
    sites = partition_records(rows, SPECS[2], num_sites=3, key=KEY)
    assert [len(site) for site in sites] == [3, 0, 2], "for record-level privacy this is allowed"


ROLES = ("prompt", "completion")


def test_real_site_skips_records_without_exactly_one_user(tmp_path: Path) -> None:
    # A lead's settings must not make the site's answer depend on its records; the doctor reports such records before.
    rows = [{"text": f"text {n}", "who": who} for n, who in enumerate(("ann", ["ann", "bob"], "bob", None, "ann"))]
    columns = {"prompt": "text", "completion": "text", "user": "who"}
    data = make_data_spec(train_file=str(write_jsonl(tmp_path / "all.jsonl", rows)), columns=columns)
    assert data.map_required_columns(ROLES, unit="user") == columns
    records = read_own_records(data, columns=columns, fault=lambda _: None, key=KEY, unit="user")
    assert [record.fields["user"] for record in records.training] == ["ann", "bob", "ann"]
    by_record = read_own_records(data, columns=data.map_required_columns(ROLES), fault=lambda _: None, key=KEY)
    assert len(by_record.training) == 5
    assert "user" not in by_record.training[0].fields, "unneeded columns must not be read"


def test_user_level_privacy_requires_a_user_column() -> None:
    without = make_data_spec(*ROLES)
    with pytest.raises(ConfigError, match=r"^columns = .*has no column for role 'user', which privacy\.unit"):
        without.check_unit("user")
    by_label = make_data_spec("text", "label", "user", partition=PartitionSpec(kind="dirichlet"))
    with pytest.raises(ConfigError, match=r"^partition\.kind = 'dirichlet': partitions records by label"):
        by_label.check_unit("user")
    for each in (without, by_label, make_data_spec(*ROLES, "user")):
        each.check_unit("record")

"""Verification detects every change to a ledger that somebody without the site's key can make."""

import contextlib
import dataclasses
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.formatting import format_key_start
from fedtune.privacy.ledger import chain, store
from fedtune.privacy.ledger.chain import Head, Kind
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.release import Reason, Refused
from fedtune.spec import RunError

from ..cases import read_cases
from .builders import make_key, make_policy, make_proposal, reserve, site_key, tamper

COLUMNS = tuple(field.name for field in dataclasses.fields(chain.Event))
LATER = {"limits": {"max_rounds": 19}}


@pytest.fixture(scope="module")
def complete_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with every kind of event and permanent note, and a head from before its last five events."""
    path = tmp_path_factory.mktemp("whole") / "ledger.db"
    ledger = SiteLedger(path, make_policy(), site_key, create=True)

    def answer_round(proposal: Any, round: int) -> None:
        ledger.commit(reserve(ledger, proposal, round), b"reply %d" % round, fingerprint="f")

    answer_round(make_proposal(), 1)
    backup = path.read_bytes()
    answer_round(make_proposal(), 2)
    lost_head = ledger.head()
    path.write_bytes(backup)
    ledger = SiteLedger(path, make_policy(**LATER), site_key, create=True)
    ledger.charge_gap(lost_head)
    two = make_proposal(run="2", dataset="letters", plan={"num_rounds": 3})
    answer_round(two, 1)
    path.with_name("older.json").write_bytes(ledger.head().to_bytes())
    ledger.record_refusal(Refused(Reason.MAX_RANK, requested=9, allowed="at most 8"), run="3", round=1, request="q")
    ledger.make_offer(make_proposal(run="4"))
    ledger.reserve(two, round=2, request="digest 2 2")
    ledger.end_run("2")
    ledger.freeze("for this test")
    path.with_name("newest.json").write_bytes(ledger.head().to_bytes())
    return path


@pytest.fixture
def victim_ledger(complete_ledger: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(complete_ledger, tmp_path / "victim.db"))


@pytest.fixture
def newest_head(complete_ledger: Path) -> Head:
    return Head.read(complete_ledger.with_name("newest.json"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.row_factory = sqlite3.Row
        return [dict(row) for row in file.execute("SELECT * FROM events ORDER BY sequence")]


def read_verify_error(path: Path, **expected: Any) -> str:
    with pytest.raises(RunError) as caught:
        verify(path, **expected)
    return str(caught.value)


def rehash_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewrite sequences and hashes as a forger without the key can; signatures stay unchanged."""
    before, rehashed = chain.START, []
    for number, row in enumerate(rows, 1):
        values = row | {"sequence": number, "kind": Kind(row["kind"]), "detail": json.loads(row["detail"])}
        before = chain.Event(**values).compute_hash_after(before)
        rehashed.append(row | {"sequence": number, "hash": before})
    return rehashed


def replace_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    tamper(path, "DELETE FROM events")
    marks = ", ".join(f":{name}" for name in COLUMNS)
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA synchronous = OFF")
        file.executemany(f"INSERT INTO events ({', '.join(COLUMNS)}) VALUES ({marks})", rows)
        file.commit()


def test_untouched_ledger_passes_verification(complete_ledger: Path, newest_head: Head) -> None:
    verified = verify(complete_ledger)
    assert {event.kind for event in verified.events} == set(Kind)
    assert {event.detail["what"] for event in verified.events if event.kind is Kind.NOTE} == {
        *("opened", "policy", "restored", "run_ended", "frozen")
    }
    assert (verified.site_key, verified.history.hash) == (site_key.public, newest_head.hash)
    assert (verified.key_expected, verified.anchor_sequence) == (False, None)
    expected = verify(complete_ledger, site_key=site_key.public)
    assert (expected.key_expected, expected.anchor_sequence) == (True, None)
    anchored = verify(complete_ledger, anchor=newest_head)
    assert (anchored.key_expected, anchored.anchor_sequence) == (True, anchored.history.length)
    assert anchored.anchor_sequence == len(anchored.events)
    older_check = verify(complete_ledger, anchor=Head.read(complete_ledger.with_name("older.json")))
    assert older_check.anchor_sequence == len(older_check.events) - 5


def test_verification_changes_nothing_and_accepts_rewritten_rows(victim_ledger: Path) -> None:
    # The tests below drop and recreate the triggers; that alone must not be detected.
    replace_rows(victim_ledger, read_rows(victim_ledger))
    before = victim_ledger.read_bytes()
    victim_ledger.chmod(0o400)
    verify(victim_ledger)
    assert victim_ledger.read_bytes() == before


def list_other_values(column: str, value: Any) -> list[Any]:
    if isinstance(value, int):
        return [value + 1, -1 if value == 0 else 0, 2**40]
    others = [value + "x", "", "x" + value[1:], value.swapcase(), value.replace("1", "2"), value + " ", " " + value]
    if column == "time":
        others += [value.replace("+00:00", "Z"), value.replace("T", " "), "2020" + value[4:]]
    if column == "kind":
        others += [kind.value for kind in Kind]
    if column == "detail":
        fields = json.loads(value)
        others += [json.dumps(fields), "{}", "[]", "null", value.replace(":", ": ", 1), value.replace("0", "00", 1)]
        others += [chain.to_canonical_json({k: v for k, v in fields.items() if k != one}).decode() for one in fields]
    return [other for other in dict.fromkeys(others) if other != value]


@pytest.mark.parametrize("column", COLUMNS)
def test_tampered_value_is_detected_in_every_column_and_event_kind(
    complete_ledger: Any, victim_ledger: Path, column: str
) -> None:
    pristine = complete_ledger.read_bytes()
    tried = 0
    for row in read_rows(complete_ledger):
        for other in list_other_values(column, row[column]):
            victim_ledger.write_bytes(pristine)
            try:
                tamper(
                    victim_ledger, f"UPDATE events SET {column} = ? WHERE sequence = {row['sequence']}", values=(other,)
                )
            except sqlite3.IntegrityError:
                continue  # another row has this sequence
            tried += 1
            read_verify_error(victim_ledger)
    assert tried >= len(read_rows(complete_ledger))


@pytest.mark.parametrize("sql", read_cases(__file__, "replies"))
def test_tampered_reply_is_detected(victim_ledger: Path, sql: str) -> None:
    tamper(victim_ledger, sql)
    assert read_verify_error(victim_ledger) == "the stored replies are not the newest committed replies"


def test_deleted_event_is_detected(complete_ledger: Path, victim_ledger: Path) -> None:
    pristine = complete_ledger.read_bytes()
    for row in read_rows(complete_ledger)[:-1]:
        victim_ledger.write_bytes(pristine)
        tamper(victim_ledger, f"DELETE FROM events WHERE sequence = {row['sequence']}")
        assert read_verify_error(victim_ledger).startswith(f"event {row['sequence']} is missing")


def test_invalid_sequence_numbers_and_non_text_events_are_detected(complete_ledger: Path, victim_ledger: Path) -> None:
    for sequence in (0, -1, 10**6):
        replace_rows(
            victim_ledger, [*read_rows(complete_ledger), read_rows(complete_ledger)[-1] | {"sequence": sequence}]
        )
        read_verify_error(victim_ledger)
    tamper(victim_ledger, "UPDATE events SET run = CAST(x'ff' AS TEXT) WHERE sequence = 3")
    assert "Could not decode to UTF-8" in read_verify_error(victim_ledger)


# A forger who recomputes every hash but has no key.


def test_forged_deletion_reordering_or_insertion_is_detected(complete_ledger: Path, victim_ledger: Path) -> None:
    rows = read_rows(complete_ledger)
    for forged in (
        [row for row in rows if row["kind"] != "refusal"],  # hides the refusals
        [*rows[:-1], rows[-2], rows[-1]],
        [*rows[:-2], rows[-1]],
        [rows[0], rows[1], *rows[2:-2], rows[-1], rows[-2]],
    ):
        replace_rows(victim_ledger, rehash_rows(forged))
        message = read_verify_error(victim_ledger)
        assert (
            "is not signed by the site's key" in message
            or "is invalid: the event's time is before the previous event's time" in message
        )


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 600 + "1" + "}" * 600, '{"what":1e999}', '{"what":NaN}', "{"])
def test_invalid_json_in_an_event_raises_a_run_error(victim_ledger: Path, text: str) -> None:
    tamper(victim_ledger, "UPDATE events SET detail = ? WHERE sequence = 2", values=(text,))
    assert read_verify_error(victim_ledger) == "event 2 was changed: its format is invalid"


# A forger with a different key.


def test_ledger_resigned_by_another_key_is_detected(
    complete_ledger: Path, victim_ledger: Path, newest_head: Head
) -> None:
    forger, (first, *rows, _) = make_key(9), read_rows(complete_ledger)
    opening = chain.to_canonical_json(json.loads(first["detail"]) | {"site_key": forger.public}).decode()
    fitting = rehash_rows([first | {"detail": opening}, *rows])
    replace_rows(
        victim_ledger, [row | {"signature": forger.sign(chain.EVENT, row["hash"].encode())} for row in fitting]
    )
    check = verify(victim_ledger)
    assert (check.site_key, check.key_expected) == (forger.public, False), "a ledger alone cannot prove its owner"
    assert read_verify_error(victim_ledger, site_key=site_key.public).endswith(
        f"names site key {forger.public}, not {site_key.public}"
    )
    assert read_verify_error(victim_ledger, anchor=newest_head) == "the anchor belongs to another ledger"
    with pytest.raises(RunError, match="is not signed by the site's key"):
        SiteLedger(victim_ledger, make_policy(**LATER), site_key, create=True)


def test_event_signed_by_another_key_is_detected(complete_ledger: Path, victim_ledger: Path) -> None:
    rows = read_rows(complete_ledger)
    for number in range(len(rows)):
        changed = [dict(row) for row in rows]
        changed[number]["signature"] = make_key(9).sign(chain.EVENT, rows[number]["hash"].encode())
        replace_rows(victim_ledger, changed)
        key = format_key_start(verify(complete_ledger).site_key)
        assert read_verify_error(victim_ledger) == f"event {number + 1} is not signed by the site's key {key}"


def test_truncated_ledger_is_detected_only_with_an_anchor(
    complete_ledger: Path, victim_ledger: Path, newest_head: Head
) -> None:
    replace_rows(victim_ledger, read_rows(complete_ledger)[:-3])
    assert verify(victim_ledger).anchor_sequence is None
    length = len(read_rows(complete_ledger))
    message = f"it ends at event {length - 3}, but the anchor covers event {length}"
    message += "; fedtune ledger restore charges the missing events"
    assert (
        read_verify_error(victim_ledger, anchor=newest_head)
        == f"the ledger was rolled back to an older copy: {message}"
    )


def test_anchor_without_the_signature_of_its_site_key_is_refused(newest_head: Head, tmp_path: Path) -> None:
    path = tmp_path / "anchor.json"
    forged = dataclasses.replace(
        newest_head, sequence=1, signature=make_key(9).sign(chain.HEAD, newest_head.encode_signed_bytes())
    )
    path.write_bytes(forged.to_bytes())
    with pytest.raises(ValueError, match="must be signed with the site key that it names"):
        Head.read(path)


def test_opening_a_ledger_for_training_detects_tampering(complete_ledger: Path, victim_ledger: Path) -> None:
    rows = read_rows(complete_ledger)
    SiteLedger(victim_ledger, make_policy(**LATER), site_key, create=True)
    for forged in (
        [rows[0] | {"code": "x"}, *rows[1:]],
        rehash_rows([rows[0] | {"code": "x"}, *rows[1:]]),
        rehash_rows(rows[:3] + rows[4:]),
    ):
        replace_rows(victim_ledger, forged)
        with pytest.raises(RunError, match="training is not possible with a damaged ledger"):
            SiteLedger(victim_ledger, make_policy(**LATER), site_key, create=True)


def test_invalid_event_leaves_the_history_unchanged(open_ledger: Any, path: Path) -> None:
    """An invalid event signed with the correct key, as a faulty version might write; then the file is repaired."""
    ledger = open_ledger()
    ledger.reserve(make_proposal(), round=1, request="q")
    original, before = path.read_bytes(), ledger.history.count_total_charges()
    row = read_rows(path)[-1]
    bad = row | {"sequence": 5, "attempt": 7, "kind": Kind.RESERVE, "detail": json.loads(row["detail"])}
    event = chain.Event(**bad).compute_hash_after(row["hash"])
    signed = dataclasses.replace(chain.Event(**bad), hash=event, signature=site_key.sign(chain.EVENT, event.encode()))
    with store.open_for_writing(path) as file:
        store.insert_event(file, signed)
    for check in (lambda: ledger.end_run("r"), lambda: verify(path)):
        with pytest.raises(RunError, match=r"event 5 \(reserve\) is invalid: the reservation contradicts"):
            check()
    path.write_bytes(original)
    ledger.end_run("unknown")
    assert ledger.history.count_total_charges() == before
    assert ledger.sign_receipt("r").charged_rounds == 1


def test_empty_or_missing_ledger_raises_a_run_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert read_verify_error(path) == f"ledger {path} does not exist"
    store.create_ledger_file(path)
    assert read_verify_error(path) == f"ledger {path} is empty"

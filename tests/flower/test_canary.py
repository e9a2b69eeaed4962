"""Nothing of a site's own words is in any byte that leaves it: not of an exception, a path, a record or a database."""

from __future__ import annotations

import base64
import errno
import logging
from typing import Any

import pytest

from fedtune.federation.rounds import run_rounds
from fedtune.spec import DataError

CANARY = "patient-4711-has-hepatitis"
_WORDS = (CANARY, "patient", "hepatitis", "Traceback", "Error", "ledger.db", "site_key.pem", "sqlite")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedtune")


def require_silence(sent: list[bytes], words: tuple[str, ...] = _WORDS) -> None:
    """No word, nor the canary in another encoding that a library might have put it into."""
    assert sent
    everything = b"\0".join(sent)
    for word in words:
        assert word.encode() not in everything
    canary = CANARY.encode()
    for spelled in (canary.hex().encode(), CANARY.encode("utf-16-le"), base64.b64encode(canary)[:-4]):
        assert spelled not in everything


def three_of(made: Any, *, failed: str, reason: str) -> Any:
    """Run a round: one site fails for a reason of the list, the other two are averaged."""
    state = run_rounds(made.transport, made.lead, made.start)
    assert state.rounds[0].failed_sites == {failed: reason}
    assert len(state.rounds[0].sites) == 2
    return state


_CHAINED = RuntimeError("patient in row 3")
_CHAINED.__cause__ = ValueError(f"cannot tokenise {CANARY}")


@pytest.mark.parametrize(
    "error",
    [
        _CHAINED,
        DataError(f"/records/{CANARY}.csv:12, text", f"{CANARY} came in on Tuesday", f"must be {CANARY}"),
        OSError(errno.ENOSPC, f"no space for {CANARY}", f"/records/{CANARY}"),
        type(CANARY.replace("-", "_"), (Exception,), {})(),
        MemoryError(CANARY),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_training_raises_stays(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    made = federation()
    made.fails["site-2"] = error
    state = three_of(made, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert "site-2 failed in round 1" in caplog.text
    assert CANARY in caplog.text.replace("_", "-")
    receipt = state.receipts["site-2"]
    assert CANARY not in repr(receipt)
    assert receipt.charged_rounds == 1, "the round was charged before it failed"


def test_the_names_of_a_sites_files_stay(
    federation: Any, everything_sent: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    names = {
        "ledger": f"{CANARY}/{CANARY}.db",
        "site_key": f"{CANARY}.pem",
        "anchor": f"{CANARY}.json",
        "population": {"name": CANARY},
        "releases": {"metrics": "none"},
    }
    made = federation(policies={"site-2": names})
    assert run_rounds(made.transport, made.lead, made.start).rounds[0].failed_sites == {}
    require_silence(everything_sent)
    # Now with a ledger that cannot be read: the error names its path.
    made.ledger_path("site-2").write_bytes(b"no database" * 500)
    again = federation(policies={"site-2": names}, asks={"run": "s"})
    three_of(again, failed="site-2", reason="site_error")
    require_silence(everything_sent)
    assert f"{CANARY}.db cannot be read or written" in caplog.text


def test_a_refusal_repeats_what_was_asked_and_the_policys_numbers_only(
    federation: Any, everything_sent: list[bytes]
) -> None:
    tables: dict[str, Any] = {"limits": {"max_rounds": 2}, "population": {"name": CANARY}}
    made = federation(policies={"site-2": tables})
    state = three_of(made, failed="site-2", reason="max_rounds")
    require_silence(everything_sent)
    assert b"at most 2" in b"".join(everything_sent)
    assert state.receipts["site-2"].charged_rounds == 0


def test_the_search_finds_what_it_looks_for(federation: Any, everything_sent: list[bytes]) -> None:
    # Else all of the above would pass over nothing.
    made = federation(asks={"run": CANARY})
    run_rounds(made.transport, made.lead, made.start)
    with pytest.raises(AssertionError, match="hepatitis"):
        require_silence(everything_sent)


def test_everything_is_listened_to(federation: Any, everything_sent: list[bytes], adapter: Any) -> None:
    made = federation(num_rounds=2)
    run_rounds(made.transport, made.lead, made.start)
    introductions, offers, replies, ends = 3, 3, 2 * 3, 3
    assert len(everything_sent) == introductions + offers + replies + ends
    assert sum(b"site_key" in sent for sent in everything_sent) == offers + replies + ends, "a receipt is in each"

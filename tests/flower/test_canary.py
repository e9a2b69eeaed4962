"""Nothing of a site's own words is in any byte that leaves it: not of an exception, a path, a record or a database."""

import base64
import logging
from typing import Any

import pytest

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
    assert made.run().rounds[0].failed_sites == {}
    require_silence(everything_sent)
    # Now with a ledger that cannot be read: the error names its path.
    made.ledger_path("site-2").write_bytes(b"no database" * 500)
    again = federation(policies={"site-2": names}, asks={"run": "s"})
    state = again.run()
    assert (state.rounds[0].sites, state.rounds[0].failed_sites) == (("site-1", "site-3"), {"site-2": "site_error"})
    require_silence(everything_sent)
    assert f"{CANARY}.db cannot be read or written" in caplog.text


def test_the_search_finds_what_it_looks_for(federation: Any, everything_sent: list[bytes]) -> None:
    # Else all of the above would pass over nothing.
    made = federation(asks={"run": CANARY})
    made.run()
    with pytest.raises(AssertionError, match="hepatitis"):
        require_silence(everything_sent)


def test_everything_is_listened_to(federation: Any, everything_sent: list[bytes], adapter: Any) -> None:
    made = federation(num_rounds=2)
    made.run()
    introductions, offers, replies, ends = 3, 3, 2 * 3, 3
    assert len(everything_sent) == introductions + offers + replies + ends
    assert sum(b"site_key" in sent for sent in everything_sent) == offers + replies + ends, "a receipt is in each"

"""A site whose training fails: it is reported, nothing of why leaves it, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

import fedtune.flower.participants as participants
from fedtune.flower.grid import InProcessGrid
from fedtune.model import Adapter

CANARY = "patient-4711-has-hepatitis"


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make training of the given (site, round) pairs raise with the canary in the text."""
    train_round = participants.train_round

    def patch(*fails: tuple[str, int]) -> None:
        def train(model: Any, adapter: Adapter, examples: Any, work: Any, **rest: Any) -> Adapter:
            if (work.site, work.round) in fails:
                raise ValueError(f"cannot tokenise {CANARY}")
            return train_round(model, adapter, examples, work, **rest)

        monkeypatch.setattr(participants, "train_round", train)

    return patch


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Message]]:
    """Every message that a site hands to Flower."""
    caught: list[Message] = []
    pull = InProcessGrid.pull_messages

    def spy(self: InProcessGrid, message_ids: Any) -> list[Message]:
        messages = pull(self, message_ids)
        caught.extend(messages)
        return messages

    monkeypatch.setattr(InProcessGrid, "pull_messages", spy)
    return caught


def everything_in(message: Message) -> bytes:
    """All that a message would put on the wire."""
    content = message.content if message.has_content() else None
    error = message.error if message.has_error() else None
    arrays = b"".join(
        name.encode() + array.data
        for record in (content.array_records.values() if content else ())
        for name, array in record.items()
    )
    return repr((message.metadata, content, error)).encode() + arrays


def test_the_run_goes_on_without_the_site_and_without_a_word_of_why(
    fail: Callable[..., None], replies: list[Message], simulate: Any, tmp_path: Path, result_of: Any
) -> None:
    fail(("site-2", 1))
    folder = simulate(into=tmp_path)
    result = result_of(folder)
    assert [entry["sites"] for entry in result["rounds"]] == [["site-1"], ["site-1", "site-2"]]
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{"site-2": "site_error"}, {}]
    # The round was charged before it failed.
    assert result["privacy"]["sites"]["site-2"]["steps"] == 4
    assert len(replies) == 2 + 4, "two introductions and two replies a round"
    sent = b"".join(map(everything_in, replies))
    assert b"site_error" in sent
    for word in (CANARY, "patient", "ValueError", "Traceback", "tokenise"):
        assert word.encode() not in sent
    log = (folder / "log.txt").read_text()
    assert f"cannot tokenise {CANARY}" in log
    assert "Traceback" in log
    for shown in ("run.json", "report.json", "report.html"):
        assert CANARY not in (folder / shown).read_text()


def test_the_terminal_names_the_site_and_the_reason_only(
    fail: Callable[..., None], command: Any, tiny: Any, tmp_path: Path
) -> None:
    fail(("site-2", 1))
    outcome = command("simulate", *tiny("privacy=none", into=tmp_path))
    assert outcome.code == 0
    assert "site-2: site_error" in outcome.out
    assert CANARY not in outcome.out + outcome.err


def test_too_few_sites_end_the_run_with_a_checkpoint(
    fail: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
    tiny: Any,
    tmp_path: Path,
    result_of: Any,
) -> None:
    fail(("site-2", 2))
    outcome = command("simulate", *tiny("federation.min_sites=2", "federation.spare_rounds=1", into=tmp_path))
    folder = tmp_path / "run"
    assert outcome.code == 1
    assert outcome.message.startswith("round 2: 1 of 2 sites sent an update, and federation.min_sites = 2 are needed")
    assert "(site-2: site_error)" in outcome.message
    assert CANARY not in outcome.out + outcome.err
    early = result_of(folder)  # what may have been charged is on record though the run did not end well
    assert early["final"]["metrics"] == {}
    assert {(spent["steps"], spent["upper_bound"]) for spent in early["privacy"]["sites"].values()} == {(4, True)}
    monkeypatch.undo()
    assert command("simulate", f"resume={folder}").code == 0
    steps = {site: spent["steps"] for site, spent in result_of(folder)["privacy"]["sites"].items()}
    assert steps == {"site-1": 4, "site-2": 6}


def test_a_site_that_always_fails_is_charged_for_every_round(
    fail: Callable[..., None], simulate: Any, tmp_path: Path, result_of: Any
) -> None:
    fail(("site-1", 1), ("site-1", 2))
    spent = result_of(simulate(into=tmp_path))["privacy"]["sites"]["site-1"]
    assert (spent["steps"], spent["upper_bound"]) == (4, False)


def test_a_site_whose_ledger_cannot_be_read_counts_as_silent(
    simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result_of: Any
) -> None:
    # Not even a receipt comes, so that the lead must assume every round was charged.
    open_site = participants.Participants.site

    def broken(self: Any, index: int) -> Any:
        if index == 1:
            raise OSError(f"disk of {CANARY} is gone")
        return open_site(self, index)

    monkeypatch.setattr(participants.Participants, "site", broken)
    folder = simulate(into=tmp_path)
    result = result_of(folder)
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{"site-2": "site_error"}] * 2
    spent = result["privacy"]["sites"]
    assert (spent["site-1"]["steps"], spent["site-1"]["upper_bound"]) == (4, False)
    assert (spent["site-2"]["steps"], spent["site-2"]["upper_bound"]) == (4, True)
    assert CANARY in (folder / "log.txt").read_text()

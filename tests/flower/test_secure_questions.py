"""What the lead sends with its questions for the steps of a secure sum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message

from fedtune.federation.lead import Checkpoints
from fedtune.federation.protocol import SumRequest
from fedtune.federation.secure_rounds import SecureSums
from fedtune.flower import flower_records
from fedtune.flower.grid_transport import GridTransport
from fedtune.flower.simulation import InProcessGrid
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.proposal import Proposal
from fedtune.spec import RunError

from ..federation.secure.parties import Federation, terms_of


class Silent(InProcessGrid):
    """Sites that answer nothing; what they are asked is kept, by its step."""

    def __init__(self) -> None:
        super().__init__(lambda message, context: message, 3, replied=lambda number: None)
        self.settings: list[tuple[str, str]] = []

    def receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            asked = SumRequest.of(flower_records.to_signed(message.content))
            self.settings.append((asked.step, flower_records.to_settings(message.content)))
        return iter(())


@pytest.mark.parametrize("begun", [False, True], ids=["announce", "join"])
def test_settings_travel_with_the_first_step_of_a_session_alone(
    begun: bool,
    run_proposal: Callable[..., Proposal],
    lead_key: SigningKey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites, checkpoints, grid = Federation(terms_of(3, 3)), Checkpoints(tmp_path, "digest"), Silent()
    if begun:
        announced = [party.announce().decode() for party in sites.parties.values()]
        checkpoints.keep_session(
            json.dumps({"name": "0" * 32, "announced": announced, "left_out": [], "accused": []}).encode()
        )
    lead: Any = SimpleNamespace(
        proposal=run_proposal(),
        key=lead_key,
        settings="{...}",
        checkpoints=checkpoints,
        declared_sizes=dict.fromkeys(sites.parties, 1),
        site_keys=sites.terms.members,
        federation=SimpleNamespace(round_timeout_s=1.0),
    )
    monkeypatch.setattr("fedtune.federation.secure_rounds.terms_of", lambda *_, **__: sites.terms)
    transport = GridTransport(grid, dict(enumerate(sites.parties, start=1)))
    state: Any = SimpleNamespace(adapter=SimpleNamespace(num_values=0))
    with pytest.raises(RunError, match="0 of 3 sites are in a session"):
        SecureSums(transport, lead, state).prepare()
    assert set(grid.settings) == {("join", "") if begun else ("announce", "{...}")}

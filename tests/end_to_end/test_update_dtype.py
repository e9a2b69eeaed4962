"""Updates travel in bfloat16 by default: the same adapter over Flower and without it, by half the bytes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune.flower.simulation as simulation
from fedtune.config import saved_config
from fedtune.federation.lead import Checkpoints
from fedtune.federation.protocol import Reply
from fedtune.federation.site_round import answer, consider, end_run
from fedtune.federation.transport import Question
from fedtune.privacy.ledger import store
from fedtune.privacy.release import Difference, Receipt, Update
from fedtune.sites.virtual_site import Participants

from ..conftest import adapter_of, result_of, simulate


class Here:
    """A transport that calls the sites, with no message between."""

    def __init__(self, everyone: Participants) -> None:
        self._sites = {name: number for number, name in enumerate(everyone.config.federation.active)}
        self._everyone = everyone

    def reach(self, sites: Collection[str], *, timeout_s: float) -> Collection[str]:
        return self._sites

    def _each(self, questions: Sequence[Question], ask: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        return ((asked.site, ask(self._everyone.site(self._sites[asked.site]), asked)) for asked in questions)

    def invite(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        return self._each(questions, lambda site, asked: consider(site, asked.signed))

    def train(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Reply]]:
        return self._each(questions, lambda site, asked: answer(site, asked.signed, asked.adapter))

    def end(self, questions: Sequence[Question], *, timeout_s: float) -> Iterator[tuple[str, Receipt | None]]:
        return self._each(questions, lambda site, asked: end_run(site, asked.signed, asked.adapter))

    def traffic(self) -> tuple[int, int]:
        return 0, 0


def test_one_adapter_with_flower_or_without_and_half_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = ("runtime.seeded_noise=true", "privacy.noise_multiplier=4.0")
    whole = simulate(*seeded, "federation.update_dtype=float32", into=tmp_path, name="float32")
    flower = simulate(*seeded, into=tmp_path, name="flower")
    up = [sum(one["bytes_up"] for one in result_of(folder)["rounds"]) for folder in (whole, flower)]
    state = Checkpoints(flower / "checkpoints", saved_config(flower).digest()).load()
    assert up[0] - up[1] == pytest.approx(2 * 2 * 2 * state.adapter.num_values, abs=100)  # sites, rounds, bytes
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "_engine", lambda config, folder, everyone, listener: lambda run: run(Here(everyone)))
        direct = simulate(*seeded, into=tmp_path, name="direct")
    assert adapter_of(flower) == adapter_of(direct) != adapter_of(whole)
    for name, value in Checkpoints(whole / "checkpoints", saved_config(whole).digest()).load().adapter.tensors.items():
        np.testing.assert_allclose(state.adapter.tensors[name], value, rtol=0, atol=0.01 * np.abs(value).max())
    with store.reading(next((flower / "sites").glob("*/ledger.db"))) as file:
        kept = [Update.from_bytes(reply) for _, _, reply in store.stored_replies(file)]
    assert kept
    assert all(isinstance(update.tensors, Difference) for update in kept), "a site keeps what the lead has"

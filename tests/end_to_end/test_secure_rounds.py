"""Runs whose lead learns nothing but the sum of the sites' noisy gradient sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune.flower.secure_rounds as secure_rounds
import fedtune.sites.work as site_work
from fedtune.federation.secure.messages import Upload
from fedtune.federation.secure.packing import unpacked
from fedtune.model import Adapter
from fedtune.training.lead_step import lead_step

SECURE = ("federation.aggregation=secure", "training.local_steps=1", "federation.num_rounds=3")
THREE = ("federation.num_sites=3", "runtime.seeded_noise=true")


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """What each site put into the sums, in the order in which they did."""
    found: list[dict[str, np.ndarray]] = []
    real = site_work.share_of_round

    def noted(*arguments: Any, **named: Any) -> Any:
        found.append(real(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(site_work, "share_of_round", noted)
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Adapter, np.ndarray, Adapter]]:
    """Adapter before, total, and adapter after each of the lead's steps."""
    found: list[tuple[Adapter, np.ndarray, Adapter]] = []

    def noted(adapter: Adapter, total: np.ndarray, state: Any, **named: Any) -> Any:
        after = lead_step(adapter, total, state, **named)
        found.append((adapter, total, after[0]))
        return after

    monkeypatch.setattr(secure_rounds, "lead_step", noted)
    return found


def test_the_lead_gets_the_sum_to_the_bit(simulate: Any, tmp_path: Path, shares: Any, steps: Any) -> None:
    simulate(*SECURE, *THREE, into=tmp_path)
    assert len(steps) == 3
    for number, (adapter, total, after) in enumerate(steps):
        of_round = shares[3 * number : 3 * number + 3]
        exact = sum(np.concatenate([share[name].ravel() for name in adapter.tensors]) for share in of_round)
        np.testing.assert_array_equal(total, exact)
        assert after.digest() != adapter.digest()


def test_nothing_that_a_site_sends_shows_its_share(
    simulate: Any, tmp_path: Path, shares: Any, steps: Any, everything_sent: list[bytes]
) -> None:
    simulate(*SECURE, *THREE, into=tmp_path)
    sent = b"".join(everything_sent)
    assert b'"tensors": "masked"' in sent
    assert b'"tensors": [' not in sent, "no update in clear"
    for share in shares:
        values = np.concatenate([value.ravel() for value in share.values()])
        for kind in ("<i4", "<i8", "<f4"):
            assert values[:64].astype(kind).tobytes() not in sent


def test_it_is_one_step_of_sgd_on_the_mean(
    simulate: Any, tmp_path: Path, steps: Any, result_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = ("training=sgd", "training.learning_rate=0.5", "training.momentum=0", "training.schedule=constant")
    simulate(*SECURE, *THREE, *rate, into=tmp_path)
    for adapter, total, after in steps:
        ends = np.cumsum([value.size for value in adapter.tensors.values()])[:-1]
        for (name, value), part in zip(adapter.tensors.items(), np.split(total, ends), strict=True):
            moved = (after.tensors[name].astype(np.float64) - value).ravel()
            multiple = moved @ part / (part @ part)
            assert multiple < 0
            np.testing.assert_allclose(moved, multiple * part, atol=1e-6, err_msg="each moves by the same multiple")


def test_a_site_is_charged_for_the_fewest_shares(simulate: Any, tmp_path: Path, result_of: Any) -> None:
    spent = {}
    for threshold in (3, 4):
        chosen = ("federation.num_sites=4", f"federation.threshold={threshold}", "privacy.noise_multiplier=1.0")
        folder = simulate(*SECURE, *chosen, into=tmp_path, name=f"t{threshold}")
        spent[threshold] = result_of(folder)["privacy"]["sites"]["site-1"]["epsilon"]
    assert spent[3] > spent[4]


def test_a_run_goes_on_without_a_site_and_ends_without_two(
    simulate: Any, command: Any, tiny: Any, tmp_path: Path, result_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failing = site_work.share_of_round, {"bank-2"}

    def fails(model: Any, adapter: Any, units: Any, work: Any, **named: Any) -> Any:
        if work.site in failing and work.round > 1:
            raise OSError("its disk is gone")
        return real(model, adapter, units, work, **named)

    monkeypatch.setattr(site_work, "share_of_round", fails)
    four = ("federation.num_sites=4", "federation.site_names=[bank-1,bank-2,bank-3,bank-4]")
    folder = simulate(*SECURE, *four, into=tmp_path)
    rounds = result_of(folder)["rounds"]
    assert [entry["sites"] for entry in rounds][1:] == [["bank-1", "bank-3", "bank-4"]] * 2
    assert all(entry["failed_sites"] == {"bank-2": "site_error"} for entry in rounds[1:])
    failing.add("bank-4")
    done = command("simulate", *tiny(*SECURE, *four, into=tmp_path, name="two"))
    assert done.code == 1
    assert "2 of 4 sites sent an update, and federation.threshold = 3 are needed" in done.out + done.err


def test_a_round_whose_sum_is_lost_moves_nothing_and_is_charged(
    simulate: Any, tmp_path: Path, result_of: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation.secure.party import Party

    real: Callable[..., bytes] = Party.unmask

    def dies(self: Party, request: bytes) -> bytes:
        if self._release == 2:
            raise OSError("in the middle of it")
        return real(self, request)

    monkeypatch.setattr(Party, "unmask", dies)
    folder = simulate(*SECURE, *THREE, into=tmp_path)
    result = result_of(folder)
    assert [entry["sites"] for entry in result["rounds"]][1] == []
    assert set(result["rounds"][1]["failed_sites"].values()) == {"not_summed"}
    assert len(steps) == 2
    assert steps[0][2].digest() == steps[1][0].digest(), "the adapter stayed"
    assert result["privacy"]["sites"]["site-1"]["steps"] == 3


def test_uploads_are_packed(simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: Any) -> None:
    sizes: list[tuple[int, int]] = []
    real = Upload.from_bytes

    def noted(data: bytes, session: Any) -> Upload:
        upload = real(data, session)
        sizes.append((len(upload.vector), session.terms.bits))
        assert unpacked(upload.vector, session.terms.length, session.terms.bits).max() < 2**session.terms.bits
        return upload

    monkeypatch.setattr(Upload, "from_bytes", noted)
    simulate(*SECURE, *THREE, into=tmp_path)
    length = sum(value.size for value in shares[0].values())
    assert {size for size, _ in sizes} == {-(-length * bits // 8) for _, bits in sizes}
    assert {bits for _, bits in sizes} <= set(range(12, 24))


def test_a_site_that_was_started_again_pays_nothing_and_joins_the_next_session(
    simulate: Any, tmp_path: Path, result_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation.secure.at_site import SumsAtSite

    real = SumsAtSite.upload

    def forgets(self: SumsAtSite, run: str, release: int, vector: Any) -> bytes:
        upload = real(self, run, release, vector)
        if (self.site, release) == ("site-2", 1):
            self.parties.of_run.clear()
        return upload

    monkeypatch.setattr(SumsAtSite, "upload", forgets)
    folder = simulate(*SECURE, "federation.num_sites=4", "federation.num_rounds=4", into=tmp_path)
    result = result_of(folder)
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{}, {"site-2": "secure_sum"}, {}, {}]
    assert result["privacy"]["sites"]["site-2"]["steps"] == 3
    assert result["privacy"]["sites"]["site-1"]["steps"] == 4


def test_a_lead_that_starts_again_leaves_the_round_that_it_lost(
    simulate: Any, command: Any, tiny: Any, tmp_path: Path, result_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = secure_rounds.SecureRounds.total

    def dies(self: Any, round: int, uploads: Any) -> Any:
        if round == 2:
            raise KeyboardInterrupt
        return real(self, round, uploads)

    with monkeypatch.context() as patched:
        patched.setattr(secure_rounds.SecureRounds, "total", dies)
        assert command("simulate", *tiny(*SECURE, *THREE, into=tmp_path)).code == 1
    done = command("simulate", f"resume={tmp_path / 'run'}")
    assert done.code == 0, done.err
    rounds = result_of(tmp_path / "run")["rounds"]
    assert [len(entry["sites"]) for entry in rounds] == [3, 0, 3]
    assert set(rounds[1]["failed_sites"].values()) == {"not_summed"}
    assert result_of(tmp_path / "run")["privacy"]["sites"]["site-1"]["steps"] == 3

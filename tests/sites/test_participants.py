"""What one process shares between virtual sites, and what it keeps apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.participants as participants
from fedtune.cli.compose import compose_run
from fedtune.config import RunConfig
from fedtune.evaluation.units import unit_scores
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site import Site
from fedtune.privacy.mechanism import noised_scores
from fedtune.privacy.randomness import SeededRandomness
from fedtune.sites.participants import Participants
from fedtune.spec import ConfigError


@pytest.fixture
def config(tiny: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *overrides: compose_run(tiny(*overrides, into=tmp_path))


def test_there_is_one_base_model_whatever_the_number_of_sites(
    simulate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    build = participants.ready_model

    def spy(*arguments: Any, **rest: Any) -> Any:
        built.append(build(*arguments, **rest))
        return built[-1]

    monkeypatch.setattr(participants, "ready_model", spy)
    simulate("federation.num_sites=6", "privacy=none", into=tmp_path)
    assert len(built) == 1


def test_every_record_lies_at_exactly_one_site(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def sizes(sites: int) -> list[tuple[int, int]]:
        everyone = Participants(config(f"federation.num_sites={sites}"), tmp_path)
        return [(len(data), data.num_tokens) for data in everyone.site_data.values()]

    parts, (whole,) = sizes(4), sizes(1)
    assert len(parts) == 4
    assert min(parts) > (10, 0)
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_each_site_has_a_policy_a_key_and_a_ledger_of_its_own(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    everyone = Participants(config(), tmp_path)
    sites = [everyone.site(index) for index in (0, 1)]
    of_a_site = {"site.toml", "site_key.pem", "ledger.db"}
    assert {path.relative_to(tmp_path / "sites").as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        "lead_key.pem",
        *(f"{site}/{name}" for site in ("site-1", "site-2") for name in of_a_site),
    }
    receipts = [site.ledger.receipt("r") for site in sites]
    assert len({receipt.site_key for receipt in receipts}) == 2
    assert [site.ledger.policy.site for site in sites] == ["site-1", "site-2"]
    again = everyone.site(0)
    assert again.ledger.receipt("r") == receipts[0], "opening it again writes nothing"


NOISED = ("privacy.metrics=noised", "data.heldout_fraction=0.3")


def first_request(site: Site) -> RoundRequest:
    return RoundRequest(
        proposal=site.proposal, round=1, site=site.name, adapter_digest="ab" * 32, receipt=None, expires=1e12
    )


def texts(dataset: Any) -> Counter[bytes]:
    return Counter(token_ids.tobytes() for token_ids in dataset.input_ids)


def test_held_out_records_are_never_trained_on(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    whole = Participants(config("data.max_length=64"), tmp_path)
    split = Participants(config("data.max_length=64", *NOISED), tmp_path)
    for site, all_records in whole.site_data.items():
        training, heldout = texts(split.site_data[site]._dataset), texts(split._heldout_data[site])
        assert training
        assert heldout
        assert not training & heldout
        assert training + heldout == texts(all_records._dataset)
        share = heldout.total() / texts(all_records._dataset).total()
        assert 0.15 < share < 0.45


def test_records_are_held_out_by_themselves_alone(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    # One record more or less moves no other between training and scoring.
    some = Participants(config(*NOISED, "data.train_fraction=0.02"), tmp_path)._site_records["site-1"]
    more = Participants(config(*NOISED, "data.train_fraction=0.03"), tmp_path)._site_records["site-1"]
    assert len(more.training) > len(some.training)
    assert all(record in more.training for record in some.training)
    assert all(record in more.heldout for record in some.heldout)


def test_a_round_scores_the_adapter_that_came_and_noises_it_as_planned(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    everyone = Participants(config(*NOISED, "runtime.seeded_noise=true"), tmp_path)
    site = everyone.site(0)
    request = first_request(site)
    trained = site.train(request, everyone.initial_adapter, 1)
    assert trained.scores is not None
    everyone.initial_adapter.load_into(everyone.model)
    heldout = everyone._heldout_data["site-1"]
    exact = unit_scores(everyone.model, heldout, task="classification", pad_id=everyone.tokenizer.pad_token_id)
    expected = noised_scores(
        exact,
        declared_size=90 * 0.3,
        noise_multiplier=20.0,
        stream=SeededRandomness(everyone.config.seed).stream("site-1", 1, 1, "scores"),
    )
    assert trained.scores == expected
    assert trained.adapter.digest() != everyone.initial_adapter.digest()
    assert site.train(request, everyone.initial_adapter, 2).scores != expected, "a retry draws fresh noise"


def test_without_noised_metrics_nothing_is_scored(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **rest: object) -> Any:
        raise AssertionError

    monkeypatch.setattr(participants, "unit_scores", never)
    everyone = Participants(config("data.heldout_fraction=0.3"), tmp_path)
    site = everyone.site(0)
    request = first_request(site)
    assert site.train(request, everyone.initial_adapter, 1).scores is None


def test_the_fingerprint_follows_the_records_and_the_sites_key(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def fingerprint(everyone: Participants) -> str:
        site = everyone.site(0)
        request = first_request(site)
        return site.train(request, everyone.initial_adapter, 1).fingerprint

    one = fingerprint(Participants(config(), tmp_path / "a"))
    assert fingerprint(Participants(config(), tmp_path / "a")) == one
    assert fingerprint(Participants(config(), tmp_path / "b")) != one, "nobody without the key can test a guess"
    assert fingerprint(Participants(config("seed=1"), tmp_path / "a")) != one, "another split, other records"


def test_no_lead_files_are_no_scores(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    everyone = Participants(config("data.validation_file=null", "data.test_file=null"), tmp_path)
    assert everyone.validation is None
    assert everyone.score(everyone.initial_adapter, everyone.test) == {}


def test_longer_texts_than_the_model_has_positions_for(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length = 513: must be at most the model's 512"):
        Participants(config("data.max_length=513"), tmp_path)

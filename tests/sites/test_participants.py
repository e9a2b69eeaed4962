"""What one process shares between virtual sites, and what it keeps apart."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.shared_model as shared_model
import fedtune.sites.work as site_work
from fedtune.config import RunConfig
from fedtune.evaluation.scoring import unit_scores
from fedtune.federation.secure.at_site import Parties
from fedtune.federation.secure.party import Promise
from fedtune.federation.site_round import Trained
from fedtune.privacy.mechanism import noised_scores
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.randomness import SeededRandomness
from fedtune.privacy.site_files import SiteFiles
from fedtune.sites.secure_sums import sums_of
from fedtune.sites.virtual_site import POLICY, Participants
from fedtune.spec import RunError

from ..conftest import command, simulate, tiny
from ..privacy.builders import stranger_key
from .conftest import first_request

Configure = Callable[..., RunConfig]


def test_there_is_one_base_model_whatever_the_number_of_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    build = shared_model.ready_model
    monkeypatch.setattr(shared_model, "ready_model", lambda *of, **rest: built.append(of) or build(*of, **rest))
    simulate("federation.num_sites=6", "privacy=none", into=tmp_path)
    assert len(built) == 1


def test_every_record_lies_at_exactly_one_site(config: Configure, tmp_path: Path) -> None:
    def sizes(sites: int, *more: str) -> list[tuple[int, int]]:
        everyone = Participants(config(f"federation.num_sites={sites}", *more), tmp_path)
        return [(len(work.examples), work.examples.num_tokens) for work in everyone.work.values()]

    parts, (whole,) = sizes(4), sizes(1)
    assert sizes(4, "federation.participants=[site-3]") == parts[2:3], "whoever else takes part"
    assert len(parts) == 4
    assert min(parts) > (10, 0)
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


def test_each_site_has_a_policy_a_key_and_a_ledger_of_its_own(config: Configure, tmp_path: Path) -> None:
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
    assert everyone.site(0).ledger.receipt("r") == receipts[0], "opening it again writes nothing"
    (tmp_path / "sites" / "site-1" / "ledger.db").write_bytes(b"no database" * 500)
    assert everyone.changed() == [], "a ledger that is not in order answers for itself"
    with pytest.raises(RunError, match="cannot be read or written"):
        everyone.site(0)


def test_simulated_sites_sum_with_whom_their_policies_name(config: Configure, tmp_path: Path) -> None:
    everyone = Participants(config("federation.site_names=[a,b]"), tmp_path)
    own = everyone.identities
    policy = everyone.sites.files("a").policy
    other = {"b": stranger_key.public}
    write_policy(replace(policy, trust=replace(policy.trust, members=other)), tmp_path / "sites" / "a" / POLICY)
    rosters = [site.sums.roster for site in (everyone.site(0), everyone.site(1)) if site.sums is not None]
    assert rosters == [{"a": own["a"], **other}, own]


def test_sites_whose_ledgers_share_a_folder_keep_each_their_own_promises(site_policy: Any, tmp_path: Path) -> None:
    for site in ("east", "west"):
        policy = replace(site_policy(site), ledger=f"{site}.db", site_key=f"{site}.pem")
        ledger, site_key = tmp_path / policy.ledger, tmp_path / policy.site_key
        files = SiteFiles(policy=policy, ledger=ledger, site_key=site_key, anchor=None)
        promise = Promise(session="ab" * 32, release=1, survivors=("east", "west"), confirmed=site == "east")
        sums_of(files, Parties(), members={}).keep(promise)
    kept = {path.name: path.read_text().count('"confirmed": true') for path in tmp_path.glob("*promises.jsonl")}
    assert kept == {"east.db.promises.jsonl": 1, "west.db.promises.jsonl": 0}


NOISED = ("privacy.metrics=noised", "data.heldout_fraction=0.3")


def train(everyone: Participants, *, attempt: int = 1) -> Trained:
    """What the first site makes of the initial adapter in round 1."""
    site = everyone.site(0)
    request = first_request(everyone.config, everyone.sites.lead_key(), site=site.name)
    assert site.prepare(request).proposal == request.proposal
    return site.train(request, everyone.shared.initial_adapter, attempt)


def test_a_round_scores_the_adapter_that_came_and_noises_it_as_planned(config: Configure, tmp_path: Path) -> None:
    everyone = Participants(config(*NOISED, "runtime.seeded_noise=true"), tmp_path)
    shared = everyone.shared
    trained = train(everyone)
    assert trained.scores is not None
    shared.initial_adapter.load_into(shared.model)
    heldout = everyone.work["site-1"]._heldout
    exact = unit_scores(shared.model, heldout, pad_id=shared.tokenizer.pad_token_id)
    stream = SeededRandomness(everyone.config.seed).stream("site-1", 1, 1, "scores")
    expected = noised_scores(exact, declared_size=90 * 0.3, noise_multiplier=20.0, stream=stream)
    assert trained.scores == expected
    assert trained.adapter.digest() != shared.initial_adapter.digest()
    again = train(everyone, attempt=2)
    assert again.scores != expected, "a retry draws fresh noise"
    assert again.adapter.digest() != trained.adapter.digest()


def test_without_noised_metrics_nothing_is_scored(config: Configure, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(site_work, "unit_scores", None)
    assert train(Participants(config("data.heldout_fraction=0.3"), tmp_path)).scores is None


def test_the_fingerprint_follows_the_records_and_the_sites_key(config: Configure, tmp_path: Path) -> None:
    one = train(Participants(config(), tmp_path / "a")).fingerprint
    assert train(Participants(config(), tmp_path / "a")).fingerprint == one
    assert train(Participants(config(), tmp_path / "b")).fingerprint != one, "nobody without the key can test a guess"
    assert train(Participants(config("seed=1"), tmp_path / "a")).fingerprint != one, "another split, other records"


def test_no_lead_files_are_no_scores(config: Configure, tmp_path: Path) -> None:
    shared = Participants(config("data.validation_file=null", "data.test_file=null"), tmp_path).shared
    assert shared.validation is None
    assert shared.score(shared.initial_adapter, shared.test) == {}


@pytest.mark.parametrize("wrong", ["data.columns.text=nope", "data.test_file=gone.csv"])
def test_data_are_judged_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setattr(shared_model, "ready_model", None)
    assert wrong.partition("=")[2] in command("simulate", *tiny(wrong, into=tmp_path)).failed()


def test_what_takes_long_is_told_of(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_model, "_measured", {})
    told: list[str] = []
    settings = config("lora=last_layer", "federation.site_names=[a,b]")
    everyone = Participants(settings, tmp_path / "run", progress=lambda what, done, total: told.append(what))
    work, adapter = everyone.work["a"], everyone.shared.initial_adapter
    assert list(dict.fromkeys(told)) == ["loading the model", "trying the model"]
    request = first_request(everyone.config, everyone.sites.lead_key(), site="a")
    work.do(request, adapter, attempt=1, fingerprint_key=bytes(32), noise_factor=1.0)
    assert told[-1] == "a: running the frozen layers over its records"

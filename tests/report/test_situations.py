"""Real runs and real ledgers in the situations that a report must tell truly, each against a golden file."""

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from dp_accounting import GaussianDpEvent

import fedtune.show.run_progress as display
from fedtune.config import read_saved_config
from fedtune.federation.lead import Checkpoints
from fedtune.privacy import events
from fedtune.privacy.accountant import epsilon_pld
from fedtune.privacy.release import Reason
from fedtune.report import from_ledger, from_run, signing
from fedtune.report.derive.verdicts import explain_missing_room, find_report_outcome
from fedtune.report.from_run import read_run
from fedtune.report.model import Report
from fedtune.report.page.render import render
from fedtune.report.page.translations import LANGUAGES, load_catalog
from fedtune.report.verify_report import problems
from fedtune.sites.virtual_site import Participants

from ..books import Books
from ..conftest import fail_where, read_result, run_proposal, simulate
from .masking import check_golden
from .shown import list_problem_places, read_status


def check(name: str, report: Report) -> Report:
    """The report is whole, its figures follow from its events, and it is the one that somebody has read.

    The page says the verdict with each of its reasons, and every site's epsilon, rounded up.
    """
    assert signing.parse_report(signing.report_to_json(report).encode()) == report
    assert problems(report) == []
    check_golden(name, report)
    words, verdict = load_catalog("en"), report.verdict
    text = read_shown_text(render(report, language="en"))
    outcome = find_report_outcome(report).removesuffix("_run").removesuffix("_ledger")
    answer = {"within": "Was the limit kept? Yes."}.get(outcome) or str(words.text(f"verdict.kept_{outcome}"))
    assert html.unescape(answer) in text
    for reason in verdict.reasons:
        assert html.unescape(str(words.text(f"reason.{reason}"))) in text, reason
    for site in report.sites:
        assert site.site in text
        assert words.figure(site.spent.epsilon, "epsilon") in text
    return report


def read_shown_text(page: str) -> str:
    """What a page says outside of drawings, in one line."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def read_verdict(report: Report) -> tuple[str, tuple[str, ...]]:
    return report.verdict.state, report.verdict.reasons


@pytest.fixture
def books(books: Any) -> Books:
    return books(anchor="anchor.json")


# Runs.


def test_simulation_report_shows_its_banner(command: Any, tmp_path: Path) -> None:
    folder, banner = simulate(into=tmp_path), load_catalog("en").texts["banner"]["simulation"]
    report = check("within", from_run.build_run_report(folder))
    assert read_verdict(report) == ("within", ())
    assert 0 < report.epsilon < report.facts.target_epsilon
    site = folder / "sites/site-1"
    signed = ["--sign", str(site / "site_key.pem"), "--output", str(tmp_path / "own")]
    for arguments, target in (([str(site / "site.toml"), *signed], tmp_path / "own"), ([str(folder)], folder)):
        assert banner in " ".join(command("report", *arguments).out.split())
        report = signing.parse_report((target / "report.json").read_bytes())
        assert report.banners == ("simulation",)
        assert problems(report) == []
        assert (target / "report.html").read_text().count(banner) == 1
    # Two figures for one training, and page 1 of each says why.
    ours, theirs = (
        signing.parse_report((target / "report.json").read_bytes()).epsilon for target in (folder, tmp_path / "own")
    )
    assert ours < theirs
    for target, kind in ((folder, "run"), (tmp_path / "own", "ledger")):
        first = (target / "report.html").read_text().partition('<nav aria-labelledby="contents">')[0]
        assert load_catalog("en").text(f"publish.which_{kind}") in first
    # A policy that says nothing of it, as earlier versions wrote them for kept sites.
    kept_site = tmp_path / "kept"
    shutil.copytree(folder / "sites", kept_site)
    text = (site / "site.toml").read_text()
    assert "simulated = true\n" in text
    (kept_site / "receipts.json").unlink()
    text = text.replace("simulated = true\n", "") + "\n[asserted]\nno_person_at_another_site = true\n"
    for ledger in kept_site.glob("*/ledger.db"):
        ledger.unlink()
        (ledger.parent / "site.toml").write_text(text.replace("site-1", ledger.parent.name))
    simulate(f"runtime.sites_dir={kept_site}", into=tmp_path, name="again")
    own_report = from_ledger.build_ledger_report(kept_site / "site-1/site.toml")
    assert own_report.banners == ("simulation",)
    assert read_status(own_report, "policy_noted") == "verified"


def test_report_of_a_run_without_privacy_states_no_guarantee(tmp_path: Path) -> None:
    report = check("without_privacy", from_run.build_run_report(simulate("privacy=none", into=tmp_path)))
    assert read_verdict(report) == ("no_guarantee", ("no_noise",))
    assert (report.epsilon, report.facts.target_epsilon, report.randomness) == (None, None, "none")
    assert [site.spent.epsilon for site in report.sites] == [None, None], "unbounded, never 0"
    assert report.assumptions[0].code == "noise_in_every_step"
    assert "unpredictable_randomness" not in {one.code for one in report.assumptions}, "there is none"
    for language in LANGUAGES:
        said = load_catalog(language).texts
        text = read_shown_text(render(report, language=language))
        assert said["where_no_noise"]["released__updates"] in text
        for section, key in (("released", "updates"), ("assumption", "unpredictable_randomness")):
            assert said[section][key] not in text
        assert not re.search("noised|noisy|verrausch", text, re.IGNORECASE)
    # Every site refused it.
    charged = {"rounds": 0, "steps": 0, "epsilon": 0.0, "epsilon_pld": 0.0, "epsilon_rdp": 0.0}
    none = {"mechanisms": (), "curve": (), "steps": (), "releases": (), "meaning": None}
    sites = tuple(replace(site, spent=replace(site.spent, **charged), **none) for site in report.sites)
    assert not any("unpredictable_randomness" in place for place in list_problem_places(replace(report, sites=sites)))


def test_report_of_a_seeded_study_states_no_guarantee(tmp_path: Path) -> None:
    folder = simulate("runtime.seeded_noise=true", into=tmp_path)
    assert read_result(folder)["privacy"]["seeded_noise"] is True
    report = check("seeded", from_run.build_run_report(folder))
    assert read_verdict(report) == ("no_guarantee", ("seeded_noise",))
    assert [site.meaning for site in report.sites] == [None, None]
    assert (report.facts.seeded_noise, report.randomness) == (True, "seeded")
    for language in LANGUAGES:
        texts = load_catalog(language).texts["where_seeded"]["released__updates"]
        assert texts in read_shown_text(render(report, language=language))


@pytest.fixture
def kept_site_runs(tmp_path: Path) -> Path:
    """Two runs on the same sites, the first of which wants more noise in the second than that one has."""
    for name in ("first", "second"):
        simulate(f"runtime.sites_dir={tmp_path / 'sites'}", into=tmp_path, name=name)
        Books(tmp_path / "sites/site-1").edit(limits={"min_noise_multiplier": 9.0})
        Books(tmp_path / "sites/site-2").edit(budget={"max_epsilon": 2.0})
    return tmp_path


def test_run_refused_by_one_site_charges_only_the_other_site(kept_site_runs: Path) -> None:
    report = check("refused_site", from_run.build_run_report(kept_site_runs / "second"))
    refusing, training = report.sites
    assert (refusing.verdict.reasons, refusing.spent.epsilon, refusing.spent.rounds) == (("nothing_spent",), 0.0, 0)
    assert [(one.kind, one.reason, one.count) for one in refusing.releases] == [("refusal", "min_noise_multiplier", 2)]
    assert training.spent.epsilon == report.epsilon > 0
    assert read_verdict(report) == ("within", ())


def test_epsilon_of_two_runs_on_one_data_set_is_composed(kept_site_runs: Path) -> None:
    report = check("two_runs", from_ledger.build_ledger_report(kept_site_runs / "sites/site-2/site.toml"))
    (site,) = report.sites
    assert [(run.rounds, run.state) for run in site.lifetime.runs] == [(2, "ended")] * 2
    assert site.lifetime.epsilon > max(run.epsilon for run in site.lifetime.runs)
    # The cap went up between the two, and that is said.
    assert read_verdict(report) == ("within", ("cap_raised",))
    check("two_runs_refusing_site", from_ledger.build_ledger_report(kept_site_runs / "sites/site-1/site.toml"))


def test_crashed_run_reports_an_upper_bound(
    command: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display.Display, "on_round_finished", Mock(side_effect=KeyboardInterrupt))
    assert command("simulate", *tiny(into=tmp_path)).code == 1
    folder = tmp_path / "run"
    report = check("crashed", from_run.build_run_report(folder))
    assert read_verdict(report) == ("within", ("not_finished", "site_silent"))
    assert (report.facts.final, report.facts.files) == ({}, {})
    assert [site.spent.rounds for site in report.sites] == [2, 2], "no site signed that the run is over"
    assert report.epsilon == report.sites[0].spent.planned_epsilon > report.sites[0].steps[0].epsilon > 0
    # The same, as a process leaves it that dies in its second round.
    (folder / "run.json").unlink()
    Checkpoints(folder / "checkpoints", read_saved_config(folder).digest()).record_request(2, ["site-1", "site-2"])
    report = check("killed", from_run.build_run_report(folder))
    assert read_verdict(report) == ("within", ("not_finished", "site_silent"))
    assert all(map(report.facts.is_upper_bound, report.facts.sites))


def test_silent_site_is_reported_with_an_upper_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_where(monkeypatch, Participants, "site", lambda self, index: index == 1)
    report = check("silent_site", from_run.build_run_report(simulate(into=tmp_path)))
    assert read_verdict(report) == ("within", ("site_silent",))
    assert [report.facts.is_upper_bound(site) for site in report.facts.sites] == [False, True]


@pytest.mark.nightly
def test_run_with_noised_metrics_reports_the_released_scores(tmp_path: Path) -> None:
    noised = ("privacy.metrics=noised", "privacy.metrics_noise_multiplier=5", "data.heldout_fraction=0.4")
    folder = simulate(*noised, into=tmp_path)
    report = check("noised_metrics", from_run.build_run_report(folder))
    assert "noised_scores" in report.covers
    (mechanism,) = report.sites[0].mechanisms
    assert sorted(charge.count for charge in mechanism.charges) == [2, 4], "scores once a round, two steps a round"
    site_report = check("noised_metrics_site", from_ledger.build_ledger_report(folder / "sites/site-1/site.toml"))
    assert "noised_scores" in site_report.released


@pytest.mark.nightly
def test_chained_runs_report_the_held_out_scores_of_their_predecessors(tmp_path: Path) -> None:
    noised = ("privacy.metrics=noised", "privacy.metrics_noise_multiplier=2", "data.heldout_fraction=0.4")
    folders = [simulate(*noised, into=tmp_path, name="first")]
    for name in ("second", "third"):
        folders.append(simulate(*noised, f"model.adapter='{folders[-1]}'", into=tmp_path, name=name))
    first, second, third = (from_run.build_run_report(folder) for folder in folders)
    assert first.facts.held_out is None, "it began with nothing, and is below all others"
    assert [entry.run for entry in second.facts.held_out] == ["second"]
    assert [entry.run for entry in third.facts.held_out] == ["second", "third"]
    assert third.facts.held_out[0] == second.facts.held_out[0]
    assert third.utility.score_drop is not None
    assert problems(third) == []
    # What the sites released of both rounds, again by hand.
    rounds = read_run(folders[2]).rounds
    shares = [share for entry in rounds for share in entry.site_scores.values()]
    mean = sum(score for score, _ in shares) / sum(count for _, count in shares)
    assert third.facts.held_out[-1].mean == pytest.approx(mean)
    own_epsilon = epsilon_pld(events.count_mechanisms([GaussianDpEvent(2.0)] * len(rounds)), third.facts.delta)
    assert third.utility.held_out_epsilon == pytest.approx(own_epsilon)
    assert third.utility.held_out_epsilon < third.epsilon
    # Without the report of the run before, the line begins anew.
    (folders[1] / "report.json").unlink()
    assert [entry.run for entry in from_run.build_run_report(folders[2]).facts.held_out] == ["third"]


# Ledgers.


def test_frozen_ledger_reports_no_remaining_budget(books: Books) -> None:
    books.charge(run_proposal(), 1)
    books.open().freeze("the study is over")
    books.refuse(Reason.FROZEN, run="r")
    report = check("frozen", from_ledger.build_ledger_report(books.site_toml))
    (site,) = report.sites
    assert (site.lifetime.frozen, site.lifetime.remaining_epsilon, site.lifetime.reference_remaining_runs) == (
        True,
        0.0,
        0,
    )
    assert explain_missing_room(report) == "closed"
    assert read_verdict(report) == ("within", ())


def test_restored_ledger_reports_lost_charges(books: Books) -> None:
    books.charge(run_proposal(), 1)
    backup = books.copy_ledger("backup.db")
    books.charge(run_proposal(), 2)
    books.charge(run_proposal(run="lost", noise_multiplier=6.0), 1)
    spent = from_ledger.build_ledger_report(books.ledger).epsilon
    head = books.open().head()
    shutil.copy(backup, books.ledger)
    assert read_verdict(from_ledger.build_ledger_report(books.site_toml)) == ("no_guarantee", ("ledger_not_verified",))
    # Its owner takes the anchor away, which keeps it from training, and has it made up for.
    (books.folder / "anchor.json").unlink()
    books.edit(anchor="")
    books.open().charge_gap(head)
    report = check("restored", from_ledger.build_ledger_report(books.site_toml))
    assert report.epsilon == spent
    (site,) = report.sites
    assert (site.lifetime.restored, read_status(report, "lost_events_recharged")) == (1, "verified")
    assert "lost_branches" in report.covers
    # The second round of `r` is one of its rounds; what the unknown run did stands by itself.
    assert [(m.run, m.rounds, m.noise_multiplier) for m in site.mechanisms] == [("r", 2, 4.0), ("", 1, 6.0)]
    assert [(run.run, run.rounds) for run in site.lifetime.runs] == [("r", 2)]
    assert site.steps[-1].run == ""

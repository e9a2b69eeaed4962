"""Reports that sites sign and release: who is believed, and what a lead's report then says."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.federation.lead import Checkpoints
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import RECEIPT
from fedtune.report import from_ledger, from_run, signing
from fedtune.report.checks import Check, TrustedValues, check_report
from fedtune.report.model import Report
from fedtune.report.page import render
from fedtune.report.verify_report import derive_report
from fedtune.spec import ConfigError

from ..books import Books
from ..conftest import simulate
from .shown import change_facts, list_problem_places, read_status, require_sound


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs at kept sites; `<folder>/first`, `<folder>/second`, and the sites in `<folder>/sites`."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        simulate(f"runtime.sites_dir={folder / 'sites'}", "federation.num_rounds=1", into=folder, name=name)
        for site in ("site-1", "site-2"):
            Books(folder / "sites" / site).edit(budget={"max_epsilon": 2.0})
    return folder


@pytest.fixture
def folder(kept_runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept_runs, tmp_path / "copy"))


def load_site_key(folder: Path, site: str) -> SigningKey:
    return SigningKey.load(folder / "sites" / site / "site_key.pem")


def report_of(folder: Path, site: str = "site-1") -> Report:
    return from_ledger.build_ledger_report(folder / "sites" / site / "site.toml")


def write_signed_report(folder: Path, site: str = "site-1", **changes: Any) -> Report:
    """What `fedtune report site.toml --sign` writes at the site; `changes` are made before it is signed."""
    return signing.sign_report(replace(report_of(folder, site), **changes), load_site_key(folder, site))


def sign_changed(folder: Path, of: str = "site-1", **changes: Any) -> Report:
    """The report of a site with changed facts, and all else as it was, signed by the first site."""
    return signing.sign_report(change_facts(report_of(folder, of), **changes), load_site_key(folder, "site-1"))


def join_reports(folder: Path, *reports: Report) -> Report:
    """The report of the second run with what its sites released."""
    return from_run.build_run_report(folder / "second", site_reports=reports)


def derive_changed(folder: Path, **changes: Any) -> Report:
    """What the first site would sign that changed facts of its ledger and derived all else from them."""
    return signing.sign_report(
        derive_report(replace(report_of(folder).facts, **changes)), load_site_key(folder, "site-1")
    )


def test_released_site_figures_are_merged_into_the_run_report(folder: Path) -> None:
    alone = from_run.build_run_report(folder / "second")
    own = write_signed_report(folder)
    report = require_sound(join_reports(folder, own))
    joined, other = report.sites
    assert (joined.source, other.source) == ("signed_site_report", "charged_by_receipts")
    said, missing = (site.statement for site in report.facts.sites)
    assert (said.approved, said.lifetime) == (own.facts.approved, own.sites[0].lifetime)
    assert said.approved.max_epsilon == 2.0
    assert said.verification.site_key == load_site_key(folder, "site-1").public
    assert said.asserted == {}, "nobody can state anything for a made-up site"
    # This run's own figures stay what they were, and all runs' stand beside them.
    assert joined.spent == alone.sites[0].spent
    assert joined.mechanisms == alone.sites[0].mechanisms
    assert said.lifetime.epsilon > joined.spent.epsilon
    assert [run.rounds for run in said.lifetime.runs] == [1, 1]
    assert {release.run for release in said.releases} == {joined.mechanisms[0].run}
    assert (joined.releases, missing) == ((), None)
    assert {release.run for release in other.releases} == {other.mechanisms[0].run}
    assert report.verdict.state == "within"
    both = join_reports(folder, own, write_signed_report(folder, "site-2"))
    assert [read_status(one, "units_at_one_site_only") for one in (alone, report, both)] == ["assumed"] * 3
    assert read_status(both, "site_reports_agree") == "verified"


def test_site_reports_are_read_from_the_run_folder(folder: Path) -> None:
    own_report = write_signed_report(folder, "site-2")
    (folder / "second" / "site_reports").mkdir()
    (folder / "second" / "site_reports" / "site-2.json").write_text(signing.report_to_json(own_report))
    report = from_run.build_run_report(folder / "second")
    assert [site.source for site in report.sites] == ["charged_by_receipts", "signed_site_report"]
    assert join_reports(folder, own_report) == report, "the same one twice is one"
    earlier = from_run.build_run_report(folder / "first", site_reports=[write_signed_report(folder)]).facts
    assert earlier.sites[0].statement.lifetime.runs[0].run == earlier.run, "and an earlier run's report takes it"
    (folder / "second" / "site_reports" / "site-1.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"site-1\.json"):
        from_run.build_run_report(folder / "second")


def test_site_above_its_own_cap_determines_the_run_verdict(folder: Path) -> None:
    Books(folder / "sites" / "site-1").edit(recorded=True, budget={"max_epsilon": 0.36})
    report = require_sound(join_reports(folder, write_signed_report(folder)))
    assert (report.verdict.state, report.verdict.reasons) == ("exceeded", ("above_lifetime_cap",))
    assert [site.verdict.state for site in report.sites] == ["exceeded", "within"]


def test_site_report_below_its_receipts_voids_the_guarantee(folder: Path) -> None:
    *earlier, newest_run = report_of(folder).facts.runs
    less = derive_changed(folder, runs=(*earlier, replace(newest_run, plan=replace(newest_run.plan, num_rounds=9))))
    report = require_sound(join_reports(folder, less))
    assert (report.verdict.state, report.verdict.reasons) == ("no_guarantee", ("site_report_disagrees",))
    assert report.sites[1].verdict.state == "within"
    assert report.sites[0].meaning is None
    assert read_status(report, "site_reports_agree") == "violated"


def test_self_contradicting_site_report_is_refused(folder: Path) -> None:
    (site,) = report_of(folder).sites
    (*earlier, newest_run) = site.mechanisms
    figures = ("epsilon", "with_reserved", "epsilon_pld", "epsilon_rdp")
    for changes in (
        change_newest_run(site, rounds=0),
        change_newest_run(site, seeded_noise=True),
        {"mechanisms": (*earlier, replace(newest_run, noise_multiplier=9.0))},
        change_lifetime(site, **dict.fromkeys(figures, 0.001), remaining_epsilon=1.999),
    ):
        forged = write_signed_report(folder, sites=(replace(site, **changes),))
        assert "is inconsistent" in read_refusal(folder, forged)
    assert "is inconsistent" in read_refusal(folder, sign_changed(folder, verification=None))


def test_site_report_older_than_its_receipts_is_refused(folder: Path) -> None:
    match = report_of(folder).facts.verification
    receipt = from_run.read_run(folder / "second").receipts["site-1"]
    assert match.num_events >= receipt.sequence
    early = sign_changed(folder, verification=replace(match, num_events=receipt.sequence - 1))
    assert "is older than this run" in read_refusal(folder, early)
    shutil.rmtree(folder / "second" / "checkpoints")
    assert "this run has no receipt from" in read_refusal(folder, write_signed_report(folder))


def test_date_of_a_site_report_is_shown_with_its_figures(folder: Path) -> None:
    own_report = write_signed_report(folder)
    report = join_reports(folder, own_report)
    first, second = (site.statement for site in report.facts.sites)
    assert (first.date, second) == (own_report.facts.date, None)
    (match,) = [item for item in report.assumptions if item.code == "site_reports_are_newest"]
    assert (match.status, match.evidence) == ("assumed", f"site-1: {own_report.facts.date}")
    html = render.render(report, language="en")
    budget = html[html.index('id="budget"') :]
    assert "As of" in budget
    assert 'data-at="/facts/sites/0/statement/date"' in budget
    assert "counts_of_events" in report.unprotected_figures, "the ledger's number of entries is among the figures"


SPENT = ("epsilon", "with_reserved", "period_epsilon")


def test_impossible_site_statement_is_detected(folder: Path) -> None:
    facts = join_reports(folder, *(write_signed_report(folder, site) for site in ("site-1", "site-2"))).facts
    site, other = facts.sites
    statement = site.statement
    for change, place in (
        ({"date": "2020-01-01"}, "date"),
        ({"asserted": {"no_person_at_another_site": True}}, "asserted"),
        ({"verification": other.statement.verification}, "verification.site_key"),
        ({"releases": statement.releases * 2}, "releases"),
        ({"releases": tuple(replace(item, run="r") for item in statement.releases)}, "releases"),
        (change_newest_run(statement, run="another"), "lifetime.runs"),
        (change_newest_run(statement, rounds=2), "lifetime.runs"),
        (change_newest_run(statement, epsilon=0.01), "lifetime.runs.epsilon"),
        (change_newest_run(statement, planned_epsilon=0.01), "lifetime.runs.planned_epsilon"),
        (change_lifetime(statement, **dict.fromkeys(SPENT, 0.001), remaining_epsilon=1.999), "lifetime.epsilon"),
        (change_lifetime(statement, caps=()), "caps"),
        (change_lifetime(statement, order=1e300), "lifetime.order"),
        (change_lifetime(statement, order=1.0), "lifetime.order"),
    ):
        forged = replace(site, statement=replace(statement, **change))
        rounds = (*facts.rounds, *([replace(facts.rounds[0], round=2)] if place == "date" else []))
        assert f"sites.site-1.statement.{place}" in list_problem_places(
            derive_report(replace(facts, rounds=rounds, sites=(forged, other)))
        )
    unsigned = replace(facts, sites=(replace(site, receipt=None), other))
    assert "sites.site-1.statement.verification.site_key" in list_problem_places(derive_report(unsigned))
    # Of a seeded run it is said of the ledger, too.
    first, *runs = statement.lifetime.runs
    for seeded in (False, True):
        life = replace(statement.lifetime, runs=(replace(first, seeded_noise=True), *runs), seeded=seeded)
        forged = replace(site, statement=replace(statement, lifetime=life))
        report = derive_report(replace(facts, sites=(forged, other)))
        assert list_problem_places(report) == (set() if seeded else {"sites.site-1.statement.lifetime.seeded"})
        assert (report.verdict.state == "no_guarantee") == seeded


def change_lifetime(statement: Any, **changes: Any) -> dict[str, Any]:
    return {"lifetime": replace(statement.lifetime, **changes)}


def change_newest_run(statement: Any, **changes: Any) -> dict[str, Any]:
    *earlier, newest_run = statement.lifetime.runs
    return change_lifetime(statement, runs=(*earlier, replace(newest_run, **changes)))


def test_verification_names_figures_taken_from_a_site_report(folder: Path) -> None:
    joined = join_reports(folder, write_signed_report(folder))
    path = folder / "second" / "report.json"

    def find_taken(report: Report) -> Check | None:
        return next((one for one in check_report(path, report, TrustedValues()) if one.name == "taken"), None)

    match = find_taken(joined)
    assert match.state == "skipped"
    assert "site-1" in match.text
    assert "all runs" in match.text
    assert find_taken(from_run.build_run_report(folder / "second")) is None
    # Beside the reports that the sites signed, they are compared.
    (path.parent / "site_reports").mkdir()
    own = path.parent / "site_reports" / "site-1.json"
    own.write_text(signing.report_to_json(write_signed_report(folder)))
    assert find_taken(joined).state == "passed"
    first, *rest = joined.facts.sites
    cheaper = replace(first.statement, approved=replace(first.statement.approved, max_epsilon_per_run=0.1))
    forged = replace(joined.facts, sites=(replace(first, statement=cheaper), *rest))
    assert find_taken(derive_report(forged)).state == "failed"
    own.write_text(signing.report_to_json(signing.sign_report(report_of(folder), load_site_key(folder, "site-2"))))
    assert find_taken(joined).state == "failed"


def test_site_report_above_its_receipts_is_accepted(folder: Path) -> None:
    # As if the site had been asked, and its answer had been lost on the way.
    record, key = from_run.read_run(folder / "second"), load_site_key(folder, "site-1")
    less = replace(record.receipts["site-1"], charged_rounds=0)
    less = replace(less, signature=key.sign(RECEIPT, less.encode_signed_bytes()))
    rounds = [replace(item, sites=("site-2",), failed_sites={"site-1": "no_reply"}) for item in record.state.rounds]
    state = replace(record.state, receipts={**record.state.receipts, "site-1": less}, rounds=rounds)
    Checkpoints(folder / "second" / "checkpoints", record.config_sha256).save(state)
    (folder / "second" / "run.json").unlink()  # which says what the receipts said
    assert from_run.build_run_report(folder / "second").sites[0].spent.rounds == 0, (
        "its receipt says so, and that the run is over"
    )
    report = join_reports(folder, write_signed_report(folder))
    assert report.sites[0].spent.rounds == 1
    assert report.sites[0].spent.epsilon == report.sites[1].spent.epsilon


def test_damaged_site_ledger_voids_the_guarantee_of_the_run(folder: Path) -> None:
    Books(folder / "sites" / "site-1").tamper("UPDATE events SET code = '0.0' WHERE sequence = 4")
    own_report = write_signed_report(folder)
    assert own_report.facts.verification is None
    assert join_reports(folder, own_report).verdict.reasons == ("ledger_not_verified",)


def read_refusal(folder: Path, report: Report) -> str:
    with pytest.raises(ConfigError) as caught:
        join_reports(folder, report)
    assert caught.value.key == "site report"
    return caught.value.bound


def pose_as_site(folder: Path, of: str, **changes: Any) -> Report:
    """A report of the ledger at a site, with changed facts, and signed with the key of the second one."""
    return signing.sign_report(change_facts(report_of(folder, of), **changes), load_site_key(folder, "site-2"))


def test_reports_not_from_the_site_are_refused(folder: Path) -> None:
    own_report = write_signed_report(folder)
    for released, says in (
        (from_run.build_run_report(folder / "first"), "is not a ledger's report"),
        (replace(own_report, signature=None), "is not signed: must be signed by"),
        (replace(own_report, epsilon=0.1), "must be signed by its site"),
        (pose_as_site(folder, "site-1"), "must be signed by its site"),
        # Nor does it help to leave out what names the ledger's key.
        (pose_as_site(folder, "site-1", verification=None), "the key of site-1's receipts"),
        (pose_as_site(folder, "site-2", site="site-1"), "the key of site-1's receipts"),
        (pose_as_site(folder, "site-2", site="west"), "is about west, which is not a site of this run"),
    ):
        assert says in read_refusal(folder, released)


def test_site_ledger_without_this_run_is_refused(folder: Path) -> None:
    facts = report_of(folder).facts
    first, lists = facts.runs[0].run, ("runs", "charges", "releases")
    report = derive_changed(
        folder, **{key: tuple(item for item in getattr(facts, key) if item.run == first) for key in lists}
    )
    assert "is from a ledger without the run second-" in read_refusal(folder, report)
    assert from_run.build_run_report(folder / "first", site_reports=[report]).sites[0].source == "signed_site_report"


@pytest.mark.nightly
def test_site_that_refused_the_run_may_release_its_report(tmp_path: Path) -> None:
    for name in ("first", "second"):
        simulate(f"runtime.sites_dir={tmp_path / 'sites'}", into=tmp_path, name=name)
        Books(tmp_path / "sites" / "site-2").edit(budget={"max_epsilon": 2.0})
    own_report = write_signed_report(tmp_path, "site-1")
    assert [run.run[:5] for run in own_report.sites[0].lifetime.runs] == ["first"]
    report = from_run.build_run_report(tmp_path / "second", site_reports=[own_report])
    site = report.sites[0]
    assert (site.source, site.spent.rounds, site.verdict.state) == ("signed_site_report", 0, "within")
    assert report.facts.sites[0].statement.lifetime.epsilon > site.spent.epsilon == 0


def test_conflicting_reports_of_one_site_are_refused(folder: Path) -> None:
    item = write_signed_report(folder)
    other = derive_changed(folder, provenance=replace(item.facts.provenance, task="regression"))
    with pytest.raises(ConfigError, match="is a second report of site-1"):
        join_reports(folder, item, other)

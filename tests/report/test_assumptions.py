"""What a guarantee rests on: each assumption's status, in the cases that change it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.privacy.release import Reason, Refused
from fedtune.report import from_ledger, from_run
from fedtune.report.derive import rules
from fedtune.report.from_run import RunRecord, read_run
from fedtune.report.model import Assumption, Report, SiteReport
from fedtune.report.page.translations import load_catalog
from fedtune.report.verify_report import derive_report
from fedtune.sites.shared_settings import select_settings_for_sites

from ..books import resign_receipt
from ..conftest import run_proposal
from .shown import find_assumption, read_status

REPOSITORY = Path(__file__).parents[2]


def list_statuses(assumptions: Iterable[Assumption]) -> dict[str, str]:
    return {assumption.code: assumption.status for assumption in assumptions}


def list_assumptions(folder: Path, record: RunRecord, sites: Sequence[SiteReport]) -> tuple[Assumption, ...]:
    return rules.list_assumptions(from_run.collect_run_facts(folder, record, own={}), sites)


def test_assumption_codes_are_unique_and_sorted_and_cite_existing_tests(
    run_report: Report, ledger_report: Report
) -> None:
    for report in (run_report, ledger_report):
        codes = [assumption.code for assumption in report.assumptions]
        assert len(set(codes)) == len(codes)
        order = [rules._WORST_FIRST.index(assumption.status) for assumption in report.assumptions]
        assert order == sorted(order)
        for assumption in report.assumptions:
            for word in assumption.evidence.replace(";", " ").split():
                if word.startswith(("tests/", "docs/")):
                    assert (REPOSITORY / word).exists(), word


def test_assumption_statuses_have_one_meaning_in_both_reports(run_folder: Path) -> None:
    """The same in the lead's report and in the site's own, about the same training."""
    of_lead, own = (
        from_run.build_run_report(run_folder),
        from_ledger.build_ledger_report(run_folder / "sites/site-1/site.toml"),
    )
    by_program = {"clipping_exact", "noise_in_every_step", "poisson_sampling", "unpredictable_randomness"}
    for report in (of_lead, own):
        statuses = list_statuses(report.assumptions)
        assert {code for code, status in statuses.items() if status == "ensured"} == by_program
        for code, status in statuses.items():
            evidence = find_assumption(report, code).evidence
            if status == "ensured":
                assert re.match(rf"fedtune {re.escape(fedtune.__version__)}: tests/\S+\.py", evidence), evidence
            if status == "verified":
                assert "tests/" not in evidence, "a test of the program is no check of this report"


def read_clipping(assumptions: tuple[Assumption, ...]) -> tuple[str, str]:
    """Code and status of what is said about clipping."""
    (item,) = (item for item in assumptions if item.code in ("clipping_exact", "clipping_but_for_rounding"))
    return item.code, item.status


def test_clipping_is_assumed_when_all_sites_accept_inexact_gradients(folder: Path) -> None:
    policies = sorted(folder.glob("sites/*/site.toml"))
    for count, path in enumerate(policies, start=1):
        path.write_text(path.read_text().replace("inexact_gradients = false", "inexact_gradients = true"))
        # One that does not accept them is enough: all train on one machine.
        expected = ("clipping_but_for_rounding", "assumed") if count == len(policies) else ("clipping_exact", "ensured")
        assert read_clipping(from_run.build_run_report(folder).assumptions) == expected
    policies[0].unlink()
    assert read_clipping(from_run.build_run_report(folder).assumptions) == ("clipping_exact", "assumed")


def test_clipping_is_assumed_for_a_ledger_with_inexact_gradients(books: Any) -> None:
    site_books = books(allow={"inexact_gradients": True})
    site_books.charge(run_proposal(), 1)
    assert read_clipping(from_ledger.build_ledger_report(site_books.ledger).assumptions) == (
        "clipping_but_for_rounding",
        "assumed",
    )
    site_books.edit(recorded=True, allow={"inexact_gradients": False})
    assert read_clipping(from_ledger.build_ledger_report(site_books.ledger).assumptions) == (
        "clipping_but_for_rounding",
        "assumed",
    )


def add_receipts(record: RunRecord, *, run: str, **changes: Any) -> RunRecord:
    """The record with its sites' receipts made out, and signed, for a run of another name."""
    receipts = {site: resign_receipt(receipt, run=run, **changes) for site, receipt in record.state.receipts.items()}
    return replace(record, state=replace(record.state, receipts=receipts))


@pytest.mark.parametrize("model_known", [True, False])
def test_receipts_of_a_run_with_a_longer_name_are_ignored(run_folder: Path, model_known: bool) -> None:
    record = read_run(run_folder)
    config = replace(record.config, runtime=replace(record.config.runtime, kind="deployment"))
    if not model_known:
        record = replace(record, environments=())
    deployed = replace(record, config=config)
    weaker = add_receipts(deployed, run=f"{config.name}-weaker-{'a' * 32}")
    assert dict(weaker.receipts) == {}
    sent = select_settings_for_sites(
        replace(config, privacy=replace(config.privacy, noise_multiplier=record.plan.noise_multiplier))
    )
    matching = add_receipts(deployed, run=sent.run_id())
    assert (matching.run, set(matching.receipts)) == (sent.run_id(), {"site-1", "site-2"})
    # Another digest is told from the right one where what the sites were sent is known.
    same_form = add_receipts(deployed, run=f"{config.name}-{'a' * 32}")
    assert set(same_form.receipts) == (set() if model_known else {"site-1", "site-2"})


def test_lead_report_of_real_sites_only_assumes_site_behavior(run_folder: Path) -> None:
    record = read_run(run_folder)
    deployed = replace(
        record,
        config=replace(record.config, runtime=replace(record.config.runtime, kind="deployment")),
        environments=tuple(replace(assumption, sampling=None, randomness=None) for assumption in record.environments),
    )
    deployed = add_receipts(deployed, run=deployed.run)
    statuses = list_statuses(list_assumptions(run_folder, deployed, from_run.build_run_report(run_folder).sites))
    assert statuses["sites_run_their_own_software"] == "assumed"
    assert statuses["unpredictable_randomness"] == "assumed"
    assert statuses["noise_in_every_step"] == "assumed", "what real sites do is not the lead's to verify"
    assert statuses["receipts_signed"] == "verified"
    assert statuses["adapter_signed"] == "violated", "these receipts sign no adapter"
    deployed = add_receipts(deployed, run=deployed.run, reply="ab" * 32)
    sites = from_run.build_run_report(run_folder).sites
    assert list_statuses(list_assumptions(run_folder, deployed, sites))["adapter_signed"] == "verified"
    # The page compares the receipts only with one another; `report verify` compares them with the files.
    for language, shared in (("en", "one and the same"), ("de", "denselben")):
        assert shared in load_catalog(language).texts["assumption"]["adapter_signed"]


def test_unsigned_receipts_large_deltas_and_accountant_mismatches_are_reported(run_folder: Path) -> None:
    record, sites = read_run(run_folder), from_run.build_run_report(run_folder).sites
    forged = {"site-1": replace(record.receipts["site-1"], charged_rounds=1)}
    state = replace(record.state, receipts={**record.receipts, **forged})
    report = derive_report(from_run.collect_run_facts(run_folder, replace(record, state=state), own={}))
    assert (read_status(report, "receipts_signed"), find_assumption(report, "receipts_signed").evidence) == (
        "assumed",
        "site-1",
    )
    facts = from_run.collect_run_facts(run_folder, record, own={})
    large = replace(facts, sites=tuple(replace(site, declared_size=200_000) for site in facts.sites))
    of_delta = {one.code: one for one in rules.list_assumptions(large, sites)}["delta_below_one_over_size"]
    assert (of_delta.status, of_delta.evidence) == ("violated", "delta=1e-05; declared_size=200000")
    wrong = replace(sites[0], spent=replace(sites[0].spent, epsilon_rdp=0.01))
    assert list_statuses(list_assumptions(run_folder, record, [wrong, *sites[1:]]))["accountants_agree"] == "violated"


def test_simulation_ignores_assertions_about_people_at_other_sites(folder: Path) -> None:
    policy = folder / "sites/site-1/site.toml"
    assert "no_person_at_another_site" not in policy.read_text()
    for extra in ("", "\n[asserted]\nno_person_at_another_site = true\n"):  # as earlier versions wrote it
        policy.write_text(policy.read_text() + extra)
        for report in (from_run.build_run_report(folder), from_ledger.build_ledger_report(policy)):
            assert read_status(report, "units_at_one_site_only") == "assumed"
        assert report.facts.asserted == {}, "of the ledger"


def test_site_denying_the_single_site_assumption_violates_it(books: Any) -> None:
    report = from_ledger.build_ledger_report(books(asserted={"no_person_at_another_site": False}).ledger)
    assert read_status(report, "units_at_one_site_only") == "violated"
    assert report.assumptions[0].code == "units_at_one_site_only"


def test_seeded_and_noiseless_runs_violate_their_assumptions(books: Any) -> None:
    site_books = books(
        allow={"seeded_noise": True}, limits={"min_noise_multiplier": 0.0}, budget={"max_epsilon": float("inf")}
    )
    site_books.charge(run_proposal(run="study", seeded_noise=True), 1)
    site_books.charge(run_proposal(run="open", noise_multiplier=0.0), 1)
    report = from_ledger.build_ledger_report(site_books.ledger)
    assert read_status(report, "unpredictable_randomness") == read_status(report, "noise_in_every_step") == "violated"
    assert find_assumption(report, "unpredictable_randomness").evidence == "study"
    assert find_assumption(report, "noise_in_every_step").evidence == "open"


def test_ledger_in_doubt_violates_the_completeness_assumption(books: Any) -> None:
    site_books = books()
    site_books.charge(run_proposal(), 1)
    backup = site_books.copy_ledger("backup.db")
    site_books.charge(run_proposal(), 2)
    receipt = site_books.open().sign_receipt("r")
    backup.replace(site_books.ledger)
    with pytest.raises(Refused) as caught:
        site_books.open().require_receipt(receipt)
    assert caught.value.reason is Reason.LEDGER_BEHIND_RECEIPT
    report = from_ledger.build_ledger_report(site_books.ledger)
    assert (report.verdict.state, report.verdict.reasons) == ("no_guarantee", ("ledger_in_doubt",))
    assert read_status(report, "no_event_missing") == "violated"
    assert report.sites[0].meaning is None

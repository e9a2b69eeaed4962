"""What a renewed run inherits from the last run, and runs that cannot be renewed."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.config import read_saved_config
from fedtune.data.partition import PartitionSpec
from fedtune.privacy.cohorts import Cohorts
from fedtune.runs.renewal import renew_config
from fedtune.sites.virtual_site import VirtualSites
from fedtune.spec import ConfigError

from ..conftest import write_config
from ..sites.conftest import make_letters


@pytest.fixture
def make_last_run(tmp_path: Path) -> Any:
    """Make the folder of one of three runs that share a budget, with these settings."""

    def write_last_run(**groups: Any) -> Path:
        write_config(
            make_letters(**groups | {"privacy": {"planned_runs": 3} | groups.get("privacy", {})}), tmp_path / "last"
        )
        (tmp_path / "last" / "adapter").mkdir(exist_ok=True)
        return tmp_path / "last"

    return write_last_run


def make_cohort_settings(first: str | None, last: str = "2024") -> dict[str, Any]:
    columns = {"text": "a", "label": "b", "user": "c", "arrival": "d"}
    cohorts = Cohorts(period="year", last=last, first=first)
    return {"data": {"columns": columns}, "privacy": {"unit": "user", "cohorts": cohorts}}


def test_renewed_run_keeps_settings_and_starts_from_the_last_adapter(make_last_run: Any) -> None:
    groups = {
        "privacy": {"planned_runs": 3},
        "federation": {"early_stopping_patience": 2},
        "data": {"validation_file": "v.csv"},
        "seed": 7,
    }
    folder = make_last_run(
        **groups, model={"adapter_sha256": "ab" * 32, "adapter": "older"}, public={"train_file": "p.csv"}
    )
    before = make_letters(**groups)
    model = replace(before.model, adapter=str(folder), adapter_sha256=None)
    expected = replace(before, name="next", model=model, federation=replace(before.federation, renewal=1))
    assert renew_config(folder, {"name": "next"}) == expected
    # A simulation's sites keep their ledgers.
    assert renew_config(make_last_run(runtime={"kind": "simulation"}), {}).runtime.sites_dir == str(folder / "sites")
    assert (
        renew_config(make_last_run(runtime={"kind": "simulation", "sites_dir": "kept"}), {}).runtime.sites_dir == "kept"
    )


def test_unchanged_keys_of_nested_groups_are_kept(make_last_run: Any) -> None:
    partition = PartitionSpec(kind="dirichlet", proportions=(3, 1))
    folder = make_last_run(data={"partition": partition}, federation={"num_sites": 2, "site_names": ("a", "b")})
    data = renew_config(folder, {"data.partition": {"alpha": 0.5}, "data.columns.user": "person"}).data
    assert (data.partition.alpha, data.partition.proportions) == (0.5, (3, 1))
    assert data.columns["user"] == "person"


def test_cohort_window_advances_unless_specified(make_last_run: Any) -> None:
    assert str(renew_config(make_last_run(**make_cohort_settings(None)), {}).privacy.cohorts) == "..2025"
    assert str(renew_config(make_last_run(**make_cohort_settings("2023")), {}).privacy.cohorts) == "2024..2025"
    assert (
        str(
            renew_config(
                make_last_run(**make_cohort_settings("2023")), {"privacy.cohorts.last": "2025"}
            ).privacy.cohorts
        )
        == "2023..2025"
    )


@pytest.mark.parametrize(("first", "named"), [(None, ""), ("2025", "privacy.cohorts.first=2026 ")])
def test_future_cohort_at_real_sites_must_be_set_explicitly(
    make_last_run: Any, first: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.privacy.cohorts.datetime", Mock(now=lambda _: datetime(2026, 12, 31, 23, tzinfo=UTC)))
    real = {"runtime": {"kind": "deployment"}}
    assert (
        renew_config(
            make_last_run(**make_cohort_settings(first, "2025" if first else "2024"), **real), {}
        ).privacy.cohorts
        is not None
    )
    folder = make_last_run(**make_cohort_settings(first, "2026"), **real)
    words = f"does not charge this year by default. To charge it now, set the window: {named}privacy.cohorts.last=2027$"
    with pytest.raises(ConfigError, match=words):
        renew_config(folder, {})
    ref = {"privacy.cohorts.last": "2027"} | ({"privacy.cohorts.first": "2026"} if first else {})
    assert str(renew_config(folder, ref).privacy.cohorts) == f"{'2026' if first else ''}..2027"
    simulated = make_last_run(**make_cohort_settings(first, "2026"), runtime={"kind": "simulation"})
    assert renew_config(simulated, {}).privacy.cohorts is not None, "a simulation's people are synthetic"


@pytest.mark.parametrize("groups", [{}, make_cohort_settings(None)], ids=["no window", "window without a start"])
def test_renewal_without_a_window_ends_at_the_planned_runs(make_last_run: Any, groups: dict[str, Any]) -> None:
    assert renew_config(make_last_run(**groups, federation={"renewal": 1}), {}).federation.renewal == 2
    with pytest.raises(ConfigError, match=r"renew = .*was the last of privacy\.planned_runs = 3.*Nothing was charged"):
        renew_config(make_last_run(**groups, federation={"renewal": 2}), {})
    for key, value in {"planned_runs": 4, "epsilon": 7.0, "delta": 1e-6}.items():
        with pytest.raises(ConfigError, match=rf"privacy\.{key} = .*: must be .*, as in the previous runs"):
            renew_config(make_last_run(**groups), {f"privacy.{key}": value})
    # The sites' ledgers track a moving window, and without privacy nothing is spent.
    assert (
        renew_config(
            make_last_run(**make_cohort_settings("2024"), federation={"renewal": 9}), {"privacy.planned_runs": 4}
        ).federation.renewal
        == 10
    )
    assert renew_config(make_last_run(privacy={"mechanism": "none", "planned_runs": 1}), {}).federation.renewal == 1


def test_ledgers_count_runs_across_parallel_renewals(make_last_run: Any) -> None:
    """Regression: only the chain of renewals was counted, so two renewals of the same run counted once."""
    folder = make_last_run(runtime={"kind": "simulation"})
    config = read_saved_config(folder)
    plan = config.plan()
    sites = VirtualSites.create(config, folder, plan)
    ledger, lead = sites.files("north").open_ledger(create=True), sites.lead_key().public
    proposal = config.proposal(lead=lead, plan=plan)
    for runs, name in enumerate(("last", "branch", "another branch"), 1):
        ledger.reserve(replace(proposal, run=name), round=1, request="a request")
        ledger.end_run(name)
        if runs < 3:
            assert renew_config(folder, {}).federation.renewal == runs
    with pytest.raises(ConfigError, match=r"renew = .*was the last of privacy\.planned_runs = 3.*Nothing was charged"):
        renew_config(folder, {})


def test_renewal_of_unfinished_runs_and_changed_groups_is_refused(make_last_run: Any, tmp_path: Path) -> None:
    for invalid in (tmp_path, "x" * 5000):
        with pytest.raises(ConfigError, match=r"must contain a config\.yaml"):
            renew_config(invalid, {})
    folder = make_last_run()
    # A whole group would reset values such as the sites to defaults, and another count would restart the budget.
    words = ("experiment", "privacyy.epsilon", "privacy.epsilonn", "privacy.epsilon.x", "federation.renewal", "runtime")
    for key in words:
        with pytest.raises(ConfigError, match=rf"{key} = 'debug': must be a setting of the renewed run"):
            renew_config(folder, {key: "debug"})
    (folder / "adapter").rmdir()
    with pytest.raises(ConfigError, match="has no finished adapter/; resume the run first"):
        renew_config(folder, {})

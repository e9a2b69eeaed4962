"""Output and exit codes of `fedtune site doctor`; the checks themselves are tested in tests/ops."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import site_actions
from fedtune.ops.doctor.check import (
    REFUSED,
    SERVER,
    DoctorCheck,
    Status,
    build_failed_check,
    build_passed_check,
    build_skipped_check,
    build_warning,
)
from fedtune.spec import FedtuneError

from ..conftest import make_site_policy, parse_command, run_command
from . import snapshots

KEY = "0123456789abcdef" * 4
CHECKS = [
    build_passed_check("policy", "can be read"),
    build_warning("anchor's place", "on the ledger's own disk: " + "both can be rolled back " * 4, fix="Move it."),
    build_failed_check(
        "data discharge_letters", "holds no record", fix=f'Write under [allow]: leads = ["{KEY}", "{KEY}"]'
    ),
    build_skipped_check("clock", "nobody could be asked"),
]

pytestmark = pytest.mark.usefixtures("narrow_terminal")


def test_doctor_lines_fit_a_narrow_terminal_and_json_lists_all_checks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert site_actions.print_checks(iter(CHECKS), as_json=False) == CHECKS
    snapshots.check_text("site-doctor.txt", capsys.readouterr().out)
    site_actions.print_checks(CHECKS, as_json=True)
    snapshots.check_json("site-doctor", capsys.readouterr().out, folder=tmp_path)
    site_actions.print_checks(CHECKS[:2], as_json=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True
    # Text from other parties cannot control the terminal.
    check = build_passed_check("kit", "for \x1b[31mred\x1b[0m [bold]and bold[/bold]\n\rnorth")
    site_actions.print_checks([check], as_json=False)
    assert capsys.readouterr().out.splitlines()[0].endswith("for ?[31mred?[0m [bold]and bold[/bold]??north")


@pytest.mark.parametrize(("codes", "expected"), [((), 0), ((SERVER,), 1), ((SERVER, REFUSED), 3), ((SERVER, 3, 2), 2)])
def test_doctor_exit_code_follows_the_most_important_failure(codes: tuple[int, ...], expected: int) -> None:
    checks = [DoctorCheck(name=f"c{code}", status=Status.FAILED, found="x", fix="y", exit_code=code) for code in codes]
    if not expected:
        site_actions.raise_for_failed_checks(checks)
        return
    with pytest.raises(FedtuneError) as caught:
        site_actions.raise_for_failed_checks(checks)
    assert caught.value.exit_code == expected
    assert all(check.name in str(caught.value) for check in checks)


def test_doctor_in_an_empty_folder_reports_missing_kit_and_policy(tmp_path: Path) -> None:
    outcome = run_command("site", "doctor", "--kit", str(tmp_path), "--site", str(tmp_path / "site.toml"))
    assert outcome.code == 2
    assert "kit, policy" in outcome.message or "policy, kit" in outcome.message
    assert "must be a readable file" in outcome.out
    assert outcome.out.splitlines()[-1].endswith("skipped")


def test_doctor_accepts_overrides_anywhere_and_rejects_unknown_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--kit", str(tmp_path), "--site", "site.toml"]
    parsed = parse_command("site", "doctor", "lora.rank=4", *options, "experiment=debug")
    assert parsed["overrides"] == ("lora.rank=4", "experiment=debug")
    parsed = parse_command("site", "doctor", *options)
    assert (parsed["overrides"], parsed["import_model"]) == ((), None)
    visits: list[Any] = []
    monkeypatch.setattr(site_actions.Examination, "run_checks", lambda visit: visits.append(visit) or [])
    for word in ("lora.rnak=4", "model.dtype=auto", "sites=[north,south]"):
        assert run_command("site", "doctor", word, *options, "experiment=debug").code == 0
    with pytest.raises(FedtuneError, match=r"lora\.rnak"):
        visits[0].run(make_site_policy())
    assert visits[1].run(make_site_policy()).model.dtype == "float32"
    assert visits[2].run(make_site_policy()).federation.site_names == ("north", "south"), (
        "the lead's own way to name sites"
    )

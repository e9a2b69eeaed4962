"""Every fault of the catalog is found by the tests; the quickest by day, the others at night."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from .__main__ import render_table
from .harness import MUTANTS, QUICK, ROOT, Mutant, NoResult, Rotten, Seen, evaluate_mutant, find_killer


@pytest.mark.by_day(*QUICK)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed_by_its_tests(name: str) -> None:
    test, _ = evaluate_mutant(MUTANTS[name])
    assert test is not None, f"{name} survived {', '.join(MUTANTS[name].tests)}: {MUTANTS[name].fault}"


def test_mutants_apply_cleanly_and_are_unique() -> None:
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in {one.file for one in MUTANTS.values()}}
    before = {file: ast.dump(ast.parse(text)) for file, text in texts.items()}
    for name, mutant in MUTANTS.items():
        changed = ast.parse(mutant.mutate_file())
        compile(changed, mutant.file, "exec")
        assert ast.dump(changed) != before[mutant.file], f"{name} changes no more than spelling"
    assert 28 <= len(MUTANTS) <= 240, "a new one takes the place of one whose fault is found by the same test"
    assert len({mutant.fault for mutant in MUTANTS.values()}) == len(MUTANTS)


def test_tests_named_by_mutants_exist() -> None:
    for name, mutant in MUTANTS.items():
        for file, _, test in (one.partition("::") for one in mutant.tests):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not test or f"def {test.partition('[')[0]}(" in text, name


HARMLESS = Mutant(
    name="harmless",
    fault="None.",
    file="fedtune/spec.py",
    old="from __future__ import annotations\n",
    new="from __future__ import annotations\n\nHARMLESS = True\n",
    tests=("tests/test_spec_module.py",),
)


def test_table_has_one_row_for_each_mutant_and_escapes_bars() -> None:
    rows = render_table([*MUTANTS.values(), replace(HARMLESS, fault="a|b")]).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*MUTANTS, "harmless"]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


@pytest.mark.nightly
def test_harmless_change_survives_and_broken_import_is_not_a_kill() -> None:
    assert evaluate_mutant(HARMLESS)[0] is None
    with pytest.raises(NoResult, match=r"^harmless: "):
        evaluate_mutant(replace(HARMLESS, new="from __future__ import annotations\n\nimport no_such_module\n"))


@pytest.mark.parametrize("old", ["no such text", "import "])
def test_mutant_with_missing_or_ambiguous_text_is_rejected(old: str) -> None:
    with pytest.raises(Rotten, match="must occur once"):
        replace(HARMLESS, old=old).mutate_file()


SEEN = Seen(code=1, file="/tree/fedtune/spec.py", passed=3, test="t.py::t", when="call", exception="AssertionError")


def test_only_a_failed_assertion_counts_as_a_kill() -> None:
    for change, test in (({}, "t.py::t"), ({"exception": "Refused"}, "t.py::t"), ({"code": 0, "test": ""}, None)):
        assert find_killer(HARMLESS, replace(SEEN, **change), tree=Path("/tree")) == test  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"code": None},  # out of time
        {"code": 2, "test": ""},  # not collected
        {"code": 5, "test": "", "passed": 0},  # nothing there to run
        {"code": 0, "test": "", "passed": 0},  # all skipped
        {"when": "setup"},
        {"exception": "NameError"},
        {"file": "/installed/fedtune/spec.py"},
        {"file": ""},  # the plugin did not get to the end
    ],
)
def test_inconclusive_test_run_has_no_result(change: dict[str, object]) -> None:
    with pytest.raises(NoResult):
        find_killer(HARMLESS, replace(SEEN, **change), tree=Path("/tree"))  # type: ignore[arg-type]


@pytest.mark.nightly
def test_tests_failing_without_a_fault_kill_no_mutant(tmp_path: Path) -> None:
    broken = tmp_path / "test_red.py"
    broken.write_text("def test_red() -> None:\n    assert False\n")
    with pytest.raises(NoResult, match="must pass without a fault"):
        evaluate_mutant(replace(HARMLESS, tests=(str(broken),)))

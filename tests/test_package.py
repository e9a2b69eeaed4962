"""Package and project files are valid in their formats and agree on the version."""

import re
import tomllib

import pytest
import yaml

from fedtune.version import __version__

from .conftest import REPOSITORY
from .ops.deployment_files import find_tool, run_tool

ISSUES = REPOSITORY / ".github" / "ISSUE_TEMPLATE"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ("citation-file-format", ["CITATION.cff"]),
        ("github-issue-forms", [str(ISSUES / f"{name}.yml") for name in ("bug", "guarantee", "question")]),
        ("github-issue-config", [str(ISSUES / "config.yml")]),
    ],
)
def test_project_files_match_their_schemas(schema: str, names: list[str]) -> None:
    run_tool(
        find_tool("check-jsonschema"), "--builtin-schema", f"vendor.{schema}", *(REPOSITORY / name for name in names)
    )


def test_every_file_has_the_current_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    for path in (REPOSITORY / "deployment").rglob("*.yaml"):
        versions = re.findall(r"(?:newTag|appVersion): (\S+)|fedtune:(\d\S*)\}", path.read_text())
        assert {one or other for one, other in versions} <= {__version__}, path
    pages = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *(REPOSITORY / "docs").glob("*.md")]
    assert [page.name for page in pages if re.search(r"\bunreleased\b", page.read_text())] == []


def test_license_file_covers_the_contents_of_the_wheel() -> None:
    files = {path.relative_to(REPOSITORY) for pattern in PROJECT["license-files"] for path in REPOSITORY.glob(pattern)}
    assert len(files) == 6
    for page in (REPOSITORY / "simulations" / "data").glob("*/README.md"):
        for family, version in re.findall(r"\bCC (BY(?:-SA)?) (\d\.\d)", page.read_text()):
            assert f"CC-{family}-{version}" in PROJECT["license"], page


def test_pre_commit_hooks_match_the_checks_of_make_test() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    rule = (REPOSITORY / "Makefile").read_text().split("\nchecks:\n")[1].split("\n\n")[0]
    checks = [line.strip().replace("$(VENV)", ".venv") for line in rule.splitlines()]
    entries = [hook["entry"].removeprefix("env ") for hook in hooks]
    assert entries[:-1] == checks[:-1]
    assert entries[-1].partition(" -n ")[0] == checks[-1].partition(" $(")[0]

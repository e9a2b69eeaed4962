"""Commands and code on documentation pages run, and the names on them exist."""

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import pytest

from fedtune.cli.main import fedtune
from fedtune.data.formats import iter_raw_rows
from fedtune.data.records import iter_records
from fedtune.lab.studies import in_memory
from fedtune.privacy.accountant import format_factor
from fedtune.spec import KIT_SCHEMA, LEDGER_SCHEMA, REPORT_SCHEMA, RUN_SCHEMA, WIRE_SCHEMA, DataError
from fedtune.version import __version__

from .conftest import run_command
from .pictures import write_pictures, write_vision_folder

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "deployment/*.md", "simulations/**/*.md")
FOUND = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}
PAGES = sorted(path for path in FOUND if path.name != "README.upstream.md")


TABLES = "Tables: numbers and categories"
SMALL = ["training.ignore_weak_signal=true", "runtime.num_threads=1"]
TINY = ["model=random_bert", "lora=all_linear", "federation.num_rounds=1", "training.local_steps=1"]


def read_section(page: str, heading: str) -> str:
    """Read a section of a page in docs/: from a second-level heading to the next."""
    text = (ROOT / "docs" / page).read_text()
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def list_commands(text: str) -> list[list[str]]:
    """List the words of each command in the code blocks of a text, without the leading `fedtune`."""
    blocks = re.findall(r"```\n(fedtune .*?)\n```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition(" #")[0])[1:] for line in lines]


def test_own_data_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teams = ("billing", "technical", "sales")
    rows = [f'"ticket {number} about {teams[number % 3]}",{teams[number % 3]}' for number in range(90)]
    for name in ("tickets.csv", "tickets_test.csv", "more.csv"):
        (tmp_path / name).write_text("\n".join(["body,team", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    # A tiny model replaces MiniLM; everything else follows the page.
    words = next(
        words
        for words in list_commands((ROOT / "docs/own_data.md").read_text())
        if words[:2] == ["simulate", "experiment=own_data"]
    )
    outcome = run_command(*words, *TINY, "data.max_length=16", "runtime.num_threads=1")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "runs/tickets/run.json").is_file()
    assert run_command("evaluate", "runs/tickets", "--data", "more.csv").code == 0


@pytest.mark.nightly
def test_python_page_runs_from_first_to_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    simulate, model = in_memory.simulate, {"model": "random_bert", "data.max_length": 16}
    small = {"federation.num_rounds": 1, "training.local_steps": 1, "runtime.num_threads": 1}
    small |= {"training.ignore_weak_signal": True, "privacy.noise_multiplier": 4.0}

    def simulate_small(recipe: Any = None, settings: Any = None, **others: Any) -> Any:
        overrides = settings or {}
        own = {} if "resume" in overrides else small if "data.features" in overrides else small | model
        return simulate(recipe, {**own, "name": f"run-{len([*tmp_path.glob('runs/*')])}", **overrides}, **others)

    monkeypatch.setattr(in_memory, "simulate", simulate_small)
    for name in ("north", "south"):
        rows = [f"{name} {number} about {('billing', 'sales')[number % 2]},team {number % 2}" for number in range(60)]
        Path(f"{name}.csv").write_text("\n".join(["body,team", *rows]) + "\n")
    blocks = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs" / "python_api.md").read_text(), re.S)
    assert len(blocks[0].splitlines()) <= 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # labels may be missing in so few test records
        exec("\n".join(blocks), {})
    assert ElementTree.parse("scores.svg").getroot().tag.endswith("svg")
    assert Path("tickets-adapter/adapter_config.json").is_file()


@pytest.mark.nightly
def test_entity_tutorial_commands_run_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"drug": ("aspirin", "insulin"), "disease": ("asthma", "gout")}
    rows, small = [], [*TINY, *SMALL, "data.max_length=32"]
    for number in range(100):
        texts = [found["drug"][number % 2], "against", found["disease"][number // 2 % 2], f"for {number} days"]
        text = " ".join(texts)
        spans = [(text.index(texts[2 * n]), texts[2 * n], label) for n, label in enumerate(found)]
        marked = [{"start": at, "end": at + len(word), "label": label} for at, word, label in spans]
        rows.append(json.dumps({"text": text, "spans": marked}))
    (tmp_path / "notes.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    lines = list_commands(read_section("other_tasks.md", "Parts of a text that name something"))
    assert len(lines) == 6
    for words in lines:
        name_options = ["name=again"] if words[1:2] == ["experiment=own_entities"] else []
        model_options = ["--model", "random_bert"] if words[:2] == ["data", "init"] else []
        outcome = run_command(*words, *(small if words[0] == "simulate" else model_options), *name_options)
        assert outcome.code == 0, (words, outcome.err)
    assert (tmp_path / "runs/again/run.json").is_file()
    settings = (tmp_path / "notes.yaml").read_text()
    assert "columns: {text: text, spans: spans}" in settings
    assert "- disease" in settings


@pytest.mark.nightly
def test_table_tutorial_commands_run_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ages = [20 + 31 * number % 70 for number in range(120)]
    rows = [f"{age},{age}.5,{('surgery', 'medicine')[age % 2]},{('sepsis', 'none')[age > 55]}" for age in ages]
    for name, selected in (("labs", rows), ("more", rows[:40]), ("new", [row.rpartition(",")[0] for row in rows[:5]])):
        heads = "age,crp,ward" + ("" if name == "new" else ",diagnosis")
        (tmp_path / f"{name}.csv").write_text("\n".join([heads, *selected]) + "\n")
    monkeypatch.chdir(tmp_path)
    prompts = {"age": "range: [0, 110]", "crp": "range: [0, 400]", "ward": "categories: [surgery, medicine]"}
    for words in list_commands(read_section("other_tasks.md", TABLES)):
        outcome = run_command(*words, *(SMALL if words[0] == "simulate" else []))
        assert outcome.code == 0, (words, outcome.err)
        if words[:2] == ["data", "init"]:
            assert run_command("data", "check", "labs.yaml").code == 2, "placeholders must be filled in first"
            text = Path("labs.yaml").read_text()
            for column, choice in prompts.items():
                text = re.sub(rf'(\["{column}"\]), \w+: "\?\?\?"', rf"\1, {choice}", text)
            Path("labs.yaml").write_text(text)
    assert outcome.out.count("none") + outcome.out.count("sepsis") >= 5, "each new row must have a prediction"


@pytest.mark.nightly
def test_image_tutorial_commands_run_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_vision_folder(tmp_path / "vit")
    for name, count in (("scans", 60), ("more", 20)):
        write_pictures(tmp_path, f"{name}.csv", count, seed=count)
    shutil.copyfile("images/20-0.png", "images/new.png")
    for words in list_commands(read_section("other_tasks.md", "Images")):
        outcome = run_command(*words, *([*SMALL, "federation.num_rounds=1"] if words[0] == "simulate" else []))
        assert outcome.code == 0, (words, outcome.err)
        if words[0] == "generate":
            assert "red 0." in outcome.out
    assert Path("scans-model/model.safetensors").is_file()


def test_documented_code_converts_npy_vectors_to_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = np.array([[0.5, -1.0], [0.25, 1.0]], dtype=np.float32)
    np.save("vectors.npy", vectors)
    Path("labels.csv").write_text("label\na\nb\n")
    (block,) = re.findall(r"```python\n(import numpy.*?)\n```", read_section("other_tasks.md", TABLES), re.S)
    exec(block, {})
    roles = {"label": "label", "feature:states": "states"}
    read = [json.loads(record.fields["feature:states"]) for record in iter_records(Path("slides.parquet"), roles)]
    assert read == vectors.tolist()
    with pytest.raises(DataError, match=r"\.npy.*must be a Parquet file with a column of lists"):
        iter_raw_rows(Path("vectors.npy"))
    Path("labels.csv").write_text("label\na\n")
    with pytest.raises(ValueError, match="length"):
        exec(block, {})


def test_decision_records_are_indexed_and_have_four_sections() -> None:
    folder = ROOT / "docs" / "decisions"
    records = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text())
    assert sorted(linked) == [path.name for path in records]
    for record in folder.glob("0*.md"):
        text = record.read_text()
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Rejected", "Evidence"], (
            record.name
        )
        assert len(text.splitlines()) <= 45, record.name
        evidence = text.partition("## Evidence")[2]
        commands = re.findall(r"```\n(.*?)```", evidence, re.S)
        assert commands, f"{record.name} has no command"
        for name in re.findall(r"(?:tests|simulations|verifier)/[\w/.-]+", commands[0]):
            assert (ROOT / name).exists(), f"{record.name} names {name}, which does not exist"


def test_documentation_links_and_named_files_exist() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                linked = page.parent / target if target else page
                assert linked.exists(), f"{page.name} links to {target}, which does not exist"
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert not anchor or anchor in anchors, f"{page.name} links to {target}#{anchor}, which does not exist"
        for name in re.findall(r"`((?:fedtune|conf|tests|docs|simulations)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"
    test_paths = set(re.findall(r"tests/[\w/]+(?:\.py)?", (ROOT / "docs/threat_model.md").read_text()))
    assert len(test_paths) > 8
    assert [name for name in test_paths if not (ROOT / name).exists()] == []


def test_readme_is_short_and_shows_the_main_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for words in ("fedtune simulate", "fedtune evaluate", "--data", "-m ", "resume=", "make simulate", "make test"):
        assert words in text


_TOO_MUCH = re.compile(
    r"but for a probability|except with a small (probability|chance)|(promise|guarantee)s? (may )?fails?\b"
    r"|Zusage[^.]{0,40} nicht gilt"
)
"""The probability that the loss exceeds epsilon can be many times delta."""


def test_no_text_equates_delta_with_a_failure_probability() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "conf").glob("*.toml")]
    pages += [path for ending in ("py", "toml", "j2") for path in (ROOT / "fedtune").rglob(f"*.{ending}")]
    assert [page.name for page in pages if _TOO_MUCH.search(" ".join(page.read_text().split()))] == []


def test_changelog_and_contributing_are_short_and_list_format_numbers() -> None:
    changelog, contributing = ((ROOT / page).read_text() for page in ("CHANGELOG.md", "CONTRIBUTING.md"))
    assert max(len(text.splitlines()) for text in (changelog, contributing)) <= 80
    formats = re.findall(r"(ledger|report|run folder|kit|wire) (\d+)\b", " ".join(changelog.split()))
    assert [int(number) for _, number in formats] == [LEDGER_SCHEMA, REPORT_SCHEMA, RUN_SCHEMA, KIT_SCHEMA, WIRE_SCHEMA]
    assert f"## {__version__}\n" in changelog


def test_table_of_epsilon_factors_is_correct() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.,]+) \|$", (ROOT / "docs" / "epsilon.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    assert [format_factor(float(epsilon)) for epsilon, _ in rows] == [factor for _, factor in rows]


def test_every_command_is_documented() -> None:
    pages = "\n".join(
        path.read_text() for path in PAGES if "decisions" not in path.parts and path.name != "CHANGELOG.md"
    )
    context, undocumented = click.Context(fedtune), []
    for name in fedtune.list_commands(context):
        command = fedtune.get_command(context, name)
        for inner in command.commands if isinstance(command, click.Group) else [""]:
            # "fedtune site pause | resume" and "`fedtune ledger show` and `spent`" each name two commands.
            if not re.search(rf"fedtune {name}\b[^\n]*\b{inner}\b", pages):
                undocumented.append(f"fedtune {name} {inner}")
    assert undocumented == ["fedtune synthesize generate", "fedtune report build"], (
        "`fedtune synthesize` and `fedtune report` run these by default, so they need no entry"
    )


MAX_FILES = {"An algorithm": 2, "A task": 3, "An input": 3, "A format": 3, "A release": 7, "A section of the report": 5}
"""The most files that each kind of change may touch. These numbers may only fall."""


def test_documented_extension_points_list_few_files() -> None:
    pages = [(ROOT / page).read_text() for page in ("CONTRIBUTING.md", "docs/architecture.md")]
    text = "\n".join(page.split("\n## Corridors\n")[1].partition("\n## ")[0] for page in pages)
    parts = re.split(r"^\*\*(.*?)\*\*.*$", text, flags=re.MULTILINE)[1:]
    named = {
        kind: set(re.findall(r"^- (.*?):", files.replace("\n  ", " "), flags=re.MULTILINE))
        for kind, files in zip(parts[::2], parts[1::2], strict=True)
    }
    found = {kind: [file for files in lines for file in re.findall(r"`(.*?)`", files)] for kind, lines in named.items()}
    assert found.keys() == MAX_FILES.keys()
    for kind, max_files in MAX_FILES.items():
        assert 0 < len(set(found[kind])) <= max_files, kind
        for file in found[kind]:
            assert "<name>" in file or (ROOT / file).is_file(), file


def test_documented_label_shares_match_the_shipped_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["label_shares.py"])
    runpy.run_path(str(ROOT / "simulations/heterogeneity/label_shares.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert table in (ROOT / "simulations/heterogeneity/README.md").read_text()
    recipes = re.findall(r"`experiment=(\w+)` \|", (ROOT / "simulations/heterogeneity/README.md").read_text())
    assert len(recipes) == 4
    assert table.count("| bank-a |") == len(recipes)


def test_figures_beside_published_ones_match_their_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["collect.py", "--check"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "simulations/known_ground/collect.py"), run_name="__main__")
    assert exited.value.code == 0


def test_simulation_scripts_import_existing_names() -> None:
    for script in sorted((ROOT / "simulations").rglob("*.py")):
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtune"):
                exec(compile(ast.Module([node], []), str(script), "exec"), {})

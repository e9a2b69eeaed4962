"""docs/adding_a_site.md, executed literally, and every command in the documentation, parsed."""

import contextlib
import os
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from fedtune.privacy import filter
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.site_files import SiteFiles

from ..conftest import REPOSITORY, parse_command, read_result
from ..flower.loopback import find_free_port
from ..forked import write_forked_commands
from ..processes import Process

pytestmark = pytest.mark.nightly

PAGE = REPOSITORY / "docs" / "adding_a_site.md"
PORT = "9092"
SITES = ("north-hospital", "south-hospital")
MAX_S = 600.0  # takes about a minute on an idle machine
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""Language and content of each fenced block."""


def extract_script(page: str) -> str:
    """Extract the steps of the page in order: files to write and commands to type."""
    lines = ["set -eu", "trap 'echo \"FAILED: $BASH_COMMAND\"' ERR"]
    for language, content in BLOCKS.findall(page):
        if language == "toml":
            name = content.splitlines()[0].removeprefix("# ")
            assert re.fullmatch(r"[\w./-]+\.toml", name), f"a file's first line must be its name: {name}"
            lines.append(f"cat > {name} <<'WHOLE FILE'\n{content}WHOLE FILE")
        elif language == "sh":
            lines.append(content)
        else:
            assert language == "text", f"a block must be a file, a command or output: {content}"
    return "\n".join(lines)


def test_step_summary_names_every_step_of_the_page() -> None:
    text = PAGE.read_text()
    summary = text.partition("\n## The steps of each role\n")[2].partition("\n## ")[0]
    steps = set[int]()
    for numbers in re.findall(r"\((\d[^)]*)\)", summary):
        for first, last in re.findall(r"\b(\d+)(?: to (\d+))?", numbers):
            steps |= set(range(int(first), int(last or first) + 1))
    headings = re.findall(r"^## (\d+)\. (?:Lead|Server|Site): ", text, re.MULTILINE)
    results = {12, 13}  # the last two steps show the results of the run
    assert steps == {*map(int, headings)} - results


@pytest.fixture(scope="module")
def pasted_page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The output of pasting the page into a shell."""
    folder, outside = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("beside")
    bash = ["bash", "-c", extract_script(PAGE.read_text()).replace(PORT, str(find_free_port()))]
    with write_forked_commands(outside) as commands:
        path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PATH": path}
        # In its own process group, so that everything it started can be killed.
        shell = Process("shell", bash, log=outside / "output.txt", cwd=folder, env=environment)
        try:
            code = shell.end(seconds=MAX_S)
            logs = "".join(f"\n{log}:\n{log.read_text()}" for log in sorted(folder.rglob("*.log")))
            assert code == 0, shell.text + logs
            with pytest.raises(ProcessLookupError):  # the page itself stops what it started
                os.killpg(shell.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    return SimpleNamespace(folder=folder, printed=shell.text)


def test_every_site_takes_part_in_every_round_within_its_budget(pasted_page: Any) -> None:
    result = read_result(pasted_page.folder / "runs" / "first")
    assert [entry["round"] for entry in result["rounds"]] == [1, 2]
    for entry in result["rounds"]:
        assert (sorted(entry["sites"]), entry["failed_sites"]) == (list(SITES), {})
    privacy = result["privacy"]
    assert privacy["seeded_noise"] is False
    assert sorted(privacy["sites"]) == list(SITES)
    for site, spent in privacy["sites"].items():
        files = SiteFiles.from_site_toml(pasted_page.folder / site / "site.toml")
        history = verify(files.ledger, anchor=Head.read(files.anchor)).history
        assert sum(history.count_total_charges().values()) == spent["steps"] == 10
        cap = files.policy.budget.max_epsilon_per_run
        assert 0.9 * cap < spent["epsilon"] <= cap
        charged = filter.epsilon_filter(history.count_total_charges(), order=history.order, delta=history.delta)
        assert 0 < charged <= files.policy.budget.max_epsilon


def test_tutorial_output_matches_the_actual_output(pasted_page: Any) -> None:
    def mask_varying(text: str) -> str:
        """Mask what varies between runs: words with digits, and line breaks in the text.

        A fingerprint consists of groups of four hexadecimal digits, and one group in fifty has only letters.
        """
        return " ".join("#" if re.search(r"\d|^[a-f]{4}$", word) else word for word in text.split())

    printed = mask_varying(pasted_page.printed)
    for language, content in BLOCKS.findall(PAGE.read_text()):
        for line in content.splitlines() if language == "text" else ():
            # The remaining time is printed only while there is some.
            line = re.sub(r" \| about .* left$", "", line)
            assert mask_varying(line) in printed, line


def test_policy_differs_from_the_template_only_in_documented_lines(pasted_page: Any) -> None:
    tables = {"population", "dataset", "budget", "limits", "allow", "releases", "machine", "trust", "asserted"}

    def flatten_table(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            value = value[0] if key == "dataset" else value
            if isinstance(value, dict) and f"{prefix}{key}" in tables:
                yield from flatten_table(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    policy, template = (
        dict(flatten_table(tomllib.loads((pasted_page.folder / name).read_text())))
        for name in ("south-hospital/site.toml", "template.toml")
    )
    added = {"asserted.no_person_at_another_site"}  # the template does not answer it
    omitted = {"about", "population.arrivals", "socket", "key_command"}  # omitted, as the page says
    assert policy.keys() == template.keys() - omitted | added
    cells = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.MULTILINE)
    documented = {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}
    assert documented == {key for key in policy if policy[key] != template.get(key)}


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def list_typed_commands(text: str) -> Iterator[str]:
    """List the fedtune commands in a page's code blocks, without comments, pipes and redirections."""
    for _, content in BLOCKS.findall(text):
        joined = re.sub(r"\\\n\s*", "", content)
        for command in re.findall(r"^(?:\S*\w=\$\()?(?:\S*/)?(fedtune \S.*)$", joined, re.MULTILINE):
            words = re.split(r"   +|\s+#|\s+[12]?>|\s+[&|;)]", command)[0]
            # `show|spent PATH` means two commands.
            choice = re.search(r"\w+(\|\w+)+", words)
            yield from [words.replace(choice[0], word) for word in choice[0].split("|")] if choice else [words]


def list_named_commands(text: str) -> Iterator[str]:
    """List the commands in a page's running text, mostly without arguments."""
    yield from re.findall(r"`(fedtune [^`]*)`", BLOCKS.sub("", text).replace("\n", " "))


def find_mistake(command: str) -> str:
    """Return the command line's error for a command; empty if it is valid."""
    try:
        parse_command(*shlex.split(command)[1:])
    except click.UsageError as error:
        return error.format_message()
    except click.exceptions.Exit:  # raised by --help
        pass
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_can_be_parsed(page: Path) -> None:
    text = page.read_text()
    for command in list_typed_commands(text):
        assert not find_mistake(command), command
    for command in list_named_commands(text):
        mistake = find_mistake(command)
        assert not mistake or mistake.startswith("Missing "), f"{command}: {mistake}"


def test_command_search_finds_commands_and_detects_mistakes() -> None:
    assert len(list(list_typed_commands(PAGE.read_text()))) > 25
    assert len(list(list_named_commands(PAGE.read_text()))) > 5
    for command in ("fedtune site begin", "fedtune site doctor --kits x", "fedtune ledger show --json"):
        assert find_mistake(command)

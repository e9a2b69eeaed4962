"""The documentation site: its navigation lists every page, old addresses redirect, and it stays short."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import fedtune

from .conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
MAX_WORDS = 60_000
"""For all user pages together, including tables and code, without generated pages."""


def list_toctrees(page: Path) -> list[list[str]]:
    """List the pages of each toctree of a page, without options and titles."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S)
    lists = [[line for line in block.splitlines() if line and not line.startswith(":")] for block in blocks]
    return [[re.sub(r".*<(.+)>", r"\1", entry) for entry in entries] for entries in lists]


def list_anchors(page: Path) -> list[str]:
    """List the anchors of a page's headings, as GitHub and MyST generate them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def list_user_pages() -> list[Path]:
    return [DOCS / "index.md", *(DOCS / f"{name}.md" for tree in list_toctrees(DOCS / "index.md") for name in tree)]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_redirects() -> dict[str, str]:
    for node in ast.parse((DOCS / "conf.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REDIRECTS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("docs/conf.py has no REDIRECTS")


def test_navigation_lists_every_page_once_in_four_sections() -> None:
    text = (DOCS / "index.md").read_text()
    assert re.findall(r"^:caption: (.+)$", text, re.M) == ["Learn", "Sites", "Trust", "Reference", "See it"]
    pages = list_user_pages()
    (inner,) = list_toctrees(DOCS / "contributing.md")
    maintainers = [path for entry in inner for path in DOCS.glob(f"{entry}.md")]
    listed = [*pages, *maintainers]
    (notebooks,) = list_toctrees(DOCS / "notebooks.md")
    assert sorted(notebooks) == sorted(f"notebooks/{path.stem}" for path in DOCS.glob("notebooks/*.ipynb"))
    assert sorted(listed) == sorted(DOCS.glob("**/*.md")), "a page is missing from the toctrees or listed twice"
    assert len(pages) <= 33


def test_user_pages_have_at_most_sixty_thousand_words() -> None:
    words = [word for page in list_user_pages() for word in page.read_text().split() if re.search(r"\w", word)]
    assert len(words) <= MAX_WORDS


def test_redirects_from_merged_pages_reach_existing_anchors() -> None:
    redirects = read_redirects()
    assert len(redirects) >= 16
    for old, new in redirects.items():
        name, _, anchor = new.partition("#")
        assert not (DOCS / f"{old}.md").exists()
        assert (DOCS / f"{name}.md").is_file()
        assert not anchor or anchor in list_anchors(DOCS / f"{name}.md"), new


def test_heading_anchors_are_unique_per_page() -> None:
    for page in DOCS.glob("*.md"):
        anchors = list_anchors(page)
        assert sorted(set(anchors)) == sorted(anchors), page.name


def test_every_linked_page_exists() -> None:
    folders = ("conf", "deployment", "docs", "fedtune", "simulations", "tests", "tools", ".github")
    endings = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".j2", ".ipynb", ".conf", ".service", ".sbatch"}
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in endings]
    missing = {
        (str(path.relative_to(REPOSITORY)), name)
        for path in files
        for name in re.findall(r"\bdocs/(\w+\.(?:md|py|svg))\b", path.read_text(encoding="utf-8"))
        if not (DOCS / name).exists()
    }
    assert missing == set()


def test_code_blocks_parse_and_use_only_public_names() -> None:
    parsers = {"python": ast.parse, "yaml": yaml.safe_load, "toml": tomllib.loads}
    count = 0
    for page in DOCS.glob("*.md"):
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.S | re.M):
            if kind == "json":
                [json.loads(line) for line in block.splitlines()]
            elif kind in parsers:
                parsers[kind](block)
                count += 1
            if kind == "python":
                names = set(re.findall(r"\bfedtune\.(\w+)", block))  # also of imports
                assert names <= {*fedtune.__all__, "tasks"}, (page.name, names)
    assert count > 25


def test_api_page_documents_exactly_the_public_names() -> None:
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(documented) == sorted(fedtune.__all__)


def test_readme_starts_with_summary_commands_image_and_four_links() -> None:
    first = (REPOSITORY / "README.md").read_text().partition("\n## ")[0]
    assert len(first.split()) <= 200
    commands = [line for line in first.splitlines() if line.startswith("$ ")]
    assert commands == ["$ fedtune data init tickets.csv", "$ fedtune simulate tickets.yaml"]
    assert "\n".join(commands) in "\n".join(
        line for line in (DOCS / "index.md").read_text().splitlines() if line[:2] == "$ "
    )
    assert first.count("<img ") == 1
    doors = ["I have a file", "I run a site", "I must sign", "I doubt it"]
    assert re.findall(r"\[(I [\w ]+)\]\(docs/\w+\.md\)", first) == doors


NOT_FOUND = "\N{EN DASH}"


def test_comparison_cells_of_other_projects_have_sources() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    table = readme.partition("## Beside Flower, NVFlare, opake and FL4Health\n")[2]
    table = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("|")]
    sources = (DOCS / "internal" / "comparison_sources.md").read_text()
    projects = re.findall(r"\[(\w+)\]\(", table[0])
    assert projects == ["Flower", "NVFlare", "opake", "FL4Health"]
    for line in table[2:]:
        point, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for project, cell in zip(projects, cells, strict=True):
            if cell != NOT_FOUND:
                source = re.search(rf"^\| {re.escape(point)} \| {project} \| .*(?:http|the same)", sources, re.M)
                assert source, (point, cell)


CONTRAST = 4.5
"""The minimum contrast of WCAG 2.2 for text of any size."""


def compute_contrast(one: str, other: str) -> float:
    """Compute the contrast ratio of two colors, each written as #rrggbb."""

    def compute_luminance(color: str) -> float:
        parts = [int(color[offset : offset + 2], 16) / 255 for offset in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((compute_luminance(one), compute_luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_charts_have_a_background_and_readable_colors_in_both_themes() -> None:
    charts = load_tool("draw_charts")
    for theme in (charts.LIGHT, charts.DARK):
        for name in ("ink", "soft", "blue", "orange"):
            assert compute_contrast(theme[name], theme["ground"]) >= CONTRAST, name
    for name, text in charts.draw_pictures():
        width = charts.PHONE_WIDTH if name.endswith("-phone") else charts.WIDTH
        assert 'class="ground"' in text
        assert "prefers-color-scheme:dark" in text
        assert f'width="{width}"' in text, name


def test_page_images_exist_and_are_small() -> None:
    for page in [REPOSITORY / "README.md", *DOCS.glob("*.md")]:
        for name in re.findall(r"(?:\]\(|src=\")([\w/.]+\.(?:svg|png))\b", page.read_text()):
            path = page.parent / name
            assert path.is_file(), f"{page.name} shows {name}, which does not exist"
            assert path.stat().st_size < 300_000, name


@pytest.mark.nightly
def test_site_builds_without_a_warning_and_redirects(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the extra `docs` has it")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "cache")]
    process = subprocess.run([*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    api = (tmp_path / "html" / "api.html").read_text()
    assert all(f'id="fedtune.{name}"' in api for name in fedtune.__all__)
    assert "fedtune simulate" in (tmp_path / "html" / "commands.html").read_text()
    assert '<img alt="Chart: ' in (tmp_path / "html" / "notebooks" / "first_run.html").read_text()
    assert (tmp_path / "html" / "searchindex.js").stat().st_size > 10_000
    for old, new in read_redirects().items():
        assert new.partition("#")[0] in (tmp_path / "html" / f"{old}.html").read_text()

"""How Sphinx builds the documentation site: `make docs` writes it to build/docs/html, without a network.

A page outside the navigation, a dead link or anchor and an unknown reference are warnings, and `make docs` makes every
warning an error.
"""

import base64
import json
import os
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx

import fedtune as package
from fedtune.cli.main import fedtune
from fedtune.federation.planner import PlanCost
from fedtune.version import __version__

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("FEDTUNE_REPOSITORY", "").rstrip("/")
"""Address of the source tree, as in https://host/owner/fedtune/blob/main; empty: the site carries copies of files."""

project, author, copyright = "fedtune", "the authors of fedtune", "the authors of fedtune, Apache-2.0"
version, release = __version__.rpartition(".")[0], __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}  # `prepare_source` converts a notebook
highlight_language = "sh"
suppress_warnings = ["misc.highlighting_failure"]

myst_enable_extensions = ["colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 5

# Docstrings use single backticks for code, as Markdown does.
default_role = "literal"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!fedtune\.\w+$).*")
]  # types of other packages, whose inventories would need a network
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False

LINKED = {name: f"~fedtune.{name}" for name in ("Ledger", "Run")} | {"PlanCost": "~fedtune.federation.planner.PlanCost"}
"""Targets of the types that functions return."""

html_theme = "furo"
html_title = f"fedtune {version}"
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

REDIRECTS = {
    "README": "index",
    "algorithms": "adapters#federated-algorithms",
    "air_gapped": "adding_a_site_it#machines-without-the-internet",
    "any_release": "site_policy#charge-any-release",
    "attacks": "audit#attack-a-finished-run-fedtune-attack",
    "checking_data": "own_data#checking-your-data",
    "cohorts": "user_level#people-who-arrive-over-time",
    "comparing": "planning#compare",
    "entities": "other_tasks#parts-of-a-text-that-name-something",
    "features": "other_tasks#tables-numbers-and-categories",
    "images": "other_tasks#images",
    "output_checkers": "report#for-output-checkers-may-this-model-leave",
    "own_adapter": "adapters#a-sites-own-adapter",
    "platforms": "adding_a_site_it#linux-macos-and-windows",
    "ray_cluster": "operations#a-simulation-on-several-machines",
    "synthetic_texts": "using_the_result#synthetic-texts",
    "warm_start": "adapters#a-warm-start-start-from-a-tuned-adapter",
}
"""Pages that were merged into others, and their new places. `search.html` is Sphinx's own page of that name."""

_MOVED = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>This page has moved</title>
<meta http-equiv="refresh" content="0; url={to}"><link rel="canonical" href="{to}"></head>
<body><p>This page has moved to <a href="{to}">{to}</a>.</p></body></html>
"""


def write_commands() -> str:
    """Return the help of every command as Markdown, one section for each."""
    parts = []

    def add(command: click.Command, parent: click.Context | None, name: str) -> None:
        context = click.Context(command, parent=parent, info_name=name, terminal_width=100, max_content_width=100)
        parts.append(f"\n## {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```\n")
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                if found is not None and not found.hidden:
                    add(found, context, inner)

    add(fedtune, None, "fedtune")
    return "".join(parts)


def write_overview(text: str) -> str:
    """Return tables of the names that the Python reference documents, with the first sentence of each docstring."""
    rows: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for kind, name in re.findall(r"^\.\. auto(\w+):: (\w+)$", text, re.M):
        lines = (getattr(package, name).__doc__ or "").strip().partition("\n\n")[0]
        sentence = re.split(r"(?<=\.)\s", " ".join(lines.split()))[0]
        group = {"function": "Functions", "exception": "Errors"}.get(kind, "Classes")
        rows[group].append(f"| {{py:obj}}`{name} <fedtune.{name}>` | {sentence} |")
    return "\n".join("\n".join([f"| {group} | |", "| --- | --- |", *lines, ""]) for group, lines in rows.items())


def show_charts_on_phones(text: str, folder: Path) -> str:
    """Add to each picture its form for phones, if there is one; site.css shows one of them."""

    def add(found: re.Match[str]) -> str:
        picture = f"![{found[1]}]({found[2]}.{found[3]}){{.{found[4] or 'wide'}}}"
        phone = folder / f"{found[2]}-phone.{found[3]}"
        return picture + (f"![{found[1]}]({found[2]}-phone.{found[3]}){{.narrow}}" if phone.is_file() else "")

    return re.sub(r"!\[([^]]*)\]\((pictures/\w+)\.(svg|png)\)(?:\{\.(page)\})?", add, text)


def convert_notebook(name: str, text: str) -> str:
    """Convert a notebook with its stored outputs to Markdown; pictures are part of the page."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fence(source, "sh" if source.startswith("!") else "python"))
        parts += [_convert_output(output, cell["metadata"].get("alt", "")) for output in cell["outputs"]]
    parts.append(f"---\n\nThis page is a notebook: {{download}}`{name}.ipynb <{name}.ipynb>`.")
    return "\n\n".join(parts) + "\n"


def _fence(text: str, language: str) -> str:
    return f"````{language}\n{text.strip()}\n````"


def _convert_output(output: dict[str, Any], alt: str) -> str:
    """Convert one output; `alt` describes a picture to readers who do not see it."""
    if output["output_type"] == "stream":
        return _fence("".join(output["text"]), "text")
    kind, data = next((kind, "".join(data)) for kind, data in output["data"].items())
    if kind == "text/html":
        return re.sub(r"\n\s*", "", data)  # a blank line would end the HTML
    if kind == "text/plain":
        return _fence(data, "text")
    encoded = data.strip() if kind == "image/png" else base64.b64encode(data.encode()).decode()
    return f'<img alt="{escape(alt)}" src="data:{kind};base64,{encoded}">'


def prepare_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Convert notebooks, add the help to the page of commands, and resolve links to files outside docs/."""
    if page == "commands":
        source[0] += write_commands()
    if page.startswith("notebooks/"):
        source[0] = convert_notebook(page.rpartition("/")[2], source[0])
    if page == "api":
        source[0] = source[0].replace("## Run\n", write_overview(source[0]) + "\n## Run\n", 1)
    folder, navigation = (HERE / f"{page}.md").parent, (HERE / "index.md").read_text(encoding="utf-8")
    source[0] = show_charts_on_phones(source[0], folder)

    def link(found: re.Match[str]) -> str:
        text, target, place = found[1], (folder / found[2]).resolve(), found[3] or ""
        if target.is_relative_to(HERE) and ("notebooks" not in target.parts or target.suffix == ".ipynb"):
            return found[0]
        if not target.exists():
            return found[0]  # MyST reports the dead link
        if REPOSITORY:
            return f"[{text}]({REPOSITORY}/{target.relative_to(HERE.parent)}{place})"
        if target.is_dir():
            target = target / "README.md"
        return f"[{text}](path:{os.path.relpath(target, folder)})" if target.is_file() else text

    def name(found: re.Match[str]) -> str:
        """Show a page's title in the navigation, or its own, where a link shows the name of its file."""
        target = folder / f"{found[1]}.md"
        title = re.search(rf"^(.+) <{found[1]}>$", navigation, re.M)
        if title is None and target.is_file():
            title = re.search(r"^# (.+)$", target.read_text(encoding="utf-8"), re.M)
        return f"[{title[1].replace('`', '')}](" if title else found[0]

    source[0] = re.sub(r"\[(\w+)\.md\]\(", name, source[0])
    source[0] = re.sub(r"(?<!!)\[((?:[^][]|\[[^]]*\])*)\]\(((?:\.\./|notebooks)[^)#]*)(#[^)]*)?\)", link, source[0])


def mend_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let a link to a picture open it, which Sphinx makes the browser store, and mark scores in a terminal's output."""
    if "body" in context:
        body = re.sub(r' download=""(?= href="[^"]+\.(?:svg|png)")', "", context["body"])
        context["body"] = re.sub(r'<span class="g[op][^"]*">(?=test: |\(before: )', '<span class="go score">', body)


def show_returned_type(
    app: Sphinx, what: str, name: str, documented: Any, options: object, signature: str, returned: str | None
) -> tuple[str, str | None] | None:
    """Show in a signature what a function returns; types of parameters stay in their descriptions."""
    if documented is PlanCost:
        return "", None
    if what not in ("function", "method"):
        return None
    hint = str(getattr(documented, "__annotations__", {}).get("return", ""))
    return signature, re.sub(r"\b\w+\b", lambda found: LINKED.get(found[0], found[0]), hint) or None


def join_returned_type(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Remove the field with the type of the returned object, which the signature shows."""
    for field in [*content.findall(nodes.field)]:
        if field[0].astext() == "rtype":
            field.parent.remove(field)


def write_redirects(app: Sphinx, error: Exception | None) -> None:
    """Write a small page at each old address, which leads to the new one."""
    if error is None and app.builder.format == "html":
        for old, new in REDIRECTS.items():
            page, _, place = new.partition("#")
            to = f"{page}.html" + (f"#{place}" if place else "")
            path = Path(app.outdir) / f"{old}.html"
            path.write_text(_MOVED.format(to=to), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register what this site adds to Sphinx."""
    app.connect("source-read", prepare_source)
    app.connect("html-page-context", mend_page)
    app.connect("autodoc-process-signature", show_returned_type)
    app.connect("object-description-transform", join_returned_type, priority=600)  # after autodoc has added the field
    app.connect("build-finished", write_redirects)


sys.dont_write_bytecode = True

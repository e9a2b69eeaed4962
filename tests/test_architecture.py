"""House rules that a program can check; `lint-imports`, run by `make test`, checks the layers."""

import ast
import graphlib
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import grimp
import pytest
from vulture import Vulture

from tests.allowed_unused import ALLOWED_UNUSED
from tests.conftest import run_python
from tests.weights import compute_weights, count_code_lines

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "fedtune"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_CODE_LINES_OF_A_FILE = 400
LONG_FILES = {"lab/preparation/detect.py": 411}
"""Files that still exceed the limit; the list and its files must not grow."""
OWN_READERS = {
    "codec.py",
    *("extras.py", "version.py"),  # installed source code
    *("ops/doctor/machine_checks.py", "training/machine.py"),  # /proc and /sys
    *("model/base_model.py", "model/manifest.py", "tasks/saved.py", "lab/studies/in_memory.py"),  # this process's files
    "flower/internals.py",  # a kit's certificates, which `KitCertificate` has already checked
    "report/checks.py",  # pages beside a report, of which a large one differs from every page that fedtune renders
    *("report/page/render.py", "report/requirements.py"),  # fonts and maps, which are part of the installation
}
OWN_WRITERS = {  # into folders that this process has just created
    *("model/manifest.py", "tasks/saved.py", "export/export_formats.py", "lab/personalization.py"),
    *("lab/studies/in_memory.py", "flower/local_engine.py", "flower/bundle.py"),
}
INSTALLED = ("__file__", "_TEMPLATES", "find_config_folder()", "find_shipped_folders()")
"""Expressions for installed files."""


def get_relative_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_package_belongs_to_a_layer() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract.get("containers") == ["fedtune"])
    listed = {layer.strip() for line in layers for layer in line.split("|")}
    present = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    present |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert present == listed


def test_no_module_has_a_meaningless_name() -> None:
    meaningless = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert meaningless & {path.stem for path in MODULES} == set()


@cache
def list_imports() -> dict[str, set[str]]:
    """List each module's imports from this package: at import time, within functions, and for types only."""
    graph = grimp.build_graph("fedtune", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_modules_have_no_circular_imports() -> None:
    try:
        graphlib.TopologicalSorter(list_imports()).prepare()
    except graphlib.CycleError as problem:
        pytest.fail(" -> ".join(problem.args[1]))


def test_short_modules_with_one_user_are_merged() -> None:
    """A short module that only one neighbor imports belongs in that neighbor, except tasks and algorithms."""
    registries = {"fedtune.tasks.registry", "fedtune.training.algorithms.algorithm_registry"}
    shreds = []
    for path in MODULES:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        room = module.rpartition(".")[0]
        users = [other for other, imported in list_imports().items() if module in imported]
        alone = [user.rpartition(".")[0] for user in users] == [room] and not registries & {*users}
        if alone and len(path.read_text().splitlines()) < 200:
            shreds.append(f"{module} <- {users[0]}")
    assert not shreds


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in MODULES)
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py", "spec.py"}


def test_no_package_exceeds_its_line_budget() -> None:
    assert [row for row in compute_weights() if row.lines > row.most] == []


def test_package_contains_no_unused_code() -> None:
    tool = Vulture()
    tool.scavenge([str(PACKAGE)])
    unused = {item.name for item in tool.get_unused_code()}
    allowed = {name for names in ALLOWED_UNUSED.values() for name in names}
    assert unused - allowed == set(), "unused in fedtune/: delete these, or name their users in allowed_unused.py"
    assert allowed - unused == set(), "these no longer exist or are now used: remove them from allowed_unused.py"


def test_files_stay_below_the_line_limit() -> None:
    lines = {get_relative_name(path): count_code_lines(path) for path in MODULES}  # docstrings and comments are free
    assert {name for name, most in lines.items() if most > LONG_FILES.get(name, MAX_CODE_LINES_OF_A_FILE)} == set()


def test_spec_modules_contain_no_assert_statements() -> None:
    # `python -O` removes assert statements; invalid settings must still be refused.
    for path in PACKAGE.rglob("spec.py"):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path


def find_users_of(*methods: str) -> set[str]:
    """Modules that use a method, except on a file of the installation."""
    return {
        get_relative_name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in methods
        if not any(one in ast.unparse(node) for one in INSTALLED)
    }


def test_files_from_outside_are_read_as_regular_files() -> None:
    """A pipe in a run folder, a kit or a site's state would block its reader forever; a device has no end."""
    found = find_users_of("read_bytes", "read_text")
    assert found - OWN_READERS == set(), "read with codec.read_bounded_file or codec.read_regular_file"
    assert OWN_READERS - found == set(), "remove these from OWN_READERS"


def test_files_in_existing_folders_are_written_durably() -> None:
    """A planted link would otherwise be followed, and a killed process would leave half a file."""
    found = find_users_of("write_bytes", "write_text")
    assert found - OWN_WRITERS == set(), "write with privacy.durable.write_durably"
    assert OWN_WRITERS - found == set(), "remove these from OWN_WRITERS"


def test_commands_do_not_use_argparse() -> None:
    # Namespace attributes have type Any, so mypy could not find a misspelled option.
    assert [get_relative_name(path) for path in MODULES if "argparse" in path.read_text()] == []


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        ("privacy.ledger.site_ledger privacy.mechanism privacy.run_plan", "torch transformers flwr hydra pydantic"),
        ("tasks.registry", "torch transformers"),
        (
            "report.from_ledger report.page.render report.model_card cli.report cli.ledger cli.outlook",
            "torch transformers flwr scipy.stats scipy.signal scipy.optimize",
        ),
        # Their --help must be fast.
        ("cli.simulate cli.plan cli.run cli.audit", "torch hydra omegaconf pydantic numpy rich"),
        # A container's health probe runs every few seconds.
        ("ops.health", "torch flwr cryptography pydantic numpy"),
        # Training code is loaded with the first message, so that a site starts fast and waits in a third of the memory.
        ("ops.services.site_service ops.metrics cli.site", "torch transformers peft opacus"),
    ],
    ids=["the privacy core", "tasks", "a ledger's report", "help", "health probe", "waiting site"],
)
def test_modules_import_without_heavy_frameworks(modules: str, libraries: str) -> None:
    imported = ", ".join(f"fedtune.{module}" for module in modules.split())
    code = f"import sys, {imported}; print([name for name in {libraries.split()} if name in sys.modules])"
    assert run_python("-c", code, cwd=REPOSITORY) == "[]\n"


def test_folders_mirror_the_package() -> None:
    layers = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert layers <= {path.name for path in (REPOSITORY / "tests").iterdir() if path.is_dir()}

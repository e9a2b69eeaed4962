"""The bundle for `flwr run` and its ServerApp, which use only public names of Flower."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedtune.flower.asking_grid import FlowerGrid
from fedtune.flower.bundle import make_server_app, read_run_file, write_bundle
from fedtune.spec import ConfigError

from ..processes import REPOSITORY, make_environment
from .test_asking_grid import KEYS, FakeGrid


def build_bundle(app: Path, home: Path) -> subprocess.CompletedProcess[str]:
    env = make_environment(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", FLWR_HOME=str(home))
    words = [str(Path(sys.executable).parent / "flwr"), "build", "--app", str(app)]
    return subprocess.run(words, cwd=app.parent, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_flower_builds_the_bundle_without_any_code(tmp_path: Path) -> None:
    file = write_bundle(tmp_path / "app")
    result = build_bundle(file.parent, tmp_path / "home")
    assert result.returncode == 0, result.stdout + result.stderr
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        assert {name for name in archive.namelist() if not name.startswith(".info")} == {"pyproject.toml"}
    bundle.unlink()
    file.write_text(file.read_text().replace("site_app:app", "site_apps:app"))
    assert build_bundle(file.parent, tmp_path / "home").returncode != 0, "the build must resolve the named app"
    assert list(tmp_path.glob("*.fab")) == []


def test_bundle_is_written_only_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    write_bundle(tmp_path / "app")
    for place in (tmp_path / "app", tmp_path / "app" / "pyproject.toml"):
        with pytest.raises(ConfigError, match="must be a new or empty folder"):
            write_bundle(place)


GOOD = 'kit = "banks/lead"\nsettings = ["name=spring", "experiment=debug"]\n'


def ask_app(file: str, grid: Any) -> list[Any]:
    received: list[Any] = []

    def run_lead(kit: Path, settings: Any, over: Any) -> None:
        with over(KEYS, hear=None, closing=None) as made:
            assert isinstance(made, FlowerGrid)
            received.append((made.list_online_nodes(), kit, settings))

    make_server_app(run_lead)(grid, Context(7, 1, {}, state=RecordDict(), run_config={"run": file}))
    return received


def test_server_app_passes_kit_settings_and_grid_to_the_lead(tmp_path: Path) -> None:
    (tmp_path / "spring.toml").write_text(GOOD)
    ((online, kit, settings),) = ask_app(str(tmp_path / "spring.toml"), FakeGrid(lambda *_: None))
    assert online == [1, 2]
    assert (kit, settings) == (tmp_path / "banks/lead", ("name=spring", "experiment=debug"))
    with pytest.raises(ConfigError, match=r"run.*is required: --run-config"):
        ask_app("", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kit: is required"),
        ('kit = "x"', "settings: is required"),
        (GOOD + "name = 3", "name: is not a known key"),
        (GOOD.replace('"banks/lead"', "3"), "kit = 3: must be a text"),
        ('kit = "x"\nsettings = "name=x"', "settings = 'name=x': must be a list"),
        ("kit = ", "must be TOML"),
    ],
)
def test_invalid_run_file_is_reported_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spring.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_run_file(tmp_path / "spring.toml")
    assert message in str(raised.value)
    assert "spring.toml" in str(raised.value)


_RECORDS = """
import builtins, json, sys
public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
wanted, original = [], builtins.__import__
def record(name, globals=None, locals=None, fromlist=(), level=0):
    module = original(name, globals, locals, fromlist, level)
    importer = (globals or {}).get("__name__", "")
    if importer.partition(".")[0] == "fedtune" and name.partition(".")[0] == "flwr":
        known = getattr(sys.modules[name], "__all__", ())
        wanted.extend([importer, name, word, name in public and word in known] for word in fromlist or ("",))
    return module
builtins.__import__ = record
"""


def list_imports(code: str) -> list[Any]:
    """List (importer, module, name, is public) of all imports from Flower by fedtune's modules while `code` runs."""
    words = [sys.executable, "-c", f"{_RECORDS}\n{code}\nprint(json.dumps(wanted))"]
    env = make_environment(HF_HUB_OFFLINE="1")
    result = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600, check=True)
    return list(json.loads(result.stdout.splitlines()[-1]))


LEAD = "import fedtune.cli.flower_lead, fedtune.cli.real_run, fedtune.ops.deployment, fedtune.api, fedtune.ops.metrics"
SITE = "import fedtune.cli.site, fedtune.ops.services.site_service, fedtune.sites.real_site, fedtune.ops.kits.models"


@pytest.mark.by_day("app", "lead")
@pytest.mark.parametrize("code", ["import fedtune.flower.site_app", LEAD, SITE], ids=["app", "lead", "site"])
def test_only_public_flower_names_are_imported(code: str) -> None:
    imports = list_imports(code)
    assert {name for _, _, name, _ in imports} >= {"RecordDict"}, "the recorder must record imports"
    assert [one for one in imports if not one[3]] == []


@pytest.mark.nightly
def test_import_recorder_detects_private_names() -> None:
    assert not all(public for *_, public in list_imports("import fedtune.ops.wire.fleet"))


def test_site_app_imports_neither_torch_nor_site_code() -> None:
    large = ("torch", "transformers", "dp_accounting", "fedtune.sites", "fedtune.privacy", "fedtune.flower.internals")
    code = f"import sys, fedtune.flower.site_app; print([name for name in {large} if name in sys.modules])"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr

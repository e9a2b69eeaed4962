"""The files in deployment/, checked by their own tools if installed, and executed where possible."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import flwr
import pytest
import yaml
from packaging.utils import canonicalize_name

from fedtune.ops.health import READY, Health, State

from ..conftest import parse_command
from ..flower.loopback import wait_for
from .deployment_files import DEPLOYMENT, KUBERNETES, ROOT, find_pod, find_tool, name_of, run, run_tool

UNITS = sorted((DEPLOYMENT / "systemd").glob("*.service"))
COMPOSE = sorted((DEPLOYMENT / "docker").glob("compose*.yaml"))
COMPOSE_YAML = DEPLOYMENT / "docker/compose.yaml"
SBATCH = DEPLOYMENT / "slurm/fedtune_site.sbatch"
FLOWER = DEPLOYMENT / "flower"
SUPERNODE = FLOWER / "flower-supernode.service"


# systemd


def read_service_section(path: Path) -> configparser.SectionProxy:
    """Read the [Service] section; the last of several equal keys wins."""
    parsed = configparser.RawConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[method-assign,assignment]
    parsed.read_string(path.read_text())
    return parsed["Service"]


def verify(text: str, file: Path) -> str:
    """Return the output of `systemd-analyze verify`, which exits with 0 even if it ignored a line."""
    file.write_text(re.sub(r"/opt/fedtune/bin/[\w-]+", shutil.which("true") or "/bin/true", text))
    process = run(find_tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", file)
    return process.stdout + process.stderr + ("" if process.returncode == 0 else f"exit code {process.returncode}")


@pytest.mark.parametrize("path", [*UNITS, SUPERNODE], ids=name_of)
def test_systemd_units_are_valid_and_hardened(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert verify(text, tmp_path / path.name) == ""
    assert "RestartSecs" in verify(text.replace("RestartSec=", "RestartSecs="), tmp_path / path.name)
    threshold = "25"  # in tenths; a service without any hardening has 96
    shutil.copy(path, tmp_path)
    command = (find_tool("systemd-analyze"), "security", "--offline=true", f"--threshold={threshold}", "--no-pager")
    run_tool(*command, tmp_path / path.name)
    weak = tmp_path / "weak.service"
    weak.write_text("[Service]\nExecStart=/bin/true\n")
    assert run(*command, weak).returncode != 0


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_unit_restarts_on_failure_but_not_after_invalid_settings(path: Path) -> None:
    service = read_service_section(path)
    expected = {"Restart": "on-failure", "RestartPreventExitStatus": "2 3", "KillSignal": "SIGTERM"}
    assert expected.items() <= service.items()
    assert service["TimeoutStopSec"]
    assert "StartLimitBurst=" in path.read_text()
    assert service["User"] not in ("", "root")
    assert service["MemoryMax"]


def test_site_unit_prevents_swap_core_dumps_and_policy_changes() -> None:
    path = DEPLOYMENT / "systemd/fedtune-site.service"
    service, site = read_service_section(path), yaml.safe_load(COMPOSE_YAML.read_text())["services"]["site"]
    assert (service["MemorySwapMax"], service["LimitCORE"]) == ("0", "0")
    assert (site["memswap_limit"], site["ulimits"]) == (site["mem_limit"], {"core": 0})
    assert f"\nReadOnlyPaths=-{service['WorkingDirectory']}/site.toml\n" in path.read_text()
    options, volumes = parse_command(*site["command"]), {item["target"]: item for item in site["volumes"]}
    bound = volumes[str(options["policy"])]
    assert bound["read_only"] is True
    assert bound["source"] == f"{volumes[str(options['policy'].parent)]['source']}/site.toml"
    # The GPU must stay accessible.
    assert service["PrivateDevices"] == "no"
    assert not {"DevicePolicy", "MemoryDenyWriteExecute", "ProcSubset"} & service.keys()


def test_supernode_unit_always_restarts() -> None:
    service, text = read_service_section(SUPERNODE), SUPERNODE.read_text()
    # Exit code 1: still online (2004); 0: its key was unregistered.
    assert (service["Restart"], service["RestartSec"]) == ("always", "5s")
    assert "StartLimitIntervalSec=0" in text
    assert service["User"] not in ("root", "fedtune-site")
    home = next(item for item in shlex.split(text) if item.startswith("FLWR_HOME=")).partition("=")[2]
    assert service["ReadOnlyPaths"] == home


def test_site_unit_behind_a_supernode_has_no_network(tmp_path: Path) -> None:
    drop_in, unit_text = FLOWER / "site-without-network.conf", DEPLOYMENT / "systemd/fedtune-site.service"
    service, node = read_service_section(drop_in), read_service_section(SUPERNODE)
    assert (service["PrivateNetwork"], service["RestrictAddressFamilies"]) == ("yes", "AF_UNIX")
    assert service["Group"] == node["SupplementaryGroups"]
    text = unit_text.read_text().replace("[Install]", f"{drop_in.read_text()}\n[Install]")
    assert verify(text, tmp_path / unit_text.name) == ""


def test_nginx_passes_only_calls_of_a_registered_supernode() -> None:
    client = (Path(flwr.__file__).parent / "supernode/fleet_http_client.py").read_text()
    own = set(re.findall(r'path="/v1/fleet/([\w-]+)"', client)) - {"register-node", "unregister-node"}
    passed_on, refused = re.findall(r"^    location (.*?) \{", (FLOWER / "nginx.conf").read_text(), re.MULTILINE)
    (pattern,) = re.findall(r"^~ (\S+)$", passed_on)
    assert len(own) == 10
    assert {name for name in own if re.search(pattern, f"/v1/fleet/{name}")} == own
    others = ("/v1/control/list-nodes", "/v1/fleet/register-node", "/v1/runtime/get-nodes", "/v1/fleet/get-run/x", "/")
    assert [path for path in others if re.search(pattern, path)] == []
    assert refused == "/"


# Docker


def test_dockerfile_passes_hadolint_linting(tmp_path: Path) -> None:
    hadolint, dockerfile = find_tool("hadolint"), DEPLOYMENT / "docker/Dockerfile"
    run_tool(hadolint, dockerfile)
    broken = tmp_path / "Dockerfile"
    broken.write_text(dockerfile.read_text().replace("ENTRYPOINT [", "ENTRYPOINTS ["))
    assert run(hadolint, broken).returncode != 0


def test_image_runs_unprivileged_and_has_a_health_check() -> None:
    text = (DEPLOYMENT / "docker/Dockerfile").read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.+)$", final, re.M) == ["${FEDTUNE_UID}:${FEDTUNE_UID}"]
    assert re.search(r"^ARG FEDTUNE_UID=[1-9]\d{3,}$", final, re.M)
    assert "HEALTHCHECK" in final
    assert "fedtune.ops.health" in final
    # Sites read GGUF models, leads score texts, and all have metrics: extras cannot be installed in a container.
    assert text.count("fedtune[gguf,metrics,text]") == 2, "the image is built from the wheel and from a wheelhouse"
    assert "install --constraint constraints.txt" in text
    # Exactly the tested version of torch, from constraints.txt, as the Makefile reads it.
    assert "s/^torch==//p" in text
    # The build context must contain only the files of the image.
    lines = (DEPLOYMENT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    sources = {source for line in copied for source in line.split()}
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in patterns, source
    last_let_in = max(number for number, pattern in enumerate(patterns) if pattern.startswith("!"))
    for secret in ("**/*.pem", "**/*.db"):
        assert patterns.index(secret) > last_let_in


# Releases


def list_pins(text: str) -> dict[str, str]:
    return {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.M)}


def test_constraints_file_pins_hashes_for_every_package() -> None:
    unhashed, hashed = ((ROOT / f"constraints{kind}.txt").read_text() for kind in ("", ".hashed"))
    assert list_pins(hashed) == list_pins(unhashed), "run `make constraints`"
    header, *entries = re.split(r"^(?=[^\s#])", hashed, flags=re.M)
    assert "make constraints" in header
    assert len(entries) == len(list_pins(unhashed))
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry


@pytest.mark.nightly
def test_sbom_lists_every_runtime_dependency(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cyclonedx-py").symlink_to(find_tool("cyclonedx-py"))
    for folder_name in (".build", ".made"):
        (tmp_path / folder_name).touch()  # so that nothing is installed
    run_tool("make", "-C", ROOT, "sbom", f"TOOLS={tmp_path}", f"SBOM={tmp_path}/sbom.json", f"SBOM_OF={sys.executable}")
    result = json.loads((tmp_path / "sbom.json").read_text())["components"]
    versions = {canonicalize_name(item["name"]): item["version"] for item in result}
    for needed in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = re.split(r"[><=~\[; ]", needed)[0]
        assert versions[canonicalize_name(name)] == version(name)


def test_compose_files_match_the_compose_specification(tmp_path: Path) -> None:
    command = (find_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec")
    run_tool(*command, *COMPOSE)
    broken = [tmp_path / path.name for path in COMPOSE]
    for path, copy in zip(COMPOSE, broken, strict=True):
        copy.write_text(path.read_text().replace("  site:", "  site:\n    red_only: true", 1))
    result = run(*command, *broken)
    assert result.returncode != 0
    assert all(copy.name in result.stdout for copy in broken)


def test_compose_services_are_read_only_and_unprivileged() -> None:
    services = yaml.safe_load(COMPOSE_YAML.read_text())["services"]
    assert set(services) == {"server", "site"}
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service["user"].startswith(("0", "root"))
        assert service["profiles"] == [name]
        assert all(volume["bind"] == {"create_host_path": False} for volume in service["volumes"])
    assert "ports" not in services["site"]
    assert "expose" not in services["site"]
    assert services["server"]["ports"] == ["9092:9092"]
    (records,) = (volume for volume in services["site"]["volumes"] if volume["target"] == "/records")
    assert records["read_only"] is True
    kit, data = ({one["target"]: one for one in services["server"]["volumes"]}[folder] for folder in ("/kit", "/data"))
    assert kit["read_only"] is True
    assert not data.get("read_only")


# SLURM


def test_sbatch_accepts_the_options_of_the_batch_script(tmp_path: Path) -> None:
    """Without a controller, sbatch reads the options and then fails to connect to port 1."""
    settings = ("ClusterName=none", "SlurmctldHost=localhost", "SlurmctldPort=1", "AuthType=auth/none", "GresTypes=gpu")
    (tmp_path / "slurm.conf").write_text("\n".join((*settings, "MessageTimeout=2\n")))
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}

    def run_sbatch(text: str) -> str:
        (tmp_path / "job").write_text(text)
        return run(find_tool("sbatch"), "--test-only", tmp_path / "job", env=environment).stderr

    text = SBATCH.read_text()
    assert "Unable to contact slurm controller" in run_sbatch(text)
    assert "unrecognized option" in run_sbatch(text.replace("--requeue", "--requeues"))
    assert "Invalid --signal" in run_sbatch(text.replace("TERM@120", "TERM@soon"))
    assert "Invalid --time" in run_sbatch(text.replace("--time=24:00:00", "--time=a day"))


def test_batch_script_passes_bash_and_shellcheck() -> None:
    run_tool("bash", "-n", SBATCH)
    run_tool(find_tool("shellcheck"), SBATCH)


NOTING = """#!/bin/bash
echo "$PWD $*" > ../asked
[[ -z ${CODE:-} ]] || exit "$CODE"
trap 'echo TERM >> ../told; sleep 0.5; exit 0' TERM
echo > ../runs
while :; do sleep 0.05; done
"""


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    """The batch script with a fake `fedtune` and `scontrol` that record their arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "site").mkdir()
    fedtune, scontrol = tmp_path / "bin/fedtune", tmp_path / "bin/scontrol"
    fedtune.write_text(NOTING)
    scontrol.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/requeued\n')
    for path in (fedtune, scontrol):
        path.chmod(0o755)

    def start(*, left_s: int, code: str = "") -> subprocess.Popen[bytes]:
        environment = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "FEDTUNE": str(fedtune),
            "FEDTUNE_SITE": str(tmp_path / "site"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_END_TIME": str(int(time.time()) + left_s),
            "CODE": code,
        }
        return subprocess.Popen(["bash", str(SBATCH)], env=environment)

    return start


@pytest.mark.parametrize(("left_s", "again"), [(110, True), (7200, False)])
@pytest.mark.parametrize("signals", [1, 2])
def test_batch_job_near_its_time_limit_is_requeued(
    left_s: int, again: bool, signals: int, batch: Any, tmp_path: Path
) -> None:
    job = batch(left_s=left_s)
    wait_for((tmp_path / "runs").exists, seconds=20)
    for _ in range(signals):
        job.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "told").read_text() == "TERM\n"
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert (tmp_path / "asked").read_text() == f"{tmp_path}/site site start --kit kit --site site.toml\n"


@pytest.mark.parametrize("code", ["3", "0"])
def test_batch_job_that_ends_early_is_not_requeued(code: str, batch: Any, tmp_path: Path) -> None:
    assert batch(left_s=60, code=code).wait(timeout=30) == int(code)
    assert not (tmp_path / "requeued").exists()


# All deployment files


def test_deployment_files_use_only_existing_command_line_options() -> None:
    texts = "\n".join(path.read_text() for path in (*UNITS, SBATCH))
    started = re.findall(r'(?:fedtune|"\$fedtune") ((?:site|server) start .*?)(?: &)?$', texts, re.M)
    result = [words.split() for words in started]
    services = yaml.safe_load(COMPOSE_YAML.read_text())["services"]
    result += [service["command"] for service in services.values()]
    for name in ("server", "site"):
        (container,) = find_pod(KUBERNETES / f"{name}/{name}.yaml")["containers"]
        result.append(container["args"])
    assert len(result) == 7
    assert all(parse_command(*words)["kit"] for words in result)


def test_operations_page_matches_actual_logs_and_health_output() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    shown = [json.loads(line) for block in re.findall(r"```json\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines, healths = [one for one in shown if "logger" in one], [one for one in shown if "logger" not in one]
    assert len(lines) == 3
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "event"]
        assert (ROOT / (line["logger"].replace(".", "/") + ".py")).is_file()
    assert [set(health) for health in healths] == [set(Health().snapshot())]
    states = dict(re.findall(r"^\| `(\w+)` \| .* \| (200|503) \|$", text, re.M))
    assert states == {state: "200" if state in READY else "503" for state in get_args(State)}

"""Manifests and chart, checked by the tools of Kubernetes and Helm if installed, and their scripts, executed."""

import importlib.util
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.ops.kits import provisioning
from fedtune.ops.kits.kit_file import Kit, KitCertificate
from fedtune.ops.services.lead_and_server import KitRoster
from fedtune.version import __version__

from ..conftest import parse_command
from .conftest import Desk
from .deployment_files import (
    KUBERNETES,
    PROCESSES,
    find_pod,
    find_pod_template,
    find_tool,
    name_of,
    read_documents,
    read_only_document,
    run,
    run_tool,
)

pytestmark = pytest.mark.nightly

OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("*/kustomization.yaml"))
POLICIES = [
    *sorted(KUBERNETES.glob("*/network_policy.yaml")),
    *(KUBERNETES / f"{role}-backup/backup.yaml" for role in ("server", "site")),
]
CHART = KUBERNETES.parent / "helm" / "fedtune"
SITE = KUBERNETES / "site/site.yaml"
VALIDATE = ("--strict", "--kubernetes-version", "1.32")


def list_mounts(container: dict[str, Any]) -> dict[str, Any]:
    return {mount["mountPath"]: mount for mount in container["volumeMounts"]}


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of kubectl for each folder, by name."""
    into, built = tmp_path_factory.mktemp("made"), {}
    for folder in OVERLAYS:
        built[folder.name] = into / f"{folder.name}.yaml"
        built[folder.name].write_text(run_tool(find_tool("kubectl"), "kustomize", folder))
    return built


def test_manifests_match_the_kubernetes_schema(overlays: dict[str, Path], tmp_path: Path) -> None:
    command = (find_tool("kubernetes-validate"), *VALIDATE)
    manifests = [path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"]
    run_tool(*command, *manifests, *overlays.values())
    broken = tmp_path / "broken.yaml"
    for path in manifests:
        broken.write_text(path.read_text().replace("spec:\n", "spec:\n  replcas: 1\n", 1))
        assert run(*command, broken).returncode != 0, path


@pytest.mark.parametrize("folder", [folder.name for folder in OVERLAYS])
def test_kubectl_builds_every_overlay(folder: str, put_together: dict[str, Path]) -> None:
    (made,) = (one for one in read_documents(put_together[folder]) if one["kind"] in PROCESSES.values())
    pod = find_pod_template(made)["spec"]
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    assert {container["image"] for container in containers} == {f"registry.example.org/fedtune:{__version__}"}
    gpus = [container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu") for container in containers]
    assert gpus[-1] == ("1" if folder == "site-gpu" else None)
    assert not any(gpus[:-1])
    assert len({one["metadata"]["namespace"] for one in read_documents(put_together[folder])}) == 1


@pytest.mark.parametrize("path", PROCESSES, ids=name_of)
def test_pods_meet_the_restricted_standard_and_only_the_server_is_reachable(path: Path) -> None:
    pod = find_pod(path)
    assert pod["automountServiceAccountToken"] is False
    expected = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert expected.items() <= pod["securityContext"].items()
    assert pod["securityContext"]["runAsUser"] > 0
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        closed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert closed.items() <= container["securityContext"].items()
        assert container["resources"]["limits"]["memory"]
    for volume in pod["volumes"]:
        assert set(volume) - {"name"} <= {"secret", "configMap", "emptyDir", "persistentVolumeClaim"}
        assert volume.get("secret", {}).get("defaultMode", 0o440) == 0o440
    if PROCESSES[path] == "StatefulSet":
        (container,) = pod["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        spec = read_only_document(path, "StatefulSet")["spec"]
        assert spec["replicas"] == 1, "a ledger or a database must have one pod"
        for claim in spec["volumeClaimTemplates"]:
            assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
        assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    # Network reachability.
    labels = find_pod_template(read_only_document(path, PROCESSES[path]))["metadata"]["labels"]
    policies = [read_only_document(file, "NetworkPolicy")["spec"] for file in POLICIES]
    (policy,) = (item for item in policies if item["podSelector"]["matchLabels"].items() <= labels.items())
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    reached = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    role = path.parent.name
    assert reached == ([9092] if role == "server" else [])
    assert ports == ({53, 5353, 9092} if role in ("site", "lead") else set())


def test_site_pod_is_unreachable_and_cannot_write_policy_or_records() -> None:
    service = read_only_document(SITE, "Service")["spec"]
    assert service["clusterIP"] == "None"
    assert "ports" not in service
    (container,) = find_pod(SITE)["containers"]
    assert "ports" not in container
    # The duration of a round depends on the number of records, so the endpoint must stay inside the pod.
    assert not [argument for argument in container["args"] if "anywhere" in argument]
    mounts = list_mounts(container)
    assert "--site=/site/site.toml" in container["args"]
    policy = {"name": "secret-site", "mountPath": "/site/site.toml", "subPath": "site.toml", "readOnly": True}
    assert mounts["/site/site.toml"] == policy
    assert mounts["/records"]["readOnly"] is True


# The pods' scripts, with test folders instead of the pods' folders.


def read_script(container: dict[str, Any], **folders: Path) -> str:
    assert container["command"][:2] == ["sh", "-euc"]
    script: str = container["command"][2]
    for name, folder in folders.items():
        script = re.sub(rf"(?<![\w/])/{name}(?=[/ ])", str(folder), script)
    return script


def start_script(manifest: str, **folders: Path) -> str:
    (container,) = find_pod(KUBERNETES / manifest)["initContainers"]
    return read_script(container, **folders)


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"{folder.name} {name}")
        (folder / name).chmod(0o440)


def test_site_init_container_copies_keys_privately_and_keeps_the_ledger_key(tmp_path: Path) -> None:
    secret, site = tmp_path / "secret", tmp_path / "pvc"
    expected, of_kit = ("site.toml", "site_key.pem"), ("kit.toml", "ca.pem", "site.pem", "connection_key.pem")
    fill(secret / "site", *expected)
    fill(secret / "kit", *of_kit)
    site.mkdir()
    script = start_script("site/site.yaml", secret=secret, site=site)
    for _ in range(2):
        run_tool("sh", "-euc", script)
        for name in (*expected, *(f"kit/{name}" for name in of_kit)):
            assert (site / name).stat().st_mode & 0o777 == 0o600, name
        (site / "site_key.pem").chmod(0o660)  # the effect of a volume's fsGroup on a restored key
    new_certificate = secret / "kit/site.pem"
    new_certificate.chmod(0o640)
    new_certificate.write_text("renewed")
    run_tool("sh", "-euc", script)
    assert (site / "kit/site.pem").read_text() == "renewed"
    (secret / "site/site_key.pem").chmod(0o640)
    (secret / "site/site_key.pem").write_text("another key")
    refused = run("sh", "-euc", script)
    assert refused.returncode == 2
    assert "not the key" in refused.stderr
    assert (site / "site_key.pem").read_text() == "site site_key.pem"


def test_server_init_container_links_roster_and_certificate(desk: Desk, tmp_path: Path) -> None:
    secret, folder = desk.folder / "server", tmp_path / "kit"
    folder.mkdir()
    script = start_script("server/server.yaml", secret=secret, kit=folder)
    for _ in range(2):
        run_tool("sh", "-euc", script)
    assert (folder / "server_key.pem").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in folder.iterdir() if path.is_symlink()} == {"roster.json", "server.pem"}
    kit = Kit.read(folder, kind="server")
    roster, certificate = KitRoster(kit), KitCertificate(kit)
    assert roster.read_newest().sites == ()
    desk.join("north")
    provisioning.renew_own_certificate(desk.folder, "server", days=400, now=desk.now)
    assert [site.site for site in roster.read_newest().sites] == ["north"]
    assert certificate.is_new()
    # The server must not be able to write to its kit.
    (container,) = find_pod(KUBERNETES / "server/server.yaml")["containers"]
    assert {path for path, mount in list_mounts(container).items() if not mount.get("readOnly")} == {"/data", "/tmp"}


@pytest.mark.parametrize("has_receipts", [True, False])
def test_lead_init_container_keeps_newer_receipts(has_receipts: bool, tmp_path: Path) -> None:
    secret, lead = tmp_path / "secret", tmp_path / "pvc"
    receipts = ("receipts.json",) if has_receipts else ()
    fill(secret, "kit.toml", "ca.pem", "lead.pem", "connection_key.pem", "lead_key.pem", "roster.json", *receipts)
    lead.mkdir()
    script = start_script("lead/lead.yaml", secret=secret, lead=lead)
    run_tool("sh", "-euc", script)
    kit = lead / "kit"
    assert {path.name for path in kit.iterdir()} == {path.name for path in secret.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in kit.iterdir()} == {0o600}
    (kit / "receipts.json").write_text("newer")
    (secret / "roster.json").chmod(0o640)
    (secret / "roster.json").write_text("a new site")
    run_tool("sh", "-euc", script)
    assert (kit / "receipts.json").read_text() == "newer"
    assert (kit / "roster.json").read_text() == "a new site"


def test_lead_job_resumes_runs_and_does_not_retry_permanent_failures() -> None:
    job = read_only_document(KUBERNETES / "lead/lead.yaml", "Job")
    pod = find_pod(KUBERNETES / "lead/lead.yaml")
    (container,) = pod["containers"]
    args = parse_command(*container["args"])
    assert (args["or_resume"], args["kit"]) == (True, Path("/lead/kit"))
    assert args["words"] == ("name=first", "experiment=/experiment/experiment.yaml", "tracking.output_dir=/lead/runs")
    assert job["metadata"]["name"] == "fedtune-lead-first"
    assert pod["restartPolicy"] == "Never", "the policy on exit codes requires this"
    invalid, drained = job["spec"]["podFailurePolicy"]["rules"]
    assert invalid["action"] == "FailJob"
    assert invalid["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert (drained["action"], drained["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    writable = {path for path, mount in list_mounts(container).items() if not mount.get("readOnly")}
    assert writable == {"/lead", "/tmp"}


BACKUPS = {"site": ("--kit=/site/kit", "--site=/site/site.toml"), "server": ("--kit=/data", "--data=/data")}


@pytest.mark.parametrize("role", BACKUPS)
def test_backup_job_runs_next_to_its_process_and_keeps_recent_files(role: str, tmp_path: Path) -> None:
    path, process = KUBERNETES / f"{role}-backup/backup.yaml", KUBERNETES / role / f"{role}.yaml"
    pod, made = find_pod(path), read_only_document(process, "StatefulSet")
    labels = find_pod_template(read_only_document(path, "CronJob"))["metadata"]["labels"]
    assert not made["spec"]["selector"]["matchLabels"].items() <= labels.items(), "the selector must not match"
    (near,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near["topologyKey"] == "kubernetes.io/hostname"
    assert near["labelSelector"]["matchLabels"].items() <= made["spec"]["template"]["metadata"]["labels"].items()
    claims = {f"{claim['metadata']['name']}-fedtune-{role}-0" for claim in made["spec"]["volumeClaimTemplates"]}
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] != "tmp"}
    assert used == {*claims, "fedtune-backup"}
    (container,) = pod["containers"]
    (beside,) = made["spec"]["template"]["spec"]["containers"]
    ours, theirs = list_mounts(container), list_mounts(beside)
    for folder in ours.keys() - {"/tmp", "/backup"}:
        assert ours[folder]["name"] == theirs[folder]["name"]
    assert read_only_document(path, "CronJob")["spec"]["concurrencyPolicy"] == "Forbid"
    # It writes a new file, and only then removes old ones.
    (keep,) = container["env"]
    command = container["command"][2].splitlines()[0]
    assert str(parse_command(*shlex.split(command)[1:])["file"]).startswith(f"/backup/{role}-")
    assert shlex.split(command)[1:3] == [role, "backup"]
    assert shlex.split(command)[-2:] == list(BACKUPS[role])

    (folder := tmp_path / "volume").mkdir()
    (fedtune := tmp_path / "commands" / "fedtune").parent.mkdir()
    script = read_script(container, backup=folder)
    environment = {**os.environ, "PATH": f"{fedtune.parent}:{os.environ['PATH']}", keep["name"]: keep["value"]}
    old, young, other = (folder / name for name in (f"{role}-old.zip", f"{role}-young.zip", "notes.zip"))
    for path, days in ((old, 40), (young, 20), (other, 40)):
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
    for ends, rest in ((1, {old, young, other}), (0, {young, other})):
        # The fake command records its arguments and writes a file.
        fedtune.write_text(f'#!/bin/sh\n[ {ends} = 0 ] || exit {ends}\necho "$@" > "{tmp_path}/asked"\n: > "$3"\n')
        fedtune.chmod(0o755)
        assert run("sh", "-euc", script, env=environment).returncode == ends
        assert {old, young, other} & set(folder.iterdir()) == rest
    (new,) = set(folder.iterdir()) - {young, other}
    assert re.fullmatch(rf"{role}-\d{{8}}T\d{{6}}Z\.zip", new.name)
    assert (tmp_path / "asked").read_text().split()[:3] == [role, "backup", str(new)]


# Helm


ENGINE = """
import json, sys
from helm_python.chart import Chart, lint
chart, namespace, values = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert not lint(chart, values)["errors"]
for text in Chart.load(chart).render(values, name="release", namespace=namespace).values():
    print("---", text, sep="\\n")
"""
"""Runs Helm 4 from a Python package, in a separate process, because it contains the Go runtime."""
VALUES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("chart_values.yaml").read_text())
ROLE_VALUES = VALUES["by_role"]


def render_chart(folder: Path, role: str, values: dict[str, Any]) -> Path:
    """Render the chart with these values, after `helm lint` succeeded."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed on this machine")
    namespace = "fedtune" if role == "server" else f"fedtune-{role}"
    rendered = folder / "rendered.yaml"
    rendered.write_text(run_tool(sys.executable, "-c", ENGINE, CHART, namespace, json.dumps({"role": role, **values})))
    return rendered


def test_chart_values_match_the_schema_and_the_plain_manifests(tmp_path: Path) -> None:
    checker, schema = find_tool("check-jsonschema"), CHART / "values.schema.json"
    run_tool(checker, "--check-metaschema", schema)
    plain, file = (CHART / "values.yaml").read_text(), tmp_path / "values.yaml"

    def change_values(*changes: tuple[str, str]) -> int:
        text = plain
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        file.write_text(text)
        return run(checker, "--schemafile", schema, file).returncode

    server, lead, run_name = ("role: site", "role: server"), ("role: site", "role: lead"), ('name: ""', "name: first")
    for valid in ((), (server,), (lead, run_name)):
        assert change_values(*valid) == 0, valid
    for invalid in (
        (("gpus: 0", "gpus: -1"),),
        (('memoryLimit: ""', "memoryLimit: 16G"),),
        (("storage: {}", "storage: {site: {sizes: 50Gi}}"),),
        (("maxUnavailable: 0", "maxUnavailable: 2"),),
        (("claims: {}", 'claims: {records: ""}'),),
        # Values that this role does not have.
        (("storage: {}", "storage: {data: {size: 50Gi}}"),),
        (run_name,),
        (server, ("gpus: 0", "gpus: 1")),
        (server, ("claims: {}", "claims: {records: wards}")),
        (lead,),
        (lead, run_name, ("enabled: false", "enabled: true")),
        (lead, run_name, ("settings: []", "settings: [name=other]")),
    ):
        assert change_values(*invalid) == 1, invalid
    # The chart has no manifests of its own.
    manifests = CHART / "manifests"
    assert manifests.is_symlink()
    assert manifests.resolve() == KUBERNETES
    (template,) = CHART.glob("templates/*.yaml")
    assert "apiVersion" not in template.read_text() + (CHART / "templates/_changes.tpl").read_text()
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


@pytest.mark.parametrize("role", ROLE_VALUES)
def test_default_chart_renders_the_plain_manifests(role: str, overlays: dict[str, Path], tmp_path: Path) -> None:
    def index_documents(*paths: Path) -> dict[tuple[str, str], Any]:
        return {(doc["kind"], doc["metadata"]["name"]): doc for path in paths for doc in read_documents(path)}

    plain = [overlays["lead"]] if role == "lead" else [overlays[role], overlays[f"{role}-backup"]]
    assert index_documents(render_chart(tmp_path, role, VALUES["plain"][role])) == index_documents(*plain)


def list_leaves(values: Any) -> list[str]:
    inner = values.values() if isinstance(values, dict) else values
    return (
        [leaf for value in inner for leaf in list_leaves(value)] if isinstance(values, dict | list) else [str(values)]
    )


@pytest.mark.parametrize("role", ROLE_VALUES)
def test_every_chart_value_changes_valid_manifests(role: str, tmp_path: Path) -> None:
    plain = set(render_chart(tmp_path, role, VALUES["plain"][role]).read_text().splitlines())
    rendered = render_chart(tmp_path, role, VALUES["common"] | ROLE_VALUES[role])
    run_tool(find_tool("kubernetes-validate"), *VALIDATE, rendered)
    text = rendered.read_text()
    assert "registry.example.org" not in text, "every container must have the other image"
    new = "\n".join(line for line in text.splitlines() if line not in plain)
    for value in set(list_leaves(VALUES["common"] | ROLE_VALUES[role])) - {"True"}:
        assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", new), value

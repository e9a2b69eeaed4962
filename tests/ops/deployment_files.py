"""Helpers for the files in deployment/: paths, manifests, and the tools that read them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOYMENT = ROOT / "deployment"
KUBERNETES = DEPLOYMENT / "kubernetes"
PROCESSES = {
    KUBERNETES / "server/server.yaml": "StatefulSet",
    KUBERNETES / "site/site.yaml": "StatefulSet",
    KUBERNETES / "lead/lead.yaml": "Job",
    KUBERNETES / "server-backup/backup.yaml": "CronJob",
    KUBERNETES / "site-backup/backup.yaml": "CronJob",
}
"""Each manifest with pods, and the kind of its workload."""


def find_tool(name: str) -> str:
    """Return the path of a tool, or skip the test."""
    tool = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip(f"{name} is not installed on this machine")
    return tool


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False, **options
    )


def run_tool(*command: object, **options: Any) -> str:
    """Run a command that must succeed, and return its output."""
    process = run(*command, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def name_of(path: Path) -> str:
    return str(path.relative_to(DEPLOYMENT))


def read_documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def read_only_document(path: Path, kind: str) -> dict[str, Any]:
    (only,) = (document for document in read_documents(path) if document["kind"] == kind)
    return only


def find_pod_template(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the pod template of a workload, with its metadata."""
    spec: dict[str, Any] = manifest["spec"]
    spec = spec["jobTemplate"]["spec"] if manifest["kind"] == "CronJob" else spec
    template: dict[str, Any] = spec["template"]
    return template


def find_pod(path: Path) -> dict[str, Any]:
    pod: dict[str, Any] = find_pod_template(read_only_document(path, PROCESSES[path]))["spec"]
    return pod

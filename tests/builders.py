"""What tests of several layers build alike."""

from __future__ import annotations

from typing import Any

from fedtune.runs.results import BaseModel, Population, RunProvenance, RunResult


def run_result(**fields: Any) -> RunResult:
    """The content of a run.json: `rounds`, `final` and `privacy` are given, the rest may be."""
    population = Population(dataset="letters", unit="record", declared_sizes={})
    made = RunProvenance(population=population, base_model=BaseModel(path="random:bert", sha256="00" * 32))
    about = {"fedtune_version": "0", "config_sha256": "00", "task": "classification", "provenance": made}
    return RunResult(**about | fields)

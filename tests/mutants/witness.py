"""A plugin of pytest that writes down what the harness needs: whose code ran, and what failed first, and how."""

import importlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

REPORT, MODULE = "FEDTUNE_MUTANT_REPORT", "FEDTUNE_MUTANT_MODULE"
"""Environment variables: where to write, and the module whose file is to be named."""


class Witness:
    def __init__(self) -> None:
        self.passed = 0
        self.failed: dict[str, str] | None = None
        self.not_collected: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and self.failed is None:
            # A strict xfail that passes fails without an exception.
            kind = call.excinfo.typename if call.excinfo else "Failed"
            self.failed = {"test": report.nodeid, "when": report.when, "exception": kind}
        self.passed += report.passed and report.when == "call"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        module = importlib.import_module(os.environ[MODULE])
        seen: dict[str, Any] = {
            "file": module.__file__,
            "passed": self.passed,
            "failed": self.failed,
            "not_collected": self.not_collected,
        }
        Path(os.environ[REPORT]).write_text(json.dumps(seen))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Witness(), "witness")

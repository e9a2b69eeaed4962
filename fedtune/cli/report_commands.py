"""What the commands under `fedtune report` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.cli import report_checks, report_tables
from fedtune.cli.compose import saved_config
from fedtune.cli.ledger_commands import ledger_file
from fedtune.privacy.keys import SigningKey, check_public_key
from fedtune.privacy.site_files import SiteFiles
from fedtune.report import signing
from fedtune.report.difference import differences
from fedtune.report.model import Report, schema_text
from fedtune.spec import ConfigError, RunError


def build(options: argparse.Namespace) -> None:
    """Write the report of a run or a ledger."""
    key = None if options.sign is None else SigningKey.load(Path(options.sign))
    path = Path(options.path)
    report, folder = (_of_run if (path / "config.yaml").is_file() else _of_ledger)(path, options)
    if key is not None:
        report = signing.signed(report, key)
        signing.check(report)  # a ledger's report is signed by the key that its events are signed by
    folder = folder if options.output is None else Path(options.output)
    from fedtune.report.page.render import write_files  # draws, which takes a second to import

    language = options.language or (saved_config(path).report.language if report.kind == "run" else "en")
    paths = write_files(folder, report, language=language, pdf=options.pdf)
    report_tables.show_written(Console(highlight=False), report, paths)


def _of_run(folder: Path, options: argparse.Namespace) -> tuple[Report, Path]:
    """The report of a run, and the folder that it belongs in."""
    from fedtune.report import from_run
    from fedtune.report.from_run import read_site_report

    if options.anchor is not None:
        raise ConfigError("--anchor", options.anchor, "belongs to a ledger's report; this is a run folder")
    return from_run.build(folder, site_reports=[read_site_report(Path(file)) for file in options.site_report]), folder


def _of_ledger(path: Path, options: argparse.Namespace) -> tuple[Report, Path]:
    """The report of a ledger, and the folder that it belongs in."""
    from fedtune.report import from_ledger

    if options.site_report:
        raise ConfigError("--site-report", options.site_report[0], "belongs to a run's report; this is a ledger")
    of_policy = path.suffix == ".toml"
    ledger = SiteFiles.of(path).ledger if of_policy else ledger_file(str(path))
    report = from_ledger.build(path if of_policy else ledger, anchor=Path(options.anchor) if options.anchor else None)
    return report, ledger.with_name(f"{ledger.name}.report")


def verify(options: argparse.Namespace) -> None:
    """Print a line for each check.

    Raises:
        RunError: something differs.
    """
    if options.key is not None:
        check_public_key("--key", options.key)
    path, report = _read(options.file)
    found = report_checks.checks(report, key=options.key, config_sha256=_configuration(path, report, options.config))
    if options.json:
        _print_json({"file": str(path), "checks": [asdict(check) for check in found]})
    else:
        report_tables.show_checks(Console(highlight=False), path, report, found)
    wrong = [check.name for check in found if check.state == "wrong"]
    if wrong:
        raise RunError(f"{path} does not hold: {', '.join(wrong)}")


def _configuration(path: Path, report: Report, given: str | None) -> str | None:
    """What the run's configuration hashes to: as somebody said, else as the file beside the report does."""
    if given is not None:
        if len(given) != 64 or set(given) - set("0123456789abcdef"):
            raise ConfigError("--config", given, "must be a SHA-256 of 64 lower-case hex digits")
        return given
    if report.kind == "ledger" or not (path.parent / "config.yaml").is_file():
        return None
    from fedtune.cli.compose import saved_config

    return saved_config(path.parent).digest()


def diff(options: argparse.Namespace) -> None:
    """Show what changed between two reports."""
    pairs = [_read(options.before), _read(options.after)]
    for path, report in pairs:
        try:
            signing.check(report)
        except RunError as error:
            raise RunError(f"{path}: {error}") from None
    settings = [_settings(path, report) for path, report in pairs]
    (_, before), (_, after) = pairs
    changes = differences(before, after, settings=(settings[0], settings[1]) if all(settings) else ({}, {}))
    if options.json:
        files = {"before": str(pairs[0][0]), "after": str(pairs[1][0])}
        _print_json({**files, "changes": [asdict(change) for change in changes]})
    else:
        configured = all(settings) or before.kind == "ledger"
        names = (options.before, options.after)
        report_tables.show_differences(Console(highlight=False), names, changes, configured=configured)


def schema(options: argparse.Namespace) -> None:
    """Print the schema that is published."""
    sys.stdout.write(schema_text())


def _settings(path: Path, report: Report) -> Mapping[str, Any]:
    """The settings of a run whose configuration lies beside its report; none if that is another one."""
    if not (path.parent / "config.yaml").is_file():
        return {}
    from fedtune.cli.compose import saved_config

    config = saved_config(path.parent)
    return config.decisive() if config.digest() == report.provenance.config_sha256 else {}


def _read(name: str) -> tuple[Path, Report]:
    """The report in a file, or in the report.json of a folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError("report", name, f"must be a report.json, or a folder with one ({error.strerror})") from None
    try:
        return path, signing.read(data)
    except ConfigError as error:
        raise error.in_file(path) from None


def _print_json(data: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "build": build,
    "verify": verify,
    "diff": diff,
    "schema": schema,
}

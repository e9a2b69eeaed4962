"""What `fedtune audit` does: settings, the audited run in its folder, the findings, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from fedtune.audit.spec import AuditSpec
from fedtune.cli.audit_tables import place, show_findings
from fedtune.cli.compose import compose_run
from fedtune.cli.run_folder import folder_of, make, run_in_folder
from fedtune.config import RunConfig
from fedtune.privacy.accountant import epsilon_text
from fedtune.report.derive.audit_bounds import read_audit, refuted
from fedtune.report.model import Audit
from fedtune.spec import ConfigError, RunError

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fedtune.federation.results import RunResult

_PREFIX = "audit."


def audit(overrides: Sequence[str]) -> None:
    """Run, attack, and say what came of it.

    Raises:
        ConfigError: for the settings; nothing has run then.
        RunError: a lower bound is above its claim, or the run failed.
    """
    spec = audit_spec([one for one in overrides if one.lstrip("+").startswith(_PREFIX)])
    config = compose_run([one for one in overrides if not one.lstrip("+").startswith(_PREFIX)])
    if spec.kind == "sensitivity":
        _search(config, spec)
        return
    # Here, because torch and Flower take seconds to import and a mistake in an override should not wait for them.
    from fedtune.audit.experiment import auditable, run_audit

    config = auditable(config, spec)
    folder, console = folder_of(config), Console()
    make(folder, config)

    def work(config: RunConfig, folder: Path, display: Any) -> RunResult:
        return run_audit(config, spec, folder, display)

    again = "a new audit, for this one cannot be continued"
    run_in_folder(config, folder, console, work=work, again=again)
    result = read_audit(folder)
    assert result is not None, "an audit that ended has written what it found"
    show_findings(console, result, folder)
    _judge(result)


def _search(config: RunConfig, spec: AuditSpec) -> None:
    """Look for a case that breaks the bound on one unit's influence, and say what came of it.

    Raises:
        RunError: there is one.
    """
    from fedtune.audit.sensitivity import FILE, search

    if not config.privacy.private:
        raise ConfigError("privacy", config.privacy.mechanism, "claims nothing that could be audited")
    folder, console = folder_of(config), Console()
    make(folder, config)
    found = search(config, spec, folder, seed=config.seed)
    console.print(
        f"{found.tries} cases, one {found.unit} more in each: the sum moved by at most {found.moved:.6f} clip norms\n"
        f"  above one clip norm           {found.exceeded}\n"
        f"  other {found.unit}s moved, by a cell or more   {found.others_moved}\n"
        f"{folder / FILE}",
        soft_wrap=True,
        highlight=False,
    )
    if found.exceeded or found.others_moved:
        raise RunError(
            "one unit moved a sum by more than its own clipped contribution: no epsilon holds on this machine"
        )


def audit_spec(overrides: Sequence[str]) -> AuditSpec:
    """The audit's own settings, from overrides such as `audit.canaries=500`.

    Raises:
        ConfigError: names the first wrong key, its value and what would be accepted.
    """
    try:
        parsed = OverridesParser.create().parse_overrides([override.lstrip("+") for override in overrides])
    except HydraException:
        raise ConfigError("override", " ".join(overrides), "must look like audit.key=value") from None
    given, known = {}, [field.name for field in fields(AuditSpec)]
    for one in parsed:
        key = str(one.key_or_group).removeprefix(_PREFIX)
        if key not in known:
            raise ConfigError(_PREFIX + key, one.value(), f"is not a setting of an audit ({', '.join(known)})")
        if one.is_sweep_override() or isinstance(one.value(), bool):
            raise ConfigError(_PREFIX + key, str(one.value()), "must be one plain value")
        given[key] = one.value()
    try:
        return TypeAdapter(AuditSpec).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, ConfigError):
            raise raised.under(_PREFIX.rstrip(".")) from None
        bound = f"must be {first['msg'].removeprefix('Input should be ')}"
        raise ConfigError(_PREFIX + str(first["loc"][0]), first["input"], bound) from None


def _judge(result: Audit) -> None:
    """Fail where a claim is refuted."""
    wrong = [
        f"{place(bound.site)}: epsilon is at least {bound.lower_bound:.3f} with {result.confidence:.0%} confidence, "
        f"above the claimed {epsilon_text(bound.claimed_epsilon)}"
        for bound in refuted(result)
    ]
    if wrong:
        raise RunError(f"the audit refutes the claim, so the implementation or the claim is wrong ({'; '.join(wrong)})")

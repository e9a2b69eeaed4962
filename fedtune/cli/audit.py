"""`fedtune audit`: attack a run on this machine, and compare the result with its guarantee."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from fedtune.cli.command import AsJson, Overrides, print_answer
from fedtune.spec import ConfigError, RunError

if TYPE_CHECKING:
    from fedtune.config import RunConfig
    from fedtune.lab.audit.spec import AuditSpec


def audit(overrides: Overrides = (), as_json: AsJson = False) -> None:
    """Attack a run on this machine, and compare the resulting lower bound with the epsilon that the run claims.

    For each of many artificial records (canaries), an independent coin toss decides whether it is in the training
    data. An attacker who sees what training releases then guesses which canaries are in. The share of correct
    guesses gives a lower bound on epsilon. If a bound refutes the claim, the exit code is 1: the implementation or
    the claim is wrong.

      fedtune audit experiment=debug audit.canaries=1000         canaries of 1,000 clip norms; every step is seen
      fedtune audit experiment=debug audit.kind=records          made-up texts; the final model alone is seen
      fedtune audit experiment=debug audit.kind=sensitivity      no run: how far can one record move a step's sum?
      fedtune audit privacy.epsilon=3 "audit.sites=[bank-a]" audit.guesses=100

      audit.kind        gradient, records or sensitivity
      audit.canaries    at each site (1000)
      audit.guesses     made at each site; default: all
      audit.confidence  of each bound (0.95)
      audit.sites       with canaries; default: all
      audit.never_used  share kept to compare with (0.3)
      audit.tries       cases of a search for sensitivity (200)

    Other overrides are those of `fedtune simulate`. The run folder is marked, since its adapter was trained on
    canaries; real sites and existing ledgers are never audited. See docs/audit.md for the meaning of each figure.
    """
    # Hydra and the accountants take more than a second to import, and --help needs none of them.
    from rich.console import Console

    from fedtune.api.compose import compose_run
    from fedtune.cli.interruptible_run import show_run
    from fedtune.lab.audit.findings import require_not_refuted, show_findings
    from fedtune.lab.audit.spec import PREFIX, parse_audit_spec
    from fedtune.report.derive.verdicts import read_audit
    from fedtune.runs.run_paths import find_run_folder
    from fedtune.show.terminal_tables import SCHEMA_VERSION, print_json, say

    spec = parse_audit_spec([one for one in overrides if one.lstrip("+").startswith(PREFIX)])
    config = compose_run([one for one in overrides if not one.lstrip("+").startswith(PREFIX)])
    if spec.kind == "sensitivity":
        _search_violations(config, spec, as_json=as_json)
        return
    began = time.monotonic()
    # Only now, because torch and Flower take seconds more and a mistake in an override should not wait for them.
    from fedtune.lab.audit.experiment import make_auditable, run_audit
    from fedtune.sites.virtual_site import fix_number_format

    config = make_auditable(config, spec)
    folder, console = find_run_folder(config), Console(stderr=as_json)
    config = fix_number_format(config, folder, told=partial(say, console=console))
    again = "a new audit; this one cannot be resumed"
    show_run(config, folder, console, work=partial(run_audit, spec=spec), again=again, began=began)
    result = read_audit(folder)
    assert result is not None, "an audit that ended has written what it found"
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "folder": str(folder), "result": result})
    else:
        show_findings(console, result, folder)
    require_not_refuted(result)


def _search_violations(config: RunConfig, spec: AuditSpec, *, as_json: bool) -> None:
    """Search for a violation of the sensitivity bound, and print the result.

    Raises:
        RunError: a violation was found.
        ConfigError: the run has no privacy to audit.
    """
    from fedtune.config import format_config_yaml
    from fedtune.federation.run_folder import RunFolder
    from fedtune.lab.audit import sensitivity
    from fedtune.runs.run_paths import find_run_folder
    from fedtune.show.terminal_tables import SCHEMA_VERSION, build_key_value_section

    if not config.privacy.private:
        raise ConfigError("privacy", config.privacy.mechanism, "makes no privacy claim that could be audited")
    folder = find_run_folder(config)
    RunFolder(folder).create(format_config_yaml(config))
    found = sensitivity.search_violations(config, spec, folder, seed=config.seed)
    title = (
        f"{found.tries} cases with one more {found.unit} each: the sum moved by at most {found.moved:.6f} clip norms"
    )
    moved = {"above one clip norm": f"{found.exceeded}", f"other {found.unit}s, by a cell": f"{found.others_moved}"}
    told = {"schema_version": SCHEMA_VERSION, "folder": str(folder), "result": found}
    print_answer(
        told,
        [build_key_value_section({**moved, "written": str(folder / sensitivity.FILE)}, title=title)],
        as_json=as_json,
    )
    if found.exceeded or found.others_moved:
        beyond = "one record or person moved a sum by more than its own clipped contribution"
        raise RunError(f"{beyond}: no epsilon holds on this machine")

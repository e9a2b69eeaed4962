"""`fedtune audit`: an empirical lower bound on a run's epsilon, compared with the claimed epsilon."""

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
    """Audit a run on this machine: compute a lower bound on epsilon, and compare it with the run's claim.

    Each of many artificial records (canaries) joins the training data by an independent coin toss. An attacker who
    sees the releases of training guesses which canaries joined. The fraction of correct guesses gives a lower bound
    on epsilon. The exit code is 1 if a bound refutes the claim: then the implementation or the claim is wrong.

      fedtune audit experiment=debug audit.canaries=1000         gradient canaries; the attacker sees every step
      fedtune audit experiment=debug audit.kind=records          artificial texts; the attacker sees the final model
      fedtune audit experiment=debug audit.kind=sensitivity      no run: the largest change of a sum by one record
      fedtune audit privacy.epsilon=3 "audit.sites=[bank-a]" audit.guesses=100

      audit.kind        gradient, records or sensitivity
      audit.canaries    number of canaries per site (1000)
      audit.guesses     number of guesses per site (default: one per canary)
      audit.confidence  confidence level of each bound (0.95)
      audit.sites       sites with canaries (default: all)
      audit.non_members  fraction of canaries held out as a reference (0.3)
      audit.tries       number of cases in a sensitivity search (200)

    All overrides of `fedtune simulate` are accepted. The run folder is marked as an audit, because its adapter was
    trained on canaries. Real sites and existing ledgers cannot be audited. See docs/audit.md for all figures.
    """
    # Hydra and the accountants take more than a second to import, and --help needs none of them.
    from rich.console import Console

    from fedtune.api.compose import compose_run
    from fedtune.cli.interruptible_run import show_run
    from fedtune.lab.audit.findings import require_not_refuted, show_findings
    from fedtune.lab.audit.spec import PREFIX, parse_audit_spec
    from fedtune.report.derive.verdicts import read_audit
    from fedtune.runs.run_paths import find_run_folder
    from fedtune.show.terminal_tables import print_json, say

    spec = parse_audit_spec([one for one in overrides if one.lstrip("+").startswith(PREFIX)])
    config = compose_run([one for one in overrides if not one.lstrip("+").startswith(PREFIX)])
    if spec.kind == "sensitivity":
        _search_violations(config, spec, as_json=as_json)
        return
    began = time.monotonic()
    # Imported late: torch and Flower take seconds, and an invalid override should fail immediately.
    from fedtune.lab.audit.experiment import make_auditable, run_audit
    from fedtune.sites.virtual_site import fix_number_format

    config = make_auditable(config, spec)
    folder, console = find_run_folder(config), Console(stderr=as_json)
    config = fix_number_format(config, folder, told=partial(say, console=console))
    again = "a new audit; this one cannot be resumed"
    show_run(config, folder, console, work=partial(run_audit, spec=spec), again=again, began=began)
    result = read_audit(folder)
    assert result is not None, "a finished audit has written its result"
    if as_json:
        print_json({"folder": str(folder), "result": result})
    else:
        show_findings(console, result, folder)
    require_not_refuted(result)


def _search_violations(config: RunConfig, spec: AuditSpec, *, as_json: bool) -> None:
    """Search for inputs that violate the sensitivity bound, and print the result.

    Raises:
        RunError: a violation was found.
        ConfigError: the run has no privacy to audit, or its sites' ranks differ.
    """
    from fedtune.config import format_config_yaml
    from fedtune.federation.run_folder import RunFolder
    from fedtune.lab.audit import sensitivity
    from fedtune.lab.audit.spec import require_guarantee
    from fedtune.runs.run_paths import find_run_folder
    from fedtune.show.terminal_tables import build_key_value_section

    require_guarantee(config)
    if ranks := list(config.federation.ranks):
        raise ConfigError("federation.ranks", ranks, "must be []: the search changes sums of the whole adapter")
    folder = find_run_folder(config)
    RunFolder(folder).create(format_config_yaml(config))
    found = sensitivity.search_violations(config, spec, folder)
    most = f"the sum changed by at most {found.moved:.6f} clip norms"
    title = f"{found.tries} cases with one additional {found.unit}: {most}"
    rows = {"above one clip norm": f"{found.exceeded}"}
    rows |= {f"with a change of other {found.unit}s": f"{found.others_moved}"}
    rows |= {"written": str(folder / sensitivity.FILE)}
    told = {"folder": str(folder), "result": found}
    print_answer(told, [build_key_value_section(rows, title=title)], as_json=as_json)
    if found.exceeded or found.others_moved:
        beyond = "one record or person changed a sum by more than its clipped contribution"
        raise RunError(f"{beyond}: the privacy guarantee does not hold on this machine")

"""Set up and run a site of a federation: its policy, its keys, and the process that answers requests.

  fedtune site template > site.toml                       print a policy template
  fedtune site check-policy site.toml                     explain a policy in plain language
  fedtune site init --site site.toml                      create the site's keys and a join request
  fedtune site doctor --kit kit --site site.toml          check the setup, and print how to fix problems
  fedtune site start --kit kit --site site.toml           run the site's process
  fedtune site approve [RUN] --kit kit --site site.toml   show the cost of waiting runs, or approve a run
  fedtune site deny RUN --reason TEXT --kit kit --site site.toml     permanently refuse a waiting or running run
  fedtune site members ROSTER --kit kit --site site.toml  compare the lead's roster with the policy's members
  fedtune site score RUN --kit kit --site site.toml       score a final adapter on the site's held-out records
  fedtune site personalize RUN --kit kit --site site.toml  train a personalized adapter, which stays at the site
  fedtune site pause | resume | leave --kit kit ...       pause, resume or leave the federation
  fedtune site backup | restore FILE --kit kit ...        back up a site, also while it is running, or restore it
See docs/adding_a_site.md for a walkthrough, and docs/site_policy.md for how to choose a policy's numbers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedtune.cli.command import Argument, AsJson, Health, HealthAnywhere, LogLevel, Metrics, Option, command, group
from fedtune.evaluation.spec import SMALLEST
from fedtune.formatting import pluralize
from fedtune.spec import NOT_GIVEN, ConfigError

if TYPE_CHECKING:
    from fedtune.cli.site_actions import SiteActions
    from fedtune.ops.kits.kit_file import Kit
    from fedtune.ops.services.site_state import SiteState

app = group(__doc__)

_IMPORT = (
    "install a base model of the federation: a folder with safetensors, a .gguf file, or package:MODULE/FOLDER inside "
    "an installed Python package"
)
KitFolder = Annotated[Path, Option(metavar="DIR", help="the site's kit")]
PolicyFile = Annotated[Path, Option("the site's site.toml", ("--site",), metavar="FILE")]
By = Annotated[
    str | None, Option("name of the decision maker, for ledger and report (default: your account)", metavar="NAME")
]
Ticket = Annotated[str | None, Option("your site's ticket number, for ledger and report", metavar="TEXT")]
KeptRun = Annotated[str, Argument("RUN", help="a run whose final adapter is stored here, or its folder")]


@command(app, "explain a policy in plain language", name="check-policy")
def check_policy(file: Annotated[Path, Argument("FILE", help="the site's site.toml")], as_json: AsJson = False) -> None:
    """Validate a policy and explain it: permitted leads and tasks, privacy budget, and releases.

    Warnings do not change the exit code. An invalid key, or a ledger that does not match the policy, gives exit code 2.
    """
    from fedtune.cli import plain_words  # the accountants take most of a second to import

    plain_words.check_policy(file, as_json=as_json)


@command(app, "print a policy template")
def template() -> None:
    """Print a policy template with comments on every key."""
    from fedtune.version import find_config_folder  # reading settings takes most of a second to import

    sys.stdout.write((find_config_folder() / "site.toml").read_text(encoding="utf-8"))


@command(app, "create the site's keys and a join request")
def init(
    policy: PolicyFile,
    out: Annotated[Path | None, Option(metavar="DIR", help="folder to create (default: kit next to site.toml)")] = None,
    new_ledger: Annotated[bool, Option("start a ledger for an existing site key")] = False,
) -> None:
    """Create the site's keys and a join request. The private keys never leave the site. An existing site key is
    reused; without its ledger it is refused, because a new ledger would start with the full budget.
    """
    folder = (out or policy).absolute().parent
    _switch_to_owner(folder, *folder.parents)  # the kit does not exist yet: use the owner of its parent folder
    from fedtune.ops.kits.members import describe_next_steps, initialize_site
    from fedtune.show.terminal_tables import say

    say(describe_next_steps(initialize_site(policy, out=out, new_ledger=new_ledger)).rstrip())


@command(app, "check the setup, and print fixes")
def doctor(
    kit: KitFolder,
    policy: PolicyFile,
    overrides: Annotated[tuple[str, ...], Argument("KEY=VALUE", help="settings of a run to check")] = (),
    import_model: Annotated[str | None, Option(_IMPORT, metavar="PATH")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the site's setup: clock, kit, connection, disk, memory, GPU, base models, data, policy, ledger. Prints one
    line per check, with a fix for each failure. Nothing is trained or charged.

      fedtune site doctor --kit kit --site site.toml
      fedtune site doctor --kit kit --site site.toml --import-model ~/MiniLM        install a base model first
      fedtune site doctor --kit kit --site site.toml experiment=banks_intents       would this run be accepted?

    The output contains no records, record counts or paths of data files. Its lines on data sets depend on the records,
    without noise or a charge: do not share them. Exit codes: 0 no check failed, 2 a problem at the site, 3 the run
    would be refused, 1 the server cannot be reached.
    """
    from fedtune.ops.files import act_as_owner

    act_as_owner(kit / "connection_key.pem", kit)
    from fedtune.cli.site_actions import examine_site

    model = Path(import_model) if import_model else None
    examine_site(kit=kit, site_toml=policy, model=model, run=overrides, as_json=as_json)


@command(app, "run the site's process")
def start(
    kit: KitFolder,
    policy: PolicyFile,
    health: Health = None,
    health_anywhere: HealthAnywhere = False,
    metrics: Metrics = None,
    log_level: LogLevel = "info",
) -> None:
    """Run the site's process: poll the server, and answer requests within policy and budget.

    The process opens no port, except with --health and --metrics. It logs JSON lines to stderr. SIGTERM or Ctrl-C
    stops the process after the current round; a second signal stops it immediately, and the round stays charged.

    A new certificate in the kit takes effect within seconds.
    """
    own = _read_own_kit(kit)
    from fedtune.ops.health import Health as Endpoint
    from fedtune.ops.health import serve_health
    from fedtune.ops.logs import configure_logs
    from fedtune.ops.metrics import SiteMetrics, serve_metrics
    from fedtune.ops.services.site_service import SiteService

    configure_logs(log_level)
    endpoint = Endpoint()
    figures = SiteMetrics(kit=own, site_toml=policy, health=endpoint)
    with serve_health(health, endpoint, anywhere=health_anywhere), serve_metrics(metrics, figures.collect_values):
        SiteService(kit=own, site_toml=policy, health=endpoint, answered=figures.record_answer).run()


@command(app, "show the cost of waiting runs, or approve a run")
def approve(
    kit: KitFolder,
    policy: PolicyFile,
    run: Annotated[str | None, Argument("RUN", help="the run to approve (default: list the waiting runs)")] = None,
    yes: Annotated[bool, Option("do not ask")] = False,
    by: By = None,
    ticket: Ticket = None,
    reason: Annotated[str | None, Option("the reason, for ledger and report", metavar="TEXT")] = None,
    as_json: Annotated[bool, Option("without RUN: print JSON", names=("--json",))] = False,
) -> None:
    """List the runs that wait for approval with their costs, or approve a run.

    Required if site.toml contains approval = "manual": the site then does nothing for a run before its approval.
    """
    if run is None:
        _load_site_actions(kit, policy).show_waiting(as_json=as_json)
    elif as_json:
        raise ConfigError("--json", NOT_GIVEN, "cannot be combined with RUN")
    else:
        _load_site_actions(kit, policy).approve(run, yes=yes, by=by, ticket=ticket, reason=reason)


@command(app, "permanently refuse a run, even after its start")
def deny(
    run: Annotated[str, Argument("RUN", help="a run that waits for approval or has started")],
    kit: KitFolder,
    policy: PolicyFile,
    reason: Annotated[str, Option("the reason, stored only in the ledger", metavar="TEXT")],
    by: By = None,
    ticket: Ticket = None,
) -> None:
    """Permanently refuse a run, and record the decision in the ledger. A waiting run is not charged.

    A running run ends at this site only: charged rounds stay charged, no further round is charged, and no reply leaves
    the site, not even for the round in progress. Other runs continue.

    The lead receives only 'denied'; the reason stays at the site. A run with other settings is a new run and needs a
    new approval.
    """
    _load_site_actions(kit, policy).deny(run, reason, by=by, ticket=ticket)


@command(app, "compare the lead's roster with the policy's members")
def members(
    roster: Annotated[Path, Argument("ROSTER", help="the federation's roster.json, which the lead sends on request")],
    kit: KitFolder,
    policy: PolicyFile,
    as_json: AsJson = False,
) -> None:
    """Verify the lead's signature on a roster, and compare its sites with [trust].members in site.toml.

    Nothing is changed. The site's staff choose the partners for secure aggregation in site.toml, after comparing each
    key with the other site directly. The command cannot detect an outdated roster: ask the lead for the roster's
    current number.
    """
    _load_site_actions(kit, policy).show_members(roster, as_json=as_json)


@command(app, "score a final adapter on held-out records")
def score(
    run: KeptRun,
    kit: KitFolder,
    policy: PolicyFile,
    by: Annotated[str | None, Option("also report scores by this column", metavar="COLUMN")] = None,
    smallest: Annotated[int, Option("merge groups with fewer records (or users, for user-level privacy)")] = SMALLEST,
    as_json: AsJson = False,
) -> None:
    """Score a run's final adapter and the base model on this site's held-out records.

    Requires final_adapter = "keep" at the site, and data.heldout_fraction above 0 in the run. The scores are exact
    and only printed: nothing is charged, and nothing leaves the site.
    """
    _load_site_actions(kit, policy).score(run, by=by, smallest=smallest, as_json=as_json)


@command(app, "train a personalized adapter for this site")
def personalize(run: KeptRun, kit: KitFolder, policy: PolicyFile, as_json: AsJson = False) -> None:
    """Train a personalized adapter on this site's records without noise, starting from a run's final adapter.

    Requires final_adapter = "keep". Nothing leaves the site, and nothing is charged. The personalized adapter has no
    guarantee for the site's records: keep its folder, KIT/private_to_SITE/RUN, at the site. No run can start from it.
    """
    _load_site_actions(kit, policy).personalize(run, as_json=as_json)


@command(app, "pause")
def pause(kit: KitFolder) -> None:
    """Pause the site. It answers every request with 'paused' until `fedtune site resume`."""
    _load_site_state(kit).set_paused(True)
    sys.stdout.write("Paused: every request is answered with 'paused'. A round in progress is finished.\n")


@command(app, "resume after a pause")
def resume(kit: KitFolder) -> None:
    """Resume a paused site."""
    _load_site_state(kit).set_paused(False)
    sys.stdout.write("The site takes part again.\n")


@command(app, "leave the federation")
def leave(kit: KitFolder, policy: PolicyFile) -> None:
    """Leave the federation: end all open runs, and prevent the site from starting again.

    The spending stays in the ledger.
    """
    own, state = _read_own_kit(kit), _load_site_state(kit)
    files = own.find_site_files(policy)
    ledger = state.open_ledger(files)
    state.left_file.touch()  # first, so that no run starts during the shutdown
    open_runs = [name for name, run in ledger.history.runs.items() if run.is_open(ledger.history.now())]
    for name in open_runs:
        ledger.end_run(name)
    sys.stdout.write(
        f"{own.site} has left {own.federation}; {pluralize(len(open_runs), 'open run')} ended, and their reserved "
        "budget is released.\nA running `fedtune site start` stops by itself. Ask the lead to revoke the site:\n"
        f"  fedtune provision revoke-site {own.site}\n"
        f"Keep {files.ledger} and {files.site_key}: they document the spending. To rejoin, remove {state.left_file}.\n"
    )


@command(app, "write a backup")
def backup(file: Annotated[Path, Argument("FILE", help="a new file")], kit: KitFolder, policy: PolicyFile) -> None:
    """Back up the policy, the ledger, the kept adapters and the site's state, also while the site is running.

    The backup contains no key. Store site_key.pem separately: with both, anybody could append to the ledger.
    """
    _read_own_kit(kit)
    from fedtune.ops.backup import back_up_site

    back_up_site(file, kit=kit, site_toml=policy)
    sys.stdout.write(f"{file} is written. Keep it, and store the site's key separately.\n")


@command(app, "restore a backup")
def restore(
    file: Annotated[Path, Argument("FILE", help="the file that `fedtune site backup` wrote")],
    kit: KitFolder,
    policy: PolicyFile,
    anchor: Annotated[
        Path | None, Option("the newest anchor (default: the anchor in the policy)", metavar="FILE")
    ] = None,
) -> None:
    """Restore the missing files of a stopped site; the site's key must already exist.

    Existing files are not replaced, except a damaged ledger, which is renamed. The restored ledger is first charged for
    all events that an anchor covers and the backup lacks, so that it never falls behind its anchor.
    """
    _switch_to_owner(kit, *policy.absolute().parents)
    from fedtune.cli.ledger import print_other_policy, print_restored_charge
    from fedtune.ops.backup import find_anchors, restore_site

    files, made_up = restore_site(file, kit=kit, site_toml=policy, anchor=anchor)
    if made_up is None:
        known = files.verify_ledger()
        sys.stdout.write(f"{files.ledger} is intact and was not replaced. All other missing files are restored.\n")
        if known is not None and known.history.policy != files.policy:
            print_other_policy(known.history.cap, time=known.history.policies[-1][0])
        return
    print_restored_charge(made_up, path=files.ledger, anchors=find_anchors(files, anchor))
    sys.stdout.write("Restored. Check it with fedtune site doctor, then start the site.\n")


def _load_site_actions(kit: Path, site: Path) -> SiteActions:
    """Load the site's actions, after dropping root privileges and disabling access to the model hub."""
    own = _read_own_kit(kit)
    from fedtune.cli.site_actions import SiteActions

    return SiteActions(own, site)


def _load_site_state(kit: Path) -> SiteState:
    own = _read_own_kit(kit)
    from fedtune.ops.services.site_state import SiteState

    return SiteState.in_kit(own.folder)


def _read_own_kit(folder: Path) -> Kit:
    """Read the site's kit with the privileges of the account that owns it."""
    _switch_to_owner(folder / "connection_key.pem", folder)
    from fedtune.ops.kits.kit_file import Kit

    return Kit.read(folder, kind="site")


def _switch_to_owner(*paths: Path) -> None:
    """Switch to the account that owns `paths`, and disable access to the model hub."""
    from fedtune.ops.files import act_as_owner

    act_as_owner(*paths)
    # No model file can trigger a download from a hub.  The libraries read the variable on import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.umask(0o077)  # files are readable by this account only

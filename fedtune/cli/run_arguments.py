"""`fedtune run`: its arguments; `run` does the work.  Nothing here is slow to import."""

from __future__ import annotations

import argparse

ACTIONS = ("status", "stop", "resume")

DESCRIPTION = """\
Run a federation over real sites, from a lead's kit.

  fedtune run --kit LEAD experiment=banks_intents sites=[north,south]     only these sites take part
  fedtune run --kit LEAD name=trial federation.min_sites=2                 all sites; a round needs two of them
  fedtune run status runs/trial                                            how far it is, what each site has spent
  fedtune run stop runs/trial                                              stop; what was charged stays charged
  fedtune run stop runs/trial --for-good --kit LEAD                        also tell the sites that it is over
  fedtune run resume runs/trial --kit LEAD                                 go on from its last round

Settings are key=value as for `fedtune simulate`; files, columns and devices are each site's own.
docs/adding_a_site.md says how a site joins.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fedtune run`."""
    parser.add_argument("--kit", metavar="DIR", help="the lead's kit")
    parser.add_argument("--for-good", action="store_true", help="with stop: free what the sites had set aside")
    parser.add_argument("--json", action="store_true", help="with status: for machines")
    words = "settings to change; or status, stop or resume, and a run folder"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=words)

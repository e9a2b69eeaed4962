"""`fedtune audit`: its arguments; `audit_command` does the work.  Nothing here is slow to import."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Attack a run on this machine, and compare what the attack shows with the epsilon that the run claims.

Made-up records (canaries) are put into the training data, each by a coin of its own; whoever sees what training
releases then guesses which were in.  The share of right guesses gives a lower bound on epsilon.  Bounds that refute
the claim end with exit code 1: the implementation or the claim is wrong.

  fedtune audit experiment=debug audit.canaries=1000         canaries of 1,000 clip norms; every noisy step is seen
  fedtune audit experiment=debug audit.kind=records          made-up texts; only the final model is seen
  fedtune audit experiment=debug audit.kind=sensitivity      no run: how far can one record move a step's sum?
  fedtune audit privacy.epsilon=3 "audit.sites=[bank-a]" audit.guesses=100

  audit.kind        gradient, records or sensitivity          audit.canaries    at each site (1000)
  audit.guesses     made about them; default: all             audit.confidence  of each bound (0.95)
  audit.sites       that get canaries; default: all           audit.never_used  share kept to compare with (0.3)
  audit.tries       cases of a search for sensitivity (200)

Other overrides are those of `fedtune simulate`.  The run folder is marked, since its adapter holds canaries; real sites
and ledgers that are kept are never audited.  docs/audit.md says what each figure means.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fedtune audit`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")

"""`fedtune audit`: attack a run on this machine, and compare the result with its guarantee."""

from __future__ import annotations

from fedtune.cli.command import AsJson, Overrides


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
    from fedtune.cli.attacked_run import attack_run  # Hydra and the accountants take seconds to import

    attack_run(overrides, as_json=as_json)

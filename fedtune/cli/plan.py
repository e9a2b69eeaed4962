"""`fedtune plan`: forecast of a run's privacy cost, bytes and time without reading data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fedtune.cli.command import Option, Overrides, Target, pause_garbage_collection


def plan(
    overrides: Overrides = (),
    target: Annotated[
        Target | None, Option("quantity to solve for, given privacy.epsilon and the other settings")
    ] = None,
    policy: Annotated[
        tuple[Path, ...], Option(metavar="FILE", help="check the plan against this site.toml; may be repeated")
    ] = (),
    lead: Annotated[
        str | None, Option(metavar="HEX", help="your public key (default: the first that each policy allows)")
    ] = None,
    time: Annotated[
        bool, Option("load the model to forecast bytes and time on this machine, and print its hash")
    ] = False,
    trials: Annotated[int | None, Option("also show the cost of a search over K runs like this", metavar="K")] = None,
    as_json: Annotated[bool, Option(names=("--json",), help="print JSON instead of text")] = False,
) -> None:
    """Forecast a run without reading data: noise, steps, epsilon by site and round, decisions of site policies, and
    alternative plans; with --time also bytes and time.

    Overrides are those of `fedtune simulate`:
      fedtune plan                                       the default experiment
      fedtune plan experiment=debug privacy.epsilon=3
      fedtune plan tickets.yaml --epsilon 3              short for experiment=tickets.yaml privacy.epsilon=3
      fedtune plan --target noise federation.num_rounds=40
      fedtune plan --target rounds privacy.noise_multiplier=1.5
      fedtune plan --target sampling_rate privacy.noise_multiplier=1.5
      fedtune plan --trials 12                           the cost of a search with twelve trials
      fedtune plan --policy bank-a/site.toml --policy bank-b/site.toml
    docs/planning.md explains every figure.
    """
    with pause_garbage_collection():
        from fedtune.cli.outlook import print_outlook  # Hydra and the accountants take seconds to import

    print_outlook(overrides, target, policies=policy, lead=lead, time=time, trials=trials, as_json=as_json)

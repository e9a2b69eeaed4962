"""`fedtune simulate`: a simulated federation, or a sweep of simulations, on this machine."""

from __future__ import annotations

from typing import Annotated

from fedtune.cli.command import AsJson, Multirun, Option, Overrides, Renew


def simulate(
    overrides: Overrides = (),
    multirun: Multirun = False,
    renew: Renew = None,
    verbose: Annotated[bool, Option("tracking.log_level=debug: also explain the final figures")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate a federation on this machine.

    Overrides are key=value in Hydra's grammar:
      fedtune simulate                                   four banks, Banking77, epsilon 8
      fedtune simulate experiment=debug                  a tiny random model; takes seconds
      fedtune simulate tickets.yaml --epsilon 3          short for experiment=tickets.yaml privacy.epsilon=3
      fedtune simulate privacy.epsilon=3 name=tighter
      fedtune simulate privacy=none                      no privacy, for comparison
      fedtune simulate public.train_file=public.csv      start with a public stage on the lead's records
      fedtune simulate -m privacy.epsilon=1,3,8          one run per value, with a table and a CSV file
      fedtune simulate resume=runs/tighter               continue after Ctrl-C or a crash
      fedtune simulate --renew runs/spring name=autumn       continue training with new records
    docs/configuration.md lists all keys.
    """
    # Hydra and the accountants take more than a second to import, and --help needs none of them.
    from rich.console import Console

    from fedtune.api.compose import compose_run, quote_word
    from fedtune.api.public import require_simulation
    from fedtune.cli.interruptible_run import (
        run_displayed_public_stage,
        run_simulation,
        run_with_summary,
        show_several_runs,
    )
    from fedtune.lab.studies.trials import Trials
    from fedtune.runs.run_paths import find_run_folder
    from fedtune.show.terminal_tables import print_json
    from fedtune.sites.run_cache import RunCache

    console = Console(stderr=as_json)
    overrides = overrides if renew is None else (*overrides, f"renew={quote_word(str(renew))}")
    overrides = (*overrides, "tracking.log_level=debug") if verbose else overrides
    trials = Trials.from_sweep(overrides) if multirun else None
    runs = [trial.config for trial in trials.rows.values()] if trials else [compose_run(overrides)]
    for config in runs:
        require_simulation(config)
    if trials and len(runs) > 1:
        again = ["simulate", "-m", *trials.again]
        with show_several_runs(trials, console, again=again, as_json=as_json), RunCache() as cache:
            trials.run(lambda trial: run_with_summary(trial, console=console, name=trial.folder.name, cache=cache))
        return
    config = run_displayed_public_stage(runs[0], console, again=["simulate", *overrides])
    folder = find_run_folder(config)
    result = run_simulation(config, folder, console)
    if as_json:
        print_json({"runs": [{"folder": str(folder), "result": result}]})

"""`fedtune search`: hyperparameter search with the total privacy cost checked against the budgets in advance."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console

from fedtune.cli.command import AsJson, Option, Overrides, build_resume_command
from fedtune.cli.interruptible_run import run_with_summary, show_trials
from fedtune.formatting import convert_to_jsonable
from fedtune.lab.studies.trial_search import Method, Search, build_cost_section
from fedtune.lab.studies.trials import SearchTrial, Trials
from fedtune.runs.results import RunResult
from fedtune.show.terminal_tables import print_json, say, show
from fedtune.sites.run_cache import RunCache


def search(
    overrides: Overrides = (),
    method: Annotated[Method, Option("every combination, random draws, or draws guided by earlier scores")] = "random",
    trials: Annotated[int | None, Option("number of runs (ignored for a grid)", metavar="K")] = None,
    as_json: AsJson = False,
) -> None:
    """Search for the settings with the best score on data.validation_file, on this machine.

    The search space consists of all settings with several values: comma-separated values, interval(LOW,HIGH),
    log(LOW,HIGH) for a log scale, or int(...) around these for integers. Other settings are those of `fedtune
    simulate`:
      fedtune search experiment=banks_intents name=s training.learning_rate='log(0.001,0.1)' --trials 8
      fedtune search experiment=banks_intents name=s lora.rank=4,8 lora.alpha=8,16 --method grid
      fedtune search experiment=banks_intents name=s training.learning_rate='log(0.001,0.1)' --trials 8 --method tpe
    Every trial is charged to the same ledgers. The total cost is printed before the first trial. No trial starts if
    the budget of a site in runtime.sites_dir is too small (fedtune plan --trials 8 only prints the cost). Repeat the
    same command to resume the search. See docs/planning.md for the guarantee.
    """
    console = Console(stderr=as_json)
    found = Search.from_overrides(overrides, method, trials=trials)
    show([build_cost_section(found.price, seeded_noise=found.asked.runtime.seeded_noise)], console=console)
    found.check_room()
    options = [f"--method={method}", *([] if trials is None else [f"--trials={trials}"])]
    again = build_resume_command("search", *overrides, name=found.asked.name, options=options)
    tried = Trials(found.folder / "trials.csv", fewest=1)
    try:
        with RunCache() as cache:

            def run_trial(trial: SearchTrial) -> RunResult:
                values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
                say(f"\ntrial {len(tried.rows) + 1} of {found.number}: {values}", style="bold", console=console)
                return run_with_summary(trial, console=console, name=trial.folder.name, cache=cache)

            found.run(tried, run_trial)
    finally:
        if as_json:
            print_json(tried.to_json() | {"cost": convert_to_jsonable(found.price)})
        elif tried.rows:
            show_trials(console, tried, again=again)
    if (best := tried.best) is not None:
        say(found.describe_selection(best), console=console)
        return
    say("No trial was selected, because no trial has a score.", console=console)
    tried.raise_first_error()

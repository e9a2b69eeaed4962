"""`fedtune personalize`: a site's personalized adapter, trained from a simulated run's final adapter without noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Annotated

from rich.console import Console

from fedtune.api import public
from fedtune.cli.command import Argument, AsJson, print_answer
from fedtune.cli.finished_run import Device, Run, load_finished_run
from fedtune.lab.studies import personalized
from fedtune.lab.studies.personalized import Personalized, sections, to_json


def personalize(
    run: Run,
    sites: Annotated[tuple[str, ...], Argument("SITE", help="sites of the run (default: all)")] = (),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train personalized adapters for simulated sites, from the run's final adapter and without noise.

      fedtune personalize runs/banks            RUN/private_to_SITE/ of each site, and scores beside the others
      fedtune personalize runs/banks bank_2     of one

    Records that the site holds out determine the learning rate and the stopping point. The result is private to the
    site and has no guarantee: no run starts from it, and `fedtune export` requires --private. The commands
    generate, chat, evaluate and compare accept its folder. For a real site, use `fedtune site personalize`. Nothing
    is charged. See docs/own_adapter.md.
    """
    config, adapter = load_finished_run(run, device=device)
    finished = public.Run(folder=adapter.absolute().parent, config=config)
    print_personalization(partial(personalized.personalize, finished, sites), as_json=as_json)


@contextmanager
def show_progress() -> Iterator[Callable[[public.Progress], None]]:
    """A line on the terminal that says how far scoring, or the training of own adapters, is."""
    with Console(stderr=True).status("Loading ...") as status:
        yield lambda told: status.update(f"{told.stage} ({told.done} of {told.total})" if told.total else told.stage)


def print_personalization(make: Callable[..., Mapping[str, Personalized]], *, as_json: bool) -> None:
    """Train personalized adapters with `make`, and print their comparison with the other models."""
    with show_progress() as progress:
        made = make(progress=progress)
    print_answer(to_json(made), sections(made), as_json=as_json)

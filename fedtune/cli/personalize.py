"""`fedtune personalize`: personalized adapters of a simulated run's sites, trained without noise."""

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
from fedtune.lab.studies.personalized import Personalized, build_personalized_sections, convert_personalized_to_json


def personalize(
    run: Run,
    sites: Annotated[tuple[str, ...], Argument("SITE", help="sites of the run (default: all)")] = (),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train personalized adapters for simulated sites without noise, starting from the run's final adapter.

      fedtune personalize runs/banks            all sites: adapters in RUN/private_to_SITE/, and a comparison
      fedtune personalize runs/banks bank_2     one site

    The site's held-out records select the learning rate and the stopping point. A personalized adapter is private to
    its site and has no guarantee: no run can start from it, and `fedtune export` requires --private. The commands
    generate, chat, evaluate and compare accept its folder. For a real site, use `fedtune site personalize`. Nothing
    is charged. See docs/adapters.md.
    """
    config, adapter = load_finished_run(run, device=device)
    finished = public.Run(folder=adapter.absolute().parent, config=config)
    print_personalization(partial(personalized.personalize, finished, sites), as_json=as_json)


@contextmanager
def show_progress() -> Iterator[Callable[[public.Progress], None]]:
    """Display a progress line on the terminal, and yield the callback that updates it."""
    with Console(stderr=True).status("Loading ...") as status:
        yield lambda told: status.update(f"{told.stage} ({told.done} of {told.total})" if told.total else told.stage)


def print_personalization(make: Callable[..., Mapping[str, Personalized]], *, as_json: bool) -> None:
    """Train personalized adapters with `make`, and print a comparison with the other models."""
    with show_progress() as progress:
        made = make(progress=progress)
    print_answer(convert_personalized_to_json(made), build_personalized_sections(made), as_json=as_json)

"""`fedtune plan`: what a run will cost in privacy, bytes and time, before any data is touched."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedtune.cli.compose import compose_run
from fedtune.cli.plan_outlook import Outlook
from fedtune.config import RunConfig
from fedtune.federation import planner, verdict
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.plan import Plan
from fedtune.privacy.policy_file import read_policy
from fedtune.spec import ConfigError

if TYPE_CHECKING:
    from fedtune.federation.forecast import Forecast

TARGETS = ("noise", "rounds", "sampling_rate")
FORMATS = (".html", ".svg", ".json")

DESCRIPTION = """\
Show what a run will cost before any data is touched: noise, steps, epsilon by site and round, bytes and time, what
sites' policies would say, and what other plans would cost.  Overrides are those of `fedtune simulate`, for instance
  fedtune plan                                       the default experiment
  fedtune plan experiment=debug privacy.epsilon=3
  fedtune plan --target noise federation.num_rounds=40
  fedtune plan --target rounds privacy.noise_multiplier=1.5
  fedtune plan --target sampling_rate privacy.noise_multiplier=1.5
  fedtune plan --policy bank-a/site.toml --policy bank-b/site.toml --output plan.html
docs/planning.md explains every figure.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fedtune plan`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--target", choices=TARGETS, help="solve for this, from privacy.epsilon and the rest")
    parser.add_argument(
        "--policy", action="append", default=[], metavar="FILE", help="a site.toml to ask; may be repeated"
    )
    parser.add_argument("--lead", metavar="HEX", help="your public key (default: the first that each policy allows)")
    parser.add_argument("--no-model", action="store_true", help="load no model: leaves out bytes and time")
    parser.add_argument("--output", metavar="FILE", help="also write FILE.html, FILE.svg (the chart) or FILE.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def plan(options: argparse.Namespace) -> None:
    """Print, and write where asked, everything about a run's price.

    Raises:
        ConfigError: for the settings, a policy file or an option.
    """
    output = None if options.output is None else Path(options.output)
    if output is not None and output.suffix not in FORMATS:
        raise ConfigError("--output", options.output, f"must end in {', '.join(FORMATS)}")
    if options.lead is not None:
        check_public_key("--lead", options.lead)
    policies = [Path(path) for path in options.policy]
    leads = [options.lead or _first_lead(path) for path in policies]
    with Console(stderr=True).status("Working out the price ..."):
        outlook = _outlook(options, policies, leads)
    if output is not None:
        _write(output, outlook)  # first: whoever reads standard output may stop in the middle
    if options.json:
        sys.stdout.write(json.dumps(outlook.to_json(), indent=2) + "\n")
        return
    from fedtune.cli.plan_text import show

    console = Console()
    show(console, outlook)
    if output is not None:
        console.print(f"written: {output}", soft_wrap=True, highlight=False)


def _outlook(options: argparse.Namespace, policies: Sequence[Path], leads: Sequence[str]) -> Outlook:
    config, planned = _planned(options.overrides, options.target)
    sizes = config.declared_sizes()
    price = planner.price(planned, sizes)
    # What a given noise comes to is kept; a calibrated one leaves a hair of what was asked for.
    given = config.privacy.noise_multiplier is not None or options.target in ("rounds", "sampling_rate")
    epsilon = planner.coarse_epsilon(planned) if given and planned.private else config.privacy.epsilon
    forecast, device = (None, "") if options.no_model else _forecast(config, planned)
    return Outlook(
        config=config,
        price=price,
        solved=options.target,
        epsilon=epsilon,
        changes=planner.what_if(planned, epsilon=epsilon) if planned.private else (),
        forecast=forecast,
        device=device,
        verdicts=tuple(
            verdict.ask(path, config.proposal(lead=lead, plan=planned), declared_sizes=sizes)
            for path, lead in zip(policies, leads, strict=True)
        ),
        lead_assumed=options.lead is None,
        model_sha256=_model_sha256(config, load=not options.no_model),
    )


def _planned(overrides: Sequence[str], target: str | None) -> tuple[RunConfig, Plan]:
    """The run's settings, and its plan with what was solved for."""
    if target is None:
        config = compose_run(overrides)
        return config, config.plan()
    config = compose_run([*overrides, "privacy.noise_multiplier=null"])
    epsilon = config.privacy.epsilon
    if not config.privacy.private:
        raise ConfigError("--target", target, "needs a run with privacy")
    if target == "noise":
        return config, config.plan()
    # Read with an epsilon that every noise keeps within: how much the noise allows is what is asked.
    noise = compose_run([*overrides, "privacy.epsilon=1.0e9"]).privacy.noise_multiplier
    if noise is None:
        raise ConfigError("privacy.noise_multiplier", None, f"must be given to solve for {target}")
    known = Plan.of(
        dataclasses.replace(config.privacy, noise_multiplier=noise),
        local_steps=config.training.local_steps,
        num_rounds=config.federation.num_rounds,
        spare_rounds=config.federation.spare_rounds,
    )
    if target == "rounds":
        return config, planner.solve_rounds(known, epsilon=epsilon)
    one_record = 1 / max(config.declared_sizes().values())  # a smaller rate would leave most batches empty
    return config, planner.solve_sampling_rate(known, epsilon=epsilon, least=one_record)


def _first_lead(path: Path) -> str:
    """The lead to ask a policy for when none was given."""
    return next(iter(read_policy(path).allow.leads), "nobody")


def _model_sha256(config: RunConfig, *, load: bool) -> str | None:
    """The hash by which sites know the base model: as the settings pin it, or else that of its files."""
    if config.model.sha256 is not None or not load:
        return config.model.sha256
    from fedtune.model.base import model_sha256  # transformers takes seconds to import

    return model_sha256(config.model)


def _forecast(config: RunConfig, plan: Plan) -> tuple[Forecast, str]:
    """Bytes and time, and the kind of device that they hold for."""
    # Here, because torch and transformers take seconds to import, and a mistake should not wait for them.
    from fedtune.federation.forecast import forecast
    from fedtune.tasks import build_task_model
    from fedtune.training.machine import device_for, ready_model

    runtime, length = config.runtime, config.data.max_length
    # A plan for a GPU can be made on a machine without one.
    device = device_for(runtime.device, must_exist=False)
    model = ready_model(lambda: build_task_model(config.task_model(), device=device), runtime, max_length=length)
    sizes = config.declared_sizes()
    return forecast(plan, model, declared_sizes=sizes, max_length=length, runtime=runtime), device.type


def _write(path: Path, outlook: Outlook) -> None:
    """Write the page, the chart or the data, as the file's ending says."""
    from fedtune.cli.plan_page import chart_svg, page_html

    if path.suffix == ".json":
        text = json.dumps(outlook.to_json(), indent=2) + "\n"
    else:
        text = chart_svg(outlook) if path.suffix == ".svg" else page_html(outlook)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--output", str(path), f"must be a file that can be written ({error.strerror})") from None

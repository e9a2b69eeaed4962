"""`fedtune plan`: what a run will cost in privacy, bytes and time, before any data is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console

from fedtune.api.compose import compose_run
from fedtune.cli.command import Option, Overrides
from fedtune.cli.plan_sections import Outlook, show_outlook
from fedtune.config import RunConfig, parse, with_secure_sums
from fedtune.federation import planner, verdict
from fedtune.privacy.keys import check_public_key
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.run_plan import Plan
from fedtune.privacy.selection import price_of
from fedtune.show.terminal_tables import print_json, show
from fedtune.spec import ConfigError
from fedtune.studies.trial_search import check_trials, price_section
from fedtune.words import jsonable

if TYPE_CHECKING:
    from fedtune.runs.forecast import Forecast

Target = Literal["noise", "rounds", "sampling_rate"]
Compose = Callable[[Sequence[str]], RunConfig]


def plan(
    overrides: Overrides = (),
    target: Annotated[Target | None, Option("solve for this, from privacy.epsilon and the rest")] = None,
    policy: Annotated[
        tuple[Path, ...], Option(metavar="FILE", help="check the plan against this site.toml; may be repeated")
    ] = (),
    lead: Annotated[
        str | None, Option(metavar="HEX", help="your public key (default: the first that each policy allows)")
    ] = None,
    time: Annotated[bool, Option("load the model; show bytes, time on this machine and its hash")] = False,
    trials: Annotated[int | None, Option("also the price of a search over K runs like this", metavar="K")] = None,
    as_json: Annotated[bool, Option(names=("--json",), help="print JSON instead of text")] = False,
) -> None:
    """Show what a run will cost before any data is touched: noise, steps, epsilon by site and round, what sites'
    policies would say, and what other plans would cost; with --time also bytes and time.

    Overrides are those of `fedtune simulate`, for instance
      fedtune plan                                       the default experiment
      fedtune plan experiment=debug privacy.epsilon=3
      fedtune plan --target noise federation.num_rounds=40
      fedtune plan --target rounds privacy.noise_multiplier=1.5
      fedtune plan --target sampling_rate privacy.noise_multiplier=1.5
      fedtune plan --trials 12                           the price of the best of twelve
      fedtune plan --policy bank-a/site.toml --policy bank-b/site.toml
    docs/planning.md explains every figure.
    """
    if trials is not None:
        check_trials(trials)
    if lead is not None:
        check_public_key("--lead", lead)
    # Without --lead, each policy is asked on behalf of the first lead that it allows.
    leads = {path: lead or next(iter(read_policy(path).allow.leads), "nobody") for path in policy}
    with Console(stderr=True).status("Working out the price ..."):
        compose = partial(compose_run, for_real_sites=bool(policy))
        config, planned = _planned(compose, overrides, target)
        # A given noise has its own epsilon; a calibrated one is just below its target, so the target itself is used.
        given = config.privacy.noise_multiplier is not None or target in ("rounds", "sampling_rate")
        epsilon = planner.target_epsilon(planned) if given and planned.private else config.privacy.epsilon
        forecast, device = _forecast(config, planned) if time else (None, "")
        # Sites identify the base model by this hash: the one pinned in the settings, or else that of its files.
        sha256, sizes = config.model.sha256, config.declared_sizes()
        if sha256 is None and time:
            from fedtune.model.base_model import model_sha256  # transformers takes seconds to import

            sha256 = model_sha256(config.model)
        outlook = Outlook(
            config=config,
            price=planner.price(planned, sizes, before=config.federation.renewal),
            solved=target,
            epsilon=epsilon,
            changes=planner.what_if(planned, epsilon=epsilon) if planned.private else (),
            forecast=forecast,
            device=device,
            verdicts=tuple(
                verdict.ask(
                    path,
                    config.proposal(lead=asks, plan=planned),
                    declared_sizes=sizes,
                    find_most_epsilon=planned.private,
                )
                for path, asks in leads.items()
            ),
            lead_assumed=lead is None,
            model_sha256=sha256,
            secure_sums=_secure_sums(config, planned, epsilon),
        )
        searched = None if trials is None else price_of([planned] * trials)
    figures = outlook.to_json() | ({} if searched is None else {"search": jsonable(searched)})
    if as_json:
        print_json(figures)
        return
    show_outlook(Console(), outlook)
    if searched is not None:
        show([price_section(searched, seeded_noise=config.runtime.seeded_noise)])


def _secure_sums(config: RunConfig, planned: Plan, epsilon: float) -> Plan | None:
    """The plan of secure sums in place of a plain run; None: they are planned, or the settings exclude them."""
    if not planned.private or planned.shared is not None:
        return None
    settings = config.to_json()
    settings["privacy"] |= {"noise_multiplier": None, "epsilon": epsilon, "sampling_rate": planned.sampling_rate}
    settings["federation"] |= {"num_rounds": planned.num_rounds}
    try:
        return parse(with_secure_sums(settings)).plan()
    except ConfigError:
        return None


def _planned(compose: Compose, overrides: Sequence[str], target: Target | None) -> tuple[RunConfig, Plan]:
    if target is None:
        config = compose(overrides)
        return config, config.plan()
    config = compose([*overrides, "privacy.noise_multiplier=null"])
    epsilon = config.privacy.epsilon
    if not config.privacy.private:
        raise ConfigError("--target", target, "needs a run with privacy")
    if target == "noise":
        return config, config.plan()
    # The noise is what is given here, so it is read beside an epsilon that every noise satisfies.  The same epsilon is
    # refused if no noise is given, which the message below then says.
    try:
        known = compose([*overrides, "privacy.epsilon=1.0e9"]).plan()
    except ConfigError as error:
        if error.key != "privacy.epsilon":
            raise
        raise ConfigError("privacy.noise_multiplier", None, f"must be given to solve for {target}") from None
    if target == "rounds":
        return config, planner.solve_rounds(known, epsilon=epsilon)
    one_record = 1 / max(config.declared_sizes().values())  # a smaller rate would leave most batches empty
    return config, planner.solve_sampling_rate(known, epsilon=epsilon, least=one_record)


def _forecast(config: RunConfig, plan: Plan) -> tuple[Forecast, str]:
    """Bytes and time, and the kind of device that they hold for."""
    # Imported here, because torch and transformers take seconds, and a typing mistake should not wait for them.
    from fedtune.ops.round_bytes import round_bytes
    from fedtune.runs.forecast import forecast
    from fedtune.tasks.task_model import build_task_model
    from fedtune.training.machine import device_for, ready_model

    runtime, length = config.runtime, config.data.max_length
    # A plan for a GPU can be made on a machine without one.
    device = device_for(runtime.device, must_exist=False)
    model = ready_model(lambda: build_task_model(config.task_model(), device=device), runtime, max_length=length)
    sizes, traffic = config.declared_sizes(), round_bytes(config, plan, model)
    made = forecast(plan, model, declared_sizes=sizes, max_length=length, runtime=runtime, traffic=traffic)
    return made, device.type

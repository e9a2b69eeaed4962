"""By user, or by record with group privacy on top: which trains better at one promise to a person?

    python simulations/user_level/run.py                    all lines, into results.json and the README's table
    python simulations/user_level/run.py --accounting       noise and epsilons alone, a few minutes; trains nothing
    ... --only, --missing, --runs, --into                   as for simulations/study.py

Every line promises a person the same (epsilon, delta) at their site, over all of their records there:

user        privacy.unit=user: a user's mean gradient is clipped, and noise is calibrated to epsilon as always.
formula     by record: at most k records of each user are in the data, and noise is calibrated so that the formula of
            group privacy, (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)), comes to the promise.
exact       the same with the least noise for which it is true: the k records join a step one by one, so that their
            number there is binomial, and the sum moves by that many clip norms at most (a mixture of Gaussians; Charles
            et al. 2024, arXiv 2407.07737, section 3).

Beside them stands what people tend to do, `record`: noise for epsilon by record, which promises a person little; and
`none`, without privacy (`none-record`: on the records that the lines by record have).  Rate, steps, model and learning
rate are alike in all lines, and so is the number of records in a step where everybody has k of them.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme
import study

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.data import Record, group_by_user
from fedtune.data.load import derive_split_key, partition_training_files
from fedtune.data.partition import hash_unit
from fedtune.privacy import accountant, events
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.derive.profile import apply_group_privacy

FOLDER = Path(__file__).parent
TITLES = {
    "none": "no privacy",
    "none-record": "no privacy, at most 8 records of a user",
    "record": "by record, epsilon for a record only",
    "formula": "by record, group privacy by the formula",
    "exact": "by record, group privacy by exact accounting",
    "user": "by user",
}


def group_epsilon(noise: float, *, rate: float, steps: int, delta: float, members: int) -> float:
    """Epsilon for `members` records of one person, sampled one by one: an upper bound by PLD."""
    shares = [math.comb(members, n) * rate**n * (1 - rate) ** (members - n) for n in range(members + 1)]
    counts = [float(n) for n in range(members + 1)]
    step = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(noise, counts, shares)
    pld = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=2e-3)
    pld.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(pld.get_epsilon(delta))


@lru_cache(maxsize=16)
def noise_by_formula(epsilon: float, *, rate: float, steps: int, delta: float, members: int) -> float:
    """The noise at which the formula of group privacy comes to (epsilon, delta)."""
    each = epsilon / members
    delta_each = delta * math.expm1(each) / math.expm1(epsilon)
    assert apply_group_privacy(each, delta_each, members=members)[1] <= delta * (1 + 1e-9)
    return accountant.calibrate_noise(epsilon=each, delta=delta_each, sampling_rate=rate, steps=steps, also=[])


@lru_cache(maxsize=16)
def noise_by_exact(epsilon: float, *, rate: float, steps: int, delta: float, members: int) -> float:
    """The least noise, to one per cent, at which the exact figure for `members` records is within epsilon."""
    low, high = 0.3, noise_by_formula(epsilon, rate=rate, steps=steps, delta=delta, members=members) * members
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        within = group_epsilon(middle, rate=rate, steps=steps, delta=delta, members=members) <= epsilon
        low, high = (low, middle) if within else (middle, high)
    return round(high, 4)


def lines_of(asked: dict[str, Any], data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each line of one data set: key, kind, noise, and what is promised."""
    delta, members = asked["delta"], asked["records_per_user"]
    base = [f"experiment={asked['experiment']}", "tracking=quiet", "name=x", *data["overrides"]]
    config = compose_run([*base, f"privacy.delta={delta}", f"privacy.records_per_user={members}"])
    plan = config.plan()
    public = {"rate": plan.sampling_rate, "steps": plan.local_steps * plan.max_rounds, "delta": delta}
    people = config.data.list_site_sizes(config.federation.num_sites)

    def on_average(kind: str, noise: float) -> float:
        """Noise on the mean gradient of all sites' step, in clip norms."""
        declared = people if kind == "user" else data["declared_records"]
        return noise * math.sqrt(len(declared)) / (public["rate"] * sum(declared))

    for kind in ("none", "none-record"):
        yield {"key": f"{data['key']}-{kind}", "kind": kind, "noise": 0.0, "noise_on_mean": 0.0, "config": config}
    for target in asked["epsilons"]:
        by_unit = accountant.calibrate_noise(
            epsilon=target, delta=delta, sampling_rate=public["rate"], steps=public["steps"], also=[]
        )
        noises = {
            "user": by_unit,
            "exact": noise_by_exact(target, members=members, **public),
            "formula": noise_by_formula(target, members=members, **public),
            "record": by_unit,
        }
        for kind, noise in noises.items():
            line = {"key": f"{data['key']}-e{target:g}-{kind}", "kind": kind, "noise": noise, "target": target}
            line["noise_on_mean"] = on_average(kind, noise)
            yield line | {"config": config} | promised(kind, noise, members=members, **public)


@lru_cache(maxsize=32)
def promised(kind: str, noise: float, *, rate: float, steps: int, delta: float, members: int) -> dict[str, Any]:
    """Epsilon at delta for one unit, and for a person by the formula and exactly; None: the formula says nothing."""
    event = events.build_dp_sgd_event(sampling_rate=rate, noise_multiplier=noise, steps=steps)
    each = accountant.epsilon_pld([event], delta)
    if kind == "user":
        return {"epsilon_unit": each, "epsilon_person": each, "epsilon_person_formula": each}
    return {
        "epsilon_unit": each,
        "epsilon_person": group_epsilon(noise, rate=rate, steps=steps, delta=delta, members=members),
        "epsilon_person_formula": by_formula(event, delta=delta, members=members),
    }


def by_formula(event: dp_accounting.DpEvent, *, delta: float, members: int) -> float | None:
    """The least epsilon that the formula gives a person at delta, over a record's whole privacy profile."""
    pld = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4)
    pld.compose(event)
    found = []
    for number in range(1, 2000):
        delta_each = delta * 10 ** (-number / 100)
        epsilon, compute_all_gradients = apply_group_privacy(
            float(pld.get_epsilon(delta_each)), delta_each, members=members
        )
        if compute_all_gradients <= delta:
            found.append(epsilon)
    return min(found, default=None)


def capped(config: RunConfig, into: Path, *, members: int, declared: list[int]) -> list[str]:
    """Write a file with at most so many records of each user, who stay whole at one site; returns the overrides for it.

    Which ones: those with the smallest keyed hashes, so that it is a matter of that user's records alone.
    """
    key = derive_split_key(config.seed)
    columns = config.bound_task.columns(config.data, partition=True, unit="user")
    sites = partition_training_files(config.data, columns, config.federation.names, seed=config.seed, unit="user").sites
    rows = []
    for number, site in enumerate(sites):
        for places in group_by_user(site.training):
            records: list[Record] = sorted(
                (site.training[place] for place in places),
                key=lambda record: hash_unit(record, purpose="cap", key=key),
            )
            rows += [{"text": record.fields["completion"], "site": f"s{number}"} for record in records[:members]]
    into.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.train_file='{into}'",
        "+data.columns.site=site",
        "data.partition.kind=column",
        *(f"+data.partition.sites.s{number}={number}" for number in range(len(sites))),
        f"data.declared_sizes={declared}",
        "privacy.unit=record",
    ]


def overrides_of(line: dict[str, Any], asked: dict[str, Any], data: dict[str, Any], runs: Path) -> list[str]:
    """Of one line's run."""
    members = asked["records_per_user"]
    common = [*data["overrides"], f"privacy.delta={asked['delta']}", f"privacy.records_per_user={members}"]
    without = ["privacy=none", f"privacy.sampling_rate={line['config'].privacy.sampling_rate}"]
    if line["kind"] == "none":
        return [*common, *without, "privacy.unit=user"]
    # Noise is given: the run states the epsilon of its own unit at a delta that suits their number, and may.
    noise = [f"privacy.noise_multiplier={line['noise']}", "privacy.epsilon=100"]
    if line["kind"] == "user":
        return [*common, *noise]
    into = runs / f"{line['key']}.jsonl"
    by_record = capped(line["config"], into, members=members, declared=data["declared_records"])
    if line["kind"] == "none-record":
        return [*common, *without, *by_record]
    return [*common, *noise, *by_record, f"privacy.delta={asked['delta'] / 10}"]


def done(
    runs: Path, *, line: dict[str, Any], asked: dict[str, Any], data: dict[str, Any], known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Noise and promises of a line, and its run; given the known lines, it trains nothing and keeps their runs."""
    target = f", epsilon {line['target']:g}" if "target" in line else ""
    found = {key: value for key, value in line.items() if key != "config"}
    found["title"] = f"{data['title']}: {TITLES[line['kind']]}{target}"
    if known is not None:
        return found | {name: ran for name, ran in known.get(line["key"], {}).items() if name == "run"}
    own = {"key": line["key"], "title": found["title"], "overrides": overrides_of(line, asked, data, runs)}
    ran = study.run_line(runs, experiment=asked["experiment"], line=own, states=runs / f"{data['key']}.pt")
    ran["overrides"] = [one.replace(str(runs), "{runs}") for one in ran["overrides"]]
    return {**found, "run": ran}


def table(lines: Mapping[str, Any]) -> str:
    """The Markdown table of the study."""
    heads = ["", "noise", "on the mean", "epsilon of the unit", "of a person, formula", "of a person"]
    rows = [[*heads, "perplexity", "before", "seconds"]]
    for line in lines.values():
        figures = [line.get("epsilon_unit"), line.get("epsilon_person_formula"), line.get("epsilon_person")]
        shown = ["-" if figure is None else format_epsilon(figure) for figure in figures]
        if "target" not in line:
            shown = ["unbounded"] * 3
        scores = ["", "", ""]
        if ran := line.get("run"):
            before, after = ran["before"]["perplexity"], ran["metrics"]["perplexity"]
            scores = [f"{after:.1f}", f"{before:.1f}", f"{ran['seconds']:.0f}"]
        rows.append([line["title"], f"{line['noise']:.3g}", f"{line['noise_on_mean']:.2g}", *shown, *scores])
    return readme.markdown(rows)


def main() -> None:
    options = study.parser(__doc__, FOLDER)
    options.add_argument("--accounting", action="store_true", help="noise and epsilons alone")
    given = options.parse_args()
    asked = tomllib.loads((FOLDER / "study.toml").read_text())
    known = study.known_lines(given.into / "results.json") if given.accounting else None
    lines = {
        line["key"]: partial(done, line=line, asked=asked, data=data, known=known)
        for data in asked["data"]
        for line in lines_of(asked, data)
    }
    study.carry_out(__file__, lines, table, asked=given, about={"experiment": asked["experiment"]})


if __name__ == "__main__":
    main()

"""Training of personalized adapters, and their comparison with base, shared and local-only models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedtune.api.public import Callback, Run, ignore_progress, make_stage_callback
from fedtune.config import RunConfig
from fedtune.evaluation.bootstrap import NO_DIFFERENCE
from fedtune.formatting import format_score_name, pluralize
from fedtune.lab.studies.comparison import format_with_interval
from fedtune.show.terminal_tables import Section
from fedtune.spec import ConfigError, check_one_of

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.api.compared_models import ComparedModels
    from fedtune.lab.personalization import Parts

OWN, SHARED, ALONE = "own", "shared", "alone"


@dataclass(frozen=True, kw_only=True)
class Personalized:
    """A site's personalized adapter, with its comparison on the site's test records."""

    folder: Path  # folder of the adapter, its settings and its model card
    passes: int  # number of training epochs; 0 if the shared adapter was best
    seen: bool  # whether the shared adapter was trained on the test records, because the run held out no records
    sides: ComparedModels  # models "base", "alone" (same training from the run's starting point), "shared" and "own"


def personalize(
    run: Run, sites: Sequence[str] = (), *, progress: Callback = ignore_progress
) -> dict[str, Personalized]:
    """Train personalized adapters for simulated sites without noise, starting from a run's final adapter.

    A personalized adapter is written to `private_to_SITE` in the run's folder, which `load` accepts.
    `sides.compare_models("shared", "own")` is its benefit for the site, with a paired 95 % bootstrap interval on
    records that were used neither for training nor for selection.

    Guarantee: none for the site's records.  Nothing is charged, no run can start from a personalized adapter, and it
    must not leave its site.

    Args:
        run: a finished simulation.
        sites: sites of the run; empty: all sites.
        progress: callback for progress, called in this thread.

    Returns:
        The personalized adapter by site.

    Raises:
        ValueError: the run is not finished or uses real sites, or a site has too few records.
        RunError: a site's own_adapters.json is damaged.
    """
    parts, adapter = split_site_records(run.config, sites), run.adapter
    from fedtune.sites.virtual_site import VirtualSites

    virtual, made = VirtualSites.create(run.config, run.folder, run.config.plan()), {}
    own = partial(make_personalized, run.config, adapter, progress=progress)
    for site, of_site in parts.items():
        into, beside = run.folder / f"private_to_{site}", virtual.files(site).ledger.parent
        made[site] = own(of_site, site=site, into=into, beside_ledger=beside)
    return made


def split_site_records(config: RunConfig, sites: Sequence[str] = ()) -> dict[str, Parts]:
    """Split the records of simulated sites into training, validation and test records for `personalize`.

    Raises:
        ConfigError: the run uses real sites, or does not have one of the `sites`.
    """
    if config.runtime.kind == "deployment":
        bound = "is a run over real sites: use fedtune site personalize at a site"
        raise ConfigError("run", config.name, bound)
    for site in sites:
        check_one_of("SITE", site, config.federation.active)
    from fedtune.data.load import derive_split_key
    from fedtune.lab.personalization import Parts
    from fedtune.sites.run_records import partition_run_records

    dealt = dict(zip(config.federation.names, partition_run_records(config).sites, strict=True))
    key, unit = derive_split_key(config.seed), config.privacy.unit
    return {site: Parts.split(dealt[site], key=key, unit=unit) for site in sites or config.federation.active}


def make_personalized(
    config: RunConfig,
    adapter: Path,
    parts: Parts,
    *,
    site: str,
    into: Path,
    beside_ledger: Path,
    progress: Callback,
    lenient: bool = False,
) -> Personalized:
    """Train a site's personalized adapter in `into`, and compare it with the shared adapter and a local baseline."""
    from fedtune.api.compared_models import ComparedModels
    from fedtune.lab.personalization import personalize as train
    from fedtune.runs.model_comparison import compare_runs

    with TemporaryDirectory() as scratch:
        alone = Path(scratch, "adapter")
        passes = train(
            config,
            adapter,
            parts,
            site=site,
            into=into,
            alone=alone,
            beside_ledger=beside_ledger,
            lenient=lenient,
            progress=make_stage_callback(progress),
        )
        folders = {OWN: into / "adapter", SHARED: adapter, ALONE: alone}
        sides = compare_runs({name: (config, folder) for name, folder in folders.items()}, records=parts.scored)
    return Personalized(folder=into, passes=passes, seen=parts.seen, sides=ComparedModels.from_side_by_side(sides))


def build_personalized_sections(made: Mapping[str, Personalized]) -> list[Section]:
    """Build the comparison tables of personalized adapters."""
    rows, notes = [], []
    for site, one in made.items():
        sides, score = one.sides, one.sides.primary_metric
        base = next(iter(sides.measured))
        values = [f"{sides.estimate(name, score).value:.4f}" for name in (base, ALONE, SHARED, OWN)]
        rows.append((site, f"{sides.num_units:,}", *values, format_with_interval(sides.compare_models(SHARED, OWN))))
        if one.passes == 0:
            notes.append(f"{site}: its own records do not improve the shared adapter, which is used unchanged.")
            continue
        beside = {name: sides.compare_models(name, OWN).verdict for name in (SHARED, ALONE)}
        words = " and ".join(
            f"cannot be told apart from {name}" if verdict == NO_DIFFERENCE else f"is {verdict} than {name}"
            for name, verdict in beside.items()
        )
        notes.append(f"{site}: own {words}; it was trained for {pluralize(one.passes, 'epoch')}.")
    first = next(iter(made.values())).sides
    headings = ("site", f"{first.unit}s", "base", ALONE, SHARED, OWN, "own less shared,\n95 % interval")
    if any(one.seen for one in made.values()):
        notes.append("The run had no held-out records, so the shared adapter was trained on the test records.")
    notes.append("Private to the site, without a guarantee: do not send a folder to anyone.")
    title = f"{format_score_name(first.primary_metric).capitalize()} on the site's own held-out records"
    folders = Section(headings=("site", "written"), rows=[(site, str(one.folder)) for site, one in made.items()])
    return [Section(title=title, headings=headings, rows=rows, words={0}, notes=notes), folders]


def convert_personalized_to_json(made: Mapping[str, Personalized]) -> dict[str, Any]:
    """Convert the comparison of personalized adapters to JSON values."""
    sites = {}
    for site, one in made.items():
        sides = one.sides
        sites[site] = {
            "folder": str(one.folder),
            "score": sides.primary_metric,
            "values": {name: sides.estimate(name, sides.primary_metric) for name in sides.measured},
            "own_less": {name: sides.compare_models(name, OWN) for name in sides.measured if name != OWN},
            "units": sides.num_units,
            "passes": one.passes,
            "scored_records_were_trained_on": one.seen,
        }
    return {"sites": sites}

"""A site's own adapter beside the base, the shared one and the site alone: made, scored, and put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedtune.config import RunConfig
from fedtune.show.terminal_tables import SCHEMA_VERSION, Section
from fedtune.words import counted, score_words

if TYPE_CHECKING:  # they import torch, which takes seconds
    from fedtune.runs.model_comparison import SideBySide
    from fedtune.sites.personal import OwnAdapter, Parts
    from fedtune.sites.shared_model import Progress

OWN, SHARED, ALONE = "own", "shared", "alone"


@dataclass(frozen=True, kw_only=True)
class Personalised:
    """A site's own adapter beside the others, scored on records that chose and trained nothing of it."""

    own: OwnAdapter
    sides: SideBySide


def make(
    config: RunConfig,
    adapter: Path,
    parts: Parts,
    *,
    site: str,
    into: Path,
    beside_ledger: Path,
    progress: Progress,
    lenient: bool = False,
) -> Personalised:
    """Make a site's own adapter in the folder `into`, and score it beside the shared one and the site alone."""
    from fedtune.runs.model_comparison import Finished, side_by_side
    from fedtune.sites.personal import personalise as train

    with TemporaryDirectory() as scratch:
        alone = Path(scratch, "adapter")
        own = train(
            config,
            adapter,
            parts,
            site=site,
            into=into,
            alone=alone,
            beside_ledger=beside_ledger,
            lenient=lenient,
            progress=progress,
        )
        folders = {OWN: into / "adapter", SHARED: adapter, ALONE: alone}
        runs = {name: Finished(folder=into, config=config, adapter=folder) for name, folder in folders.items()}
        sides = side_by_side(runs, records=parts.scored)
    return Personalised(own=own, sides=sides)


def sections(made: Mapping[str, Personalised]) -> list[Section]:
    """What each site's own adapter is worth beside the others."""
    rows, notes = [], []
    for site, one in made.items():
        sides, score = one.sides, one.sides.judged_by
        base = next(iter(sides.measured))
        found = sides.comparison(SHARED, OWN)
        values = [f"{sides.estimate(name, score).value:.4f}" for name in (base, ALONE, SHARED, OWN)]
        change = f"{found.difference.value:+.4f} ({found.difference.low:+.4f} to {found.difference.high:+.4f})"
        rows.append((site, f"{sides.num_units:,}", *values, change))
        notes.append(_sentence(site, one))
    first = next(iter(made.values())).sides
    headings = ("site", f"{first.unit}s", "base", ALONE, SHARED, OWN, "own less shared,\n95 % interval")
    if any(one.own.parts.seen for one in made.values()):
        notes.append("The run held nothing out, so the shared adapter was trained on the records that are scored here.")
    notes.append("Private to the site, without a guarantee: do not send a folder to anybody.")
    title = f"{score_words(first.judged_by).capitalize()} on the site's own held-out records"
    folders = Section(headings=("site", "written"), rows=[(site, str(one.own.folder)) for site, one in made.items()])
    return [Section(title=title, headings=headings, rows=rows, words={0}, notes=notes), folders]


def to_json(made: Mapping[str, Personalised]) -> dict[str, Any]:
    """The same for machines."""
    return {"schema_version": SCHEMA_VERSION, "sites": {site: _to_json(one) for site, one in made.items()}}


def _sentence(site: str, one: Personalised) -> str:
    """What the interval supports, in words."""
    if one.own.fitted.passes == 0:
        return f"{site}: its own records do not improve the shared adapter, which its own one equals."
    beside = {name: one.sides.comparison(name, OWN).verdict for name in (SHARED, ALONE)}
    words = " and ".join(
        f"cannot be told apart from {name}" if verdict == "cannot be told apart" else f"is {verdict} than {name}"
        for name, verdict in beside.items()
    )
    return f"{site}: own {words}; it went {counted(one.own.fitted.passes, 'time')} through its records."


def _to_json(one: Personalised) -> dict[str, Any]:
    sides, fitted = one.sides, one.own.fitted
    return {
        "folder": str(one.own.folder),
        "score": sides.judged_by,
        "values": {name: sides.estimate(name, sides.judged_by) for name in sides.measured},
        "own_less": {name: sides.comparison(name, OWN) for name in sides.measured if name != OWN},
        "units": sides.num_units,
        "passes": fitted.passes,
        "scored_records_were_trained_on": one.own.parts.seen,
    }

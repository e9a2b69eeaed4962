"""`fedtune personalise`: a site's own adapter, made from a simulated run's final one without noise."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console

from fedtune.cli.command import Argument, AsJson, single
from fedtune.cli.finished_run import Device, Run, finished_run
from fedtune.show.terminal_tables import print_json, show
from fedtune.spec import ConfigError, check_one_of
from fedtune.studies.personalised import make, sections, to_json


def personalise(
    run: Run,
    sites: Annotated[tuple[str, ...], Argument("SITE", help="of the run's sites (default: all)")] = (),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make the own adapter of simulated sites: each begins in the run's final one, and trains without noise.

      fedtune personalise runs/banks            RUN/private_to_SITE/ of each site, and scores beside the others
      fedtune personalise runs/banks bank_2     of one

    Learning rate and end follow from records that the site holds out. What comes out is private to the site, without a
    guarantee: no run begins in it, and `fedtune export` asks for --private. generate, chat, evaluate and compare take
    its folder. A real site has `fedtune site personalise`. Nothing is charged. docs/own_adapter.md says more.
    """
    config, adapter = finished_run(run, device=device)
    if config.runtime.kind == "deployment":
        bound = "is over real sites, whose records are not here: fedtune site personalise, at a site"
        raise ConfigError("run folder", str(run), bound)
    for site in sites:
        check_one_of("SITE", site, config.federation.active)
    folder = adapter.absolute().parent
    from fedtune.data.load import split_key
    from fedtune.sites.personal import Parts
    from fedtune.sites.run_records import deal_out
    from fedtune.sites.virtual_site import VirtualSites

    dealt = dict(zip(config.federation.names, deal_out(config).sites, strict=True))
    virtual = VirtualSites.of(config, folder, config.plan())
    parts = {
        site: Parts.of(dealt[site], key=split_key(config.seed), unit=config.privacy.unit)
        for site in sites or config.federation.active
    }
    with Console(stderr=True).status("Loading ...") as status:
        made = {
            site: make(
                config,
                adapter,
                of_site,
                site=site,
                into=folder / f"private_to_{site}",
                beside_ledger=virtual.files(site).ledger.parent,
                progress=lambda what, done, total: status.update(f"{what} ({done} of {total})" if total else what),
            )
            for site, of_site in parts.items()
        }
    if as_json:
        print_json(to_json(made))
    else:
        show(Console(), sections(made))


app = single(personalise)

"""What the commands of `fedtune provision` do and say: what to send to whom, what to compare, what expires when."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli import provision_list
from fedtune.cli.plain_words import printable
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.certificates import Certificate, key_fingerprint, spoken
from fedtune.deploy.kits.provisioning import Admitted, Overview


def init(options: argparse.Namespace) -> None:
    """Make a federation."""
    made = provisioning.init(Path(options.file), out=Path(options.out) if options.out else None, now=datetime.now(UTC))
    console = Console()
    _say(console, f"Federation {made.federation} is in {made.folder}/.", style="bold")
    console.print(_folders(made))
    _compare(
        console,
        "Keys of the federation, to be read out to each site over the telephone:",
        {"lead": made.lead_key, "authority": made.authority.fingerprint},
    )
    _steps(
        console,
        f"Move {made.folder}/authority to a place that is offline. Only adding and renewing need it.",
        f"Copy {made.folder}/server to the machine that {made.server} names, and start there what its README.md says.",
        "Ask each site for the join_request.json that `fedtune site init` makes there, and let it in: "
        f"fedtune provision add-site join_request.json --federation {made.folder}",
    )


def add_site(options: argparse.Namespace) -> None:
    """Let a site in."""
    folder = Path(options.federation)
    done = provisioning.add_site(folder, request=Path(options.request), days=options.days, now=datetime.now(UTC))
    console = Console()
    _say(console, f"Site {done.member.site} is in the federation.", style="bold")
    _show_admitted(console, folder, done)


def renew_site(options: argparse.Namespace) -> None:
    """Renew a site."""
    folder = Path(options.federation)
    done = provisioning.renew_site(
        folder,
        options.name,
        request=Path(options.request) if options.request else None,
        days=options.days,
        new_site_key=options.new_site_key,
        now=datetime.now(UTC),
    )
    console = Console()
    _say(console, f"Site {done.member.site} is renewed. Nothing changes at the others.", style="bold")
    for change in done.changes:
        _say(console, change)
    _show_admitted(console, folder, done)


def revoke_site(options: argparse.Namespace) -> None:
    """Shut a site out."""
    folder = Path(options.federation)
    member = provisioning.revoke_site(folder, options.name, now=datetime.now(UTC))
    console = Console()
    _say(console, f"Site {member.site} is revoked; its connection key can never be used again.", style="bold")
    _steps(
        console,
        f"Copy {folder}/server/roster.json into the server's kit, unless the server runs from this folder. Until then "
        "the site is still let in; no restart is needed.",
        f"Copy {folder}/lead/roster.json into the lead's kit, unless runs start from this folder.",
    )
    _say(console, f"To let it in again, with a new key: fedtune provision renew-site {member.site} REQUEST")


def renew_server(options: argparse.Namespace) -> None:
    """Renew the server's certificate."""
    folder = Path(options.federation)
    made = provisioning.renew_server(folder, days=options.days, now=datetime.now(UTC))
    _show_renewed(folder / "server", made.server_certificate, files="kit.toml, server.pem and README.md", of="server")


def renew_lead(options: argparse.Namespace) -> None:
    """Renew the lead's certificate."""
    folder = Path(options.federation)
    made = provisioning.renew_lead(folder, days=options.days, now=datetime.now(UTC))
    _show_renewed(folder / "lead", made.lead_certificate, files="kit.toml, lead.pem and README.md", of="lead")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "init": init,
    "add-site": add_site,
    "renew-site": renew_site,
    "revoke-site": revoke_site,
    "renew-server": renew_server,
    "renew-lead": renew_lead,
    "list": provision_list.list_sites,
}


def _show_admitted(console: Console, folder: Path, done: Admitted) -> None:
    """What to compare, and what to send to whom."""
    made, member = provisioning.overview(folder), done.member
    certificate = Certificate.of(member.certificate)
    for name, size in member.datasets.items():
        _say(console, f"Data set {name}: declared size {size:,}.")
    _say(console, f"Its certificate is valid until {certificate.not_after:%Y-%m-%d}.")
    if done.requested:
        _compare(
            console,
            "Let the site read out these. If one differs, somebody else made the request: send nothing, and revoke it.",
            {"connection key": certificate.fingerprint, "site key": key_fingerprint(member.site_key)},
        )
        _compare(
            console,
            "Read out these; the site compares them with its kit's README.md.",
            {"lead": made.lead_key, "authority": made.authority.fingerprint},
        )
    _steps(
        console,
        f"Send {done.archive} to the site; nothing in it is secret.",
        f"Copy {folder}/server/roster.json into the server's kit, unless the server runs from this folder. No restart "
        "is needed.",
        f"Copy {folder}/lead/roster.json into the lead's kit, unless runs start from this folder.",
    )


def _show_renewed(kit: Path, certificate: Certificate, *, files: str, of: str) -> None:
    console = Console()
    _say(
        console, f"The {of}'s certificate is valid until {certificate.not_after:%Y-%m-%d}; its key stays.", style="bold"
    )
    _steps(
        console,
        f"Copy {files} from {kit} into the {of}'s kit, unless it is used from this folder, and start the {of} again.",
    )


def _folders(made: Overview) -> Table:
    table = Table("folder", "for", "valid until")
    for name, use, certificate in (
        ("authority", "signs certificates; keep it offline, and a backup of it", made.authority),
        ("server", "the server's kit", made.server_certificate),
        ("lead", "the lead's kit; keep a backup of lead_key.pem", made.lead_certificate),
    ):
        table.add_row(f"{name}/", use, f"{certificate.not_after:%Y-%m-%d}")
    table.add_row("sites/", "the sites' kits, as they join", "")
    return table


def _compare(console: Console, title: str, fingerprints: Mapping[str, str]) -> None:
    """Fingerprints in groups of four, one under the other."""
    console.print()
    _say(console, title)
    for name, fingerprint in fingerprints.items():
        _say(console, f"  {name:<14}  {spoken(fingerprint)}")


def _steps(console: Console, *steps: str) -> None:
    console.print()
    _say(console, "What to do next:", style="bold")
    for number, step in enumerate(steps, 1):
        _say(console, f" {number}. {step}")


def _say(console: Console, text: str, *, style: str = "") -> None:
    """A line as it is: paths and fingerprints are copied, and so never broken."""
    console.print(Text(printable(text, most=1000), style=style), soft_wrap=True)

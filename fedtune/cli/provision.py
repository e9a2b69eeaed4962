"""Create and manage a federation of real sites: certificate authority, kits of server and lead, and sites.

  fedtune provision init federation.toml                  create the federation's folder
  fedtune provision add-site join_request.json            admit a site during a phone call, and create its kit
  fedtune provision renew-site north-hospital             issue a new certificate for the same key
  fedtune provision revoke-site north-hospital            revoke a site's certificate
  fedtune provision renew-server; ... renew-lead          issue new certificates for server and lead
  fedtune provision list                                  list the members and the expiry of their certificates
  fedtune provision backup | restore FILE                 back up or restore the folder with its keys
Run these commands in the federation's folder, or pass --federation. A change for one site does not affect the
others. After editing the folder's federation.toml (address, further names, base models), run renew-server,
renew-lead, then renew-site for each site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fedtune.cli.command import Argument, AsJson, Option, command, group, print_answer
from fedtune.formatting import group_hex, pluralize
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.certificates import SOON_DAYS, Certificate, compute_key_fingerprint
from fedtune.ops.kits.federation_folder import FederationFolder
from fedtune.ops.kits.members import JoinRequest
from fedtune.ops.kits.provisioning import JoinResult
from fedtune.show.lines import to_printable
from fedtune.show.terminal_tables import Section, require_confirmation, say, show
from fedtune.spec import NOT_GIVEN, ConfigError

app = group(__doc__)
_MAX_TEXT = 1000

Federation = Annotated[Path, Option(metavar="DIR", help="the federation's folder")]
Days = Annotated[int | None, Option(metavar="N", help="validity in days (default: as in federation.toml)")]
Compared = Annotated[bool, Option("do not ask whether the keys have been compared (for scripts)")]
SiteName = Annotated[str, Argument("NAME", help="the site")]


@command(app, "create a federation's folder")
def init(
    file: Annotated[Path, Argument("FILE", help="a federation.toml")],
    out: Annotated[Path | None, Option(metavar="DIR", help="the new folder (default: the federation's name)")] = None,
) -> None:
    """Create a federation's folder with the certificate authority, the server's kit and the lead's kit.

    The folder must not exist. It contains private keys: keep authority/ca_key.pem offline when it is not in use.
    """
    made = provisioning.init_federation(file, out=out, now=datetime.now(UTC))
    say(f"Federation {made.settings.name} is in {made.folder}/.", style="bold")
    uses = {
        "authority": "signs certificates; keep it and a backup offline",
        "server": "the server's kit",
        "lead": "the lead's kit; keep a backup of lead_key.pem",
    }
    rows = [(f"{of}/", use, f"{made.certificates[of].not_after:%Y-%m-%d}") for of, use in uses.items()]
    rows.append(("sites/", "kits of the sites that join", ""))
    show([Section(headings=("folder", "for", "valid until"), rows=rows, words={0, 1, 2})])
    _print_fingerprints("Keys of the federation: read them to each site by phone:", _list_federation_keys(made))
    server = f"Copy {made.folder}/server to the machine that {made.settings.server} names"
    let_in = f"fedtune provision add-site join_request.json --federation {made.folder}"
    offline = f"Move {made.folder}/authority to offline storage. It is needed only to add sites and renew certificates."
    ask = "Ask each site for the join_request.json that `fedtune site init` creates, and add the site"
    _print_steps(offline, f"{server}, and start the server there as described in its README.md.", f"{ask}: {let_in}")


@command(app, "add a site", name="add-site")
def add_site(
    request: Annotated[Path, Argument("REQUEST", help="the site's join_request.json")],
    federation: Federation = Path("."),
    days: Days = None,
    compared: Compared = False,
) -> None:
    """Admit a site with the join_request.json that `fedtune site init` created at the site.

    Run this command during a phone call with the site. It prints the key fingerprints to compare, and asks for
    confirmation before any change. Then it lists the files to send.
    """
    asked, admit = provisioning.check_join_request(federation, request=request, days=days, now=datetime.now(UTC))
    _require_key_comparison(federation, asked, already=compared)
    done = admit()
    say(f"Site {done.member.site} has joined the federation.", style="bold")
    _show_admitted_site(federation, done)


@command(app, "issue a new certificate for a site", name="renew-site")
def renew_site(
    name: SiteName,
    request: Annotated[Path | None, Argument("REQUEST", help="a new join_request.json of the same site")] = None,
    federation: Federation = Path("."),
    days: Days = None,
    new_site_key: Annotated[
        bool,
        Option(help="accept a new site key, with which the site starts a new ledger and budget: agree on it first"),
    ] = False,
    compared: Compared = False,
) -> None:
    """Create a new certificate and kit for a site. Other sites are not affected.

    Without REQUEST, only the expiry date changes. A new request by the same site can change its connection key or its
    declared data sets: compare the keys by phone, as for add-site. The site key must not change, because it signs the
    site's ledger.
    """
    now = datetime.now(UTC)
    if request is None:
        if new_site_key:
            raise ConfigError("--new-site-key", NOT_GIVEN, "requires REQUEST, the file with the new site key")
        done = provisioning.renew_site(federation, name, days=days, now=now)
    else:
        asked, admit = provisioning.check_renewal_request(
            federation, name, request=request, days=days, new_site_key=new_site_key, now=now
        )
        _require_key_comparison(federation, asked, already=compared)
        done = admit()
    say(f"Site {done.member.site} is renewed. The other sites are not affected.", style="bold")
    for change in done.changes:
        say(to_printable(change, _MAX_TEXT))
    _show_admitted_site(federation, done, new_to_server=bool(done.changes))  # which knows the site by its key


@command(app, "revoke a site", name="revoke-site")
def revoke_site(name: SiteName, federation: Federation = Path(".")) -> None:
    """Revoke a site. The server never accepts its connection key again; other sites are not affected.

    The revocation takes effect within seconds after the new roster is copied into the server's kit.
    """
    member = provisioning.revoke_site(federation, name, now=datetime.now(UTC))
    say(f"Site {member.site} is revoked; its connection key can never be used again.", style="bold")
    _print_steps(_format_roster_instruction(federation))
    say(f"To add it again, with a new key: fedtune provision renew-site {member.site} REQUEST")


@command(app, "issue a new certificate for the server", name="renew-server")
def renew_server(federation: Federation = Path("."), days: Days = None) -> None:
    """Create a new certificate for the server's key, with the server names in federation.toml."""
    _renew_certificate("server", federation, days)


@command(app, "issue a new certificate for the lead", name="renew-lead")
def renew_lead(federation: Federation = Path("."), days: Days = None) -> None:
    """Create a new certificate for the lead's connection key. The lead's signing key does not change."""
    _renew_certificate("lead", federation, days)


@command(app, "list the members and the expiry of their certificates", name="list")
def list_sites(federation: Federation = Path("."), as_json: AsJson = False) -> None:
    """List the sites with the expiry of their certificates and their declared data sets."""
    made, now = FederationFolder.open(federation), datetime.now(UTC)
    rows = []
    for member in made.roster.sites:
        datasets = "\n".join(f"{name} ({size:,})" for name, size in member.datasets.items())
        state = f"revoked {member.revoked[:10]}" if member.revoked else "active"
        rows.append((member.site, state, _format_expiry(Certificate.from_x509(member.x509_certificate), now), datasets))
    headings, none = ("site", "state", "certificate until", "data sets (declared size)"), ["No site has joined yet."]
    sites = Section(pluralize(len(rows), "site"), headings, rows, words=range(4), notes=[] if rows else none)
    own = [(name, _format_expiry(certificate, now)) for name, certificate in made.certificates.items()]
    sections = [sites, Section("Certificates of the federation", ("of", "until"), own, words={0, 1})]
    heading = f"Federation {made.settings.name}, server {made.settings.server}"
    print_answer(_convert_federation_to_json(made, now), sections, as_json=as_json, heading=heading)
    for warning in [] if as_json else _list_expiry_warnings(made, now):
        say(warning, style="bold yellow")


@command(app, "write a backup")
def backup(file: Annotated[Path, Argument("FILE", help="a new file")], federation: Federation = Path(".")) -> None:
    """Back up the federation's folder. The file contains all private keys: keep it offline."""
    from fedtune.ops.backup import back_up_federation

    back_up_federation(file, federation=federation)
    say(f"{file} is written. It contains private keys: keep it offline.")


@command(app, "restore a backup")
def restore(
    file: Annotated[Path, Argument("FILE", help="the file that `fedtune provision backup` wrote")],
    out: Annotated[Path, Option(metavar="DIR", help="the new folder")],
) -> None:
    """Restore the federation's folder from a backup."""
    from fedtune.ops.backup import restore_federation

    restore_federation(file, out=out)
    again = "Repeat the revocations and additions of sites since the backup."
    say(f"The federation's folder is {out}. {again}")


def _format_roster_instruction(folder: Path) -> str:
    until_then = "The server loads it without a restart."
    other = f"A lead's kit on another machine needs {folder}/lead/roster.json."
    return f"Copy {folder}/server/roster.json into the server's kit. {until_then} {other}"


def _require_key_comparison(folder: Path, request: JoinRequest, *, already: bool) -> None:
    """Print the key fingerprints, and ask for confirmation that the site's keys are equal, unless `already` confirmed.

    Raises:
        RunError: the user did not confirm; nothing was changed.
    """
    made = FederationFolder.open(folder)
    for name, declared_size in request.datasets.items():
        say(f"Data set {name}: declared size {declared_size:,}.")
    call = "Call the site at a number that you know from elsewhere, and have it read out these keys."
    keys = {"connection key": compute_key_fingerprint(request.node_key), "site key": request.site_key}
    _print_fingerprints(f"{call} If a key differs, somebody else made the request.", keys)
    _print_fingerprints(
        "Read these aloud. The site writes them down and compares them with README.md in its kit.",
        _list_federation_keys(made),
    )
    say("")
    if not already:
        otherwise = (
            f"nothing is changed: {request.site} joins after you have compared its keys. If a key differs, somebody "
            "else made the request: ask the site to send its request again, through another channel"
        )
        require_confirmation("Did the site read out the same keys?", otherwise=otherwise)


def _show_admitted_site(folder: Path, done: JoinResult, *, new_to_server: bool = True) -> None:
    say(f"Its certificate is valid until {Certificate.from_x509(done.member.x509_certificate).not_after:%Y-%m-%d}.")
    roster = [_format_roster_instruction(folder)] if new_to_server else []
    _print_steps(f"Send {done.archive} to the site; it contains no secret.", *roster)


def _renew_certificate(of: Literal["server", "lead"], folder: Path, days: int | None) -> None:
    certificate = provisioning.renew_own_certificate(folder, of, days=days, now=datetime.now(UTC))
    say(f"The {of}'s certificate is valid until {certificate.not_after:%Y-%m-%d}; its key is unchanged.", style="bold")
    kit = f"from {folder / of} into the {of}'s kit, unless it is used from this folder"
    running = "A running server loads the certificate within seconds; after a change of kit.toml, restart it."
    _print_steps(f"Copy kit.toml, {of}.pem and README.md {kit}. {running}")


def _print_fingerprints(title: str, fingerprints: Mapping[str, str]) -> None:
    say("\n" + title)
    for name, fingerprint in fingerprints.items():
        say(f"  {name:<14}  {group_hex(fingerprint)}")


def _print_steps(*steps: str) -> None:
    say("\nNext steps:", style="bold")
    for number, step in enumerate(steps, 1):
        say(f" {number}. {step}")


def _list_federation_keys(made: FederationFolder) -> dict[str, str]:
    return {"lead": made.lead_key, "authority": made.certificates["authority"].fingerprint}


def _format_expiry(certificate: Certificate, now: datetime) -> str:
    return f"{certificate.not_after:%Y-%m-%d} ({_format_days_left(certificate, now)})"


def _format_days_left(certificate: Certificate, now: datetime) -> str:
    return "expired" if now > certificate.not_after else f"{pluralize(certificate.count_days_left(now), 'day')} left"


def _list_expiry_warnings(made: FederationFolder, now: datetime) -> Iterator[str]:
    """Yield a warning with the renewal command for each certificate that has expired or expires soon."""
    renew, active = "Renew it: fedtune provision", [one for one in made.roster.sites if not one.revoked]
    of_sites = {one.site: Certificate.from_x509(one.x509_certificate) for one in active}
    found = [(f"site {site}", certificate, f"{renew} renew-site {site}") for site, certificate in of_sites.items()]
    found += [(f"the {kind}", made.certificates[kind], f"{renew} renew-{kind}") for kind in ("server", "lead")]
    found.append(("the authority", made.certificates["authority"], "Provision the federation again."))
    for name, certificate, remedy in found:
        if certificate.count_days_left(now) < SOON_DAYS:
            yield f"The certificate of {name}: {_format_days_left(certificate, now)}. {remedy}"


def _convert_federation_to_json(made: FederationFolder, now: datetime) -> dict[str, Any]:
    sites = []
    for member in made.roster.sites:
        certificate = _convert_certificate_to_json(Certificate.from_x509(member.x509_certificate), now)
        about = {"site": member.site, "revoked": member.revoked, "certificate": certificate}
        about |= {"connection_key_sha256": compute_key_fingerprint(member.node_key), "site_key": member.site_key}
        datasets = [{"id": name, "declared_size": size} for name, size in member.datasets.items()]
        sites.append({**about, "datasets": datasets})
    certificates = made.certificates.items()
    return {
        "federation": made.settings.name,
        "server": made.settings.server,
        "lead": made.lead_key,
        "certificates": {name: _convert_certificate_to_json(certificate, now) for name, certificate in certificates},
        "sites": sites,
        "warnings": [*_list_expiry_warnings(made, now)],
    }


def _convert_certificate_to_json(certificate: Certificate, now: datetime) -> dict[str, Any]:
    valid = {"not_before": certificate.not_before.isoformat(), "not_after": certificate.not_after.isoformat()}
    return {**valid, "days_left": certificate.count_days_left(now), "public_key_sha256": certificate.fingerprint}

"""`fedtune provision`: the arguments of its commands; `provision_text` does what they say.

Nothing here is slow to import, since every `fedtune --help` reads it.
"""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Make a federation of real sites: its authority, the startup kits of server and lead, and its sites as they come and go.

  fedtune provision init federation.toml                  a folder with everything, named after the federation
  fedtune provision add-site join_request.json            let a site in: its kit, to be sent to it
  fedtune provision renew-site north-hospital             a new certificate for the same key
  fedtune provision revoke-site north-hospital            shut a site out
  fedtune provision renew-server; ... renew-lead          new certificates for these
  fedtune provision list                                  who is in, and when what expires
Run these where the federation's folder is, or name it with --federation. What is done to one site changes nothing at
the others. After editing the folder's federation.toml (address, further names, base models): renew-server, renew-lead,
then renew-site for each site.
"""

_INIT = """\
Make a federation's folder from its federation.toml: authority, server's kit, lead's kit.

The folder must not exist. It holds secret keys; authority/ca_key.pem belongs offline whenever it is not needed.
"""
_ADD = """\
Let a site in, by the join_request.json that `fedtune site init` made there.

Prints fingerprints to compare over the telephone, and which file to send to whom.
"""
_RENEW_SITE = """\
Make a new certificate and kit for a site. Nothing changes at the others.

Without REQUEST everything but the expiry date stays. With a new request of the same site, its connection key or its
declared data sets may change. The site key must stay the same, because it is its ledger's.
"""
_REVOKE = """\
Shut a site out. Its connection key can never be used again; nothing changes at the others.

It takes effect when the new roster.json is in the server's kit.
"""
_RENEW_SERVER = "Make a new certificate for the server's key, for the names that federation.toml now gives it."
_RENEW_LEAD = "Make a new certificate for the lead's connection key. The key that signs requests stays."
_LIST = "Show the sites, their certificates' expiry and their declared data sets."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands under `fedtune provision`."""
    commands = parser.add_subparsers(dest="provision_command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=help, description=description, formatter_class=raw)

    init = command("init", "make a federation's folder", _INIT)
    add = command("add-site", "let a site in", _ADD)
    renew = command("renew-site", "a new certificate for a site", _RENEW_SITE)
    revoke = command("revoke-site", "shut a site out", _REVOKE)
    renew_server = command("renew-server", "a new certificate for the server", _RENEW_SERVER)
    renew_lead = command("renew-lead", "a new certificate for the lead", _RENEW_LEAD)
    listing = command("list", "who is in, and when what expires", _LIST)

    init.add_argument("file", metavar="FILE", help="a federation.toml")
    init.add_argument("--out", metavar="DIR", help="the new folder (default: the federation's name)")
    add.add_argument("request", metavar="REQUEST", help="the site's join_request.json")
    for named in (renew, revoke):
        named.add_argument("name", metavar="NAME", help="the site")
    renew.add_argument("request", metavar="REQUEST", nargs="?", help="a new join_request.json of the same site")
    for changing in (add, renew, revoke, renew_server, renew_lead, listing):
        changing.add_argument(
            "--federation", metavar="DIR", default=".", help="the federation's folder (default: this one)"
        )
    for issuing in (add, renew, renew_server, renew_lead):
        issuing.add_argument(
            "--days", type=int, metavar="N", help="validity of the certificate (default: as federation.toml says)"
        )
    renew.add_argument(
        "--new-site-key",
        action="store_true",
        help="accept another site key: the site starts a new ledger, and its budget anew; agree on it first",
    )
    listing.add_argument("--json", action="store_true", help="for machines")


def run(options: argparse.Namespace) -> None:
    """Run one of them.

    Raises:
        ConfigError: an argument, a file or a request is wrong; nothing was changed.
    """
    from fedtune.cli import provision_text  # certificates and policies take most of a second to import

    provision_text.COMMANDS[options.provision_command](options)

"""Paths of the files of a site: its policy, ledger, key and anchor."""

from __future__ import annotations

from pathlib import Path

from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.history import History
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.store import resolve_link
from fedtune.privacy.ledger.verify import VerifiedLedger, verify
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.site_policy import Policy
from fedtune.spec import name_file_in_errors


class SiteFiles:
    """The files of a site. Relative paths in the policy start at the folder of the policy's file, not of a link to it.

    Attributes:
        policy: the policy of the site.
        site_toml: path of the policy's file.
        ledger: path of the ledger.
        site_key: path of the private key.
        anchor: path of the anchor, or of the file that it links to; None without an anchor.
    """

    def __init__(self, policy: Policy, site_toml: Path) -> None:
        folder = resolve_link(site_toml).parent  # a link to a policy has the policy's ledger, not a second one
        self.policy, self.site_toml = policy, site_toml
        self.ledger, self.site_key = folder / policy.ledger, folder / policy.site_key
        self.anchor = resolve_link(folder / policy.anchor) if policy.anchor else None

    @classmethod
    def from_site_toml(cls, site_toml: Path, *, may_be_unanswered: bool = False) -> SiteFiles:
        """Read a policy, and locate the files that it names.

        Guarantee: a policy with unanswered statements permits neither training nor a new ledger. `may_be_unanswered`
        skips this check for read-only use.

        Raises:
            ConfigError: the file is not a valid policy, or lacks an answer.
        """
        policy = read_policy(site_toml)
        if not may_be_unanswered:
            with name_file_in_errors(site_toml):
                policy.require_answers()
        return cls(policy, site_toml)

    @property
    def public_key(self) -> str | None:
        """Public key in the site's key file. None without a key file, or if a command provides the key.

        Guarantee: inspecting a policy from an untrusted source never runs a command from it.
        """
        return None if self.policy.key_command or not self.site_key.is_file() else self.load_key().public

    def load_key(self, *, make: bool = False) -> SigningKey:
        """Load the signing key from its file or its command. With `make`, a missing key file is created.

        Raises:
            ConfigError: the key is missing or cannot be read.
        """
        read = SigningKey.load_or_create if make else SigningKey.load
        # a run folder may come from an untrusted source
        command = () if self.policy.simulated else self.policy.key_command
        return read(self.site_key, command=command, named_in=self.site_toml)

    def open_ledger(self, *, create: bool = False) -> SiteLedger:
        """Open the ledger for training. Only with `create`, a missing ledger or key is created.

        Raises:
            ConfigError: the key is missing or cannot be read.
            RunError: the ledger cannot be used (`SiteLedger`).
        """
        return SiteLedger(self.ledger, self.policy, self.load_key(make=create), anchor=self.anchor, create=create)

    def verify_ledger(self) -> VerifiedLedger | None:
        """Verify the ledger, and compare it with its anchor if the policy has one.

        None if the ledger does not exist yet.

        Raises:
            RunError: the ledger is inconsistent, or older than its anchor.
        """
        if not self.ledger.is_file():
            return None
        return verify(self.ledger, anchor=Head.read(self.anchor) if self.anchor and self.anchor.is_file() else None)


def read_histories(folder: Path) -> dict[str, History]:
    """Verify the ledgers in a simulation folder; return site -> history, for each site that has one."""
    files = [SiteFiles.from_site_toml(path) for path in sorted(folder.glob("*/site.toml"))]
    verified = {files.policy.site: files.verify_ledger() for files in files}
    return {site: ledger.history for site, ledger in verified.items() if ledger is not None}


def find_max_charged_runs(folder: str | None) -> int:
    """Return the largest number of charged runs in any ledger of a simulation folder, or 0 without ledgers."""
    ledgers = read_histories(Path(folder)).values() if folder else ()
    return max((sum(map(bool, map(one.charged_rounds, {*one.runs, *one.lost_runs}))) for one in ledgers), default=0)

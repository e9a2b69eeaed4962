"""Settings of a `site.toml` outside the policy: the machine, and descriptions for a public registry."""

from __future__ import annotations

from pathlib import Path

from fedtune.codec import decode, read_toml
from fedtune.config import AboutSpec
from fedtune.privacy.policy_file import OTHER_TABLES
from fedtune.spec import name_file_in_errors, spec
from fedtune.training.spec import Machine


@spec
class SiteSettings:
    """Settings of a site outside its policy. They are not part of any digest or ledger.

    Attributes:
        machine: machine settings for training.
        about: descriptions of the site's records for a public registry.
    """

    machine: Machine = Machine(
        num_devices=1, num_threads=0, micro_batch_tokens=0, step_mib=0, kept_states_mib=1024, kept_states_folder=""
    )
    about: AboutSpec = AboutSpec()


def read_site_settings(path: Path) -> SiteSettings:
    """Read the tables of a `site.toml` that are not part of the policy.

    Raises:
        ConfigError: a value is wrong; names the file, the key, its value and the accepted values.
    """
    table = read_toml(path, key="policy")
    with name_file_in_errors(path):
        return decode(SiteSettings, {key: value for key, value in table.items() if key in OTHER_TABLES})

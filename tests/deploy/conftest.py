"""A federation in a folder, and sites that want to join it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.members import REQUEST, site_init
from fedtune.privacy.policy import Policy
from fedtune.privacy.policy_file import write_policy

FEDERATION_TOML = f"""\
name = "cardiology-2026"
server = "127.0.0.1:9092"
also_known_as = ["localhost", "fl.example.org"]

[[model]]
name = "minilm"
sha256 = "{"53" * 32}"
licence = "Apache-2.0"
"""


@pytest.fixture
def now() -> datetime:
    """This moment, in whole seconds as certificates have them."""
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def federation_toml(tmp_path: Path) -> Path:
    """A federation.toml whose server is this machine."""
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION_TOML)
    return path


@pytest.fixture
def federation(federation_toml: Path, now: datetime) -> Path:
    """The folder of a federation without sites."""
    folder = federation_toml.parent / "federation"
    provisioning.init(federation_toml, out=folder, now=now)
    return folder


@pytest.fixture
def request_of(tmp_path: Path, site_policy: Callable[..., Policy]) -> Callable[..., Path]:
    """The join request of a site, which lies in a folder named after it; `kit` names another folder for its keys."""

    def make(site: str, *, kit: str = "kit", declared_size: int = 100) -> Path:
        folder = tmp_path / site
        folder.mkdir(exist_ok=True)
        write_policy(site_policy(site, declared_size=declared_size), folder / "site.toml")
        return site_init(folder / "site.toml", out=folder / kit) / REQUEST

    return make


@pytest.fixture
def joined(federation: Path, request_of: Callable[..., Path], now: datetime) -> Callable[[str], Path]:
    """Let a site in; its kit, unzipped where its keys are."""

    def make(site: str) -> Path:
        request = request_of(site)
        done = provisioning.add_site(federation, request=request, days=None, now=now)
        unpack(done.archive, request.parent)
        return request.parent

    return make


def unpack(archive: Path, folder: Path) -> None:
    """Unzip a kit, as its README.md says."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)

"""Links from fedtune's file names to records or passwords, whose content no error may quote."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.ops.doctor.check import PrivateLog
from fedtune.ops.kits.certificates import read_certificate, read_connection_key
from fedtune.ops.kits.federation_folder import FederationFile, FederationFolder
from fedtune.ops.kits.kit_file import Kit, read_spec
from fedtune.ops.kits.members import JoinRequest, Roster
from fedtune.ops.services.site_state import lock_ledger
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.spec import ConfigError, FedtuneError

SETTINGS = FederationFile(name="cardiology", server="127.0.0.1:9")
CANARY = "Xylander-7391"

CONTENTS = {
    "table": f"name,note\n{CANARY},came on Monday\n".encode(),
    "passwords": f"{CANARY}:$y$j9T$abc:19000:0:99999:7:::\n".encode(),
    "record": json.dumps({"name": CANARY, CANARY: 1}).encode(),
    "records": json.dumps([{"name": CANARY}]).encode(),
    "settings": f'password = "{CANARY}"\n"{CANARY} of Miller" = 1\n'.encode(),
    "quoted settings": f'"{CANARY} of Miller" = 1\n'.encode(),
    "latin": f"M\xfcller {CANARY}\n".encode("latin-1"),
    "key": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----\n".encode(),
    "number": b"7" * 5000,
}


def _read_retired_keys(path: Path) -> object:
    folder = path.rename(path.with_name("retired_keys.json")).parent
    return FederationFolder(folder=folder, settings=SETTINGS, lead_key="").read_retired_keys()


READERS: dict[str, Callable[[Path], object]] = {
    "site.toml": read_policy,
    "federation.toml": lambda path: read_spec(FederationFile, path),
    "kit.toml": lambda path: Kit.read(path.rename(path.with_name("kit.toml")).parent, kind="site"),
    "join_request.json": JoinRequest.read,
    "roster.json": Roster.read,
    "retired_keys.json": _read_retired_keys,
    "certificate": read_certificate,
    "connection key": read_connection_key,
    "site key": SigningKey.load,
    "anchor": Head.read,
    "ledger": verify,
    "lock": lambda path: lock_ledger(path.rename(path.with_name("ledger.db.serving")).with_suffix("")).__enter__(),
}


@pytest.mark.parametrize("contents", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_error_about_a_linked_file_quotes_no_contents(
    tmp_path: Path, read: Callable[[Path], object], contents: bytes
) -> None:
    target, link = tmp_path / "elsewhere", tmp_path / "link"
    target.write_bytes(contents)
    link.symlink_to(target)
    with pytest.raises(FedtuneError) as caught:
        read(link)
    message = str(caught.value)
    for quoted in (CANARY, CANARY[:4], "Monday", 'password"', "came", "77777"):
        assert quoted not in message, message
    assert target.read_bytes() == contents


def test_log_does_not_follow_links_and_lock_contents_are_not_quoted(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere", tmp_path / "doctor.log"
    target.write_text(CANARY)
    link.symlink_to(target)
    assert PrivateLog(link).write_entry("x") == ""
    assert target.read_text() == CANARY
    ledger = tmp_path / "ledger.db"
    with lock_ledger(ledger):
        ledger.with_name("ledger.db.serving").write_text(CANARY)
        with pytest.raises(ConfigError, match="is already in use by process another"), lock_ledger(ledger):
            pass

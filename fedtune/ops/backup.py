"""Backups of a site, a server or a federation: one zip file with all files that cannot be recreated.

A backup can be written while the process is running.  A restore adds missing files and never replaces existing ones.
The zip contains a manifest with the hashes of its files, which a site signs with its key.  Databases are copied by
SQLite's online backup, which waits for a transaction in progress; all other files are only ever replaced atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fedtune.codec import require, require_regular_file
from fedtune.ops.files import create_folder, translate_write_errors
from fedtune.ops.kits.federation_folder import FederationFolder
from fedtune.ops.kits.kit_file import DATABASE
from fedtune.ops.kits.members import encode_for_signature
from fedtune.ops.services.site_state import lock_ledger
from fedtune.privacy.dp_library import DpEvent
from fedtune.privacy.durable import write_durably
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.store import connect, lock_anchor
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import NOT_GIVEN, ConfigError, RunError
from fedtune.system import change_mode, fsync_folder
from fedtune.version import __version__

Kind = Literal["site", "server", "lead"]
_LIST, _PURPOSE = "backup.json", "backup"  # the manifest, and the purpose of its signature
_CHUNK = 1 << 20
_STATE = ("state/paused", "state/left")


def write_backup(target: Path, *, kind: Kind, files: Mapping[str, Path], key: SigningKey | None = None) -> None:
    """Write a backup to a new file that only its owner can read.

    Args:
        target: the file to write.
        kind: the type of machine that the backup belongs to: a site, a server or a lead.
        files: name in the backup -> path; a path with the suffix `.db` is an SQLite database, which may be in use.
        key: the key that signs the manifest.

    Raises:
        ConfigError: `target` exists or cannot be written, or a file cannot be read.
    """
    if os.path.lexists(target):
        raise ConfigError("FILE", str(target), "already exists: choose a new file")
    with (
        translate_write_errors(target, key="FILE"),
        tempfile.TemporaryDirectory(prefix=".backup.", dir=target.parent) as folder,
    ):
        building, copy = Path(folder) / "backup.zip", Path(folder) / "copy.db"
        hashes = {}
        with zipfile.ZipFile(building, "x", zipfile.ZIP_DEFLATED) as archive:
            for name, path in sorted(files.items()):
                about_file = zipfile.ZipInfo(name)
                about_file.compress_type, about_file.external_attr = zipfile.ZIP_DEFLATED, path.stat().st_mode << 16
                if path.suffix == ".db":
                    copy.unlink(missing_ok=True)
                    copy_database(path, copy)
                    path = copy
                sha256 = hashlib.sha256()
                with path.open("rb") as source, archive.open(about_file, "w", force_zip64=True) as entry:
                    while part := source.read(_CHUNK):  # in one pass, because a log may grow meanwhile
                        sha256.update(part)
                        entry.write(part)
                hashes[name] = sha256.hexdigest()
            made = datetime.now(UTC).isoformat(timespec="seconds")
            about: dict[str, Any] = {"kind": kind, "made": made, "fedtune_version": __version__, "sha256": hashes}
            if key is not None:
                about["signature"] = key.sign(_PURPOSE, encode_for_signature(about))
            archive.writestr(_LIST, json.dumps(about, indent=1))
        building.chmod(0o600)
        with building.open("rb") as file:
            os.fsync(file.fileno())
        os.link(building, target)  # unlike rename, fails if the target exists
        fsync_folder(target.parent)


def copy_database(source: Path, target: Path) -> None:
    """Copy an SQLite database that other processes may write to, at a transaction boundary.

    Raises:
        ConfigError: the database cannot be read.
    """
    # Read-write access, because SQLite must roll back an interrupted transaction before the first read.
    try:
        with closing(connect(source, writing=True)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # so that the copy is a single file
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite may quote undecodable bytes
        raise ConfigError("database", str(source), f"cannot be copied ({error})") from None


def _restore_file(name: str, archive: zipfile.ZipFile, target: Path) -> None:
    """Restore one file of a backup atomically, unless the target exists.

    Raises:
        ConfigError: the file cannot be written.
    """
    if os.path.lexists(target):
        return
    with translate_write_errors(target, key="restore"):
        missing = [folder for folder in target.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700)
        descriptor, building = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file, archive.open(name) as entry:
                shutil.copyfileobj(entry, file, _CHUNK)
                file.flush()
                change_mode(descriptor, 0o600 | archive.getinfo(name).external_attr >> 16 & 0o044)  # the original mode
                os.fsync(file.fileno())
            os.link(building, target)
        finally:
            os.unlink(building)
        fsync_folder(target.parent)


@contextmanager
def open_backup(source: Path, *, kind: Kind) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """Open a backup and verify the hash of every file; yield the archive and its manifest (`sha256`: name -> hash).

    Raises:
        ConfigError: the file is not a backup, is a backup of another kind, or is damaged.
    """
    try:
        require_regular_file(source)
        archive = zipfile.ZipFile(source)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError("FILE", str(source), f"is not a backup written by fedtune ({error})") from error
    with archive:
        try:
            about = json.loads(archive.read(_LIST))
            hashes = {str(name): str(sha256) for name, sha256 in about["sha256"].items()}
            whose = str(about["kind"])
            if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in hashes):
                raise ValueError("a file name points outside the folder")
            for name, sha256 in hashes.items():
                with archive.open(name) as entry:
                    if hashlib.file_digest(entry, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
                        raise ValueError(f"{name} was changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile) as error:
            raise ConfigError("FILE", str(source), f"is not a complete backup written by fedtune ({error})") from error
        if whose != kind:
            raise ConfigError("FILE", str(source), f"must be the backup of a {kind}, but is the backup of a {whose}")
        yield archive, about


def list_backup_files(folder: Path, *, under: str) -> dict[str, Path]:
    """List the files of a folder, except symbolic links and partial files, as a mapping from backup name to path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {f"{under}/{path.relative_to(folder).as_posix()}": path for path in paths if ".partial" not in path.name}


# Backups of a site.


def back_up_site(target: Path, *, kit: Path, site_toml: Path) -> None:
    """Back up a site's policy, ledger, personalized adapters and state (paused or left), without its keys.

    Raises:
        ConfigError: the policy is invalid, the ledger or the site's key is missing, or `target` cannot be written.
        RunError: the ledger is inconsistent, or older than its anchor.
    """
    files = SiteFiles.from_site_toml(site_toml)
    if files.verify_ledger() is None:
        raise ConfigError("ledger", str(files.ledger), "is missing, so there is nothing to back up")
    state = {name: kit / name for name in _STATE if (kit / name).exists()}
    core = {"site.toml": site_toml, "ledger.db": files.ledger}
    kept = list_backup_files(kit / "adapters", under="adapters")
    write_backup(target, kind="site", files={**core, **state, **kept}, key=files.load_key())


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """Result of charging a restored ledger for the events that are only in its anchors."""

    ledger: SiteLedger
    gap: Counter[DpEvent]  # the additional charges
    last: int | None  # the sequence number of the newest missing event in an anchor; None: no event was missing
    since: Head | None  # the newest anchor with missing events, if its policy differs from site.toml

    def require_no_missing_events(self) -> None:
        """Check that no receipt refers to an event that is still missing; raise RunError otherwise."""
        if (doubt := self.ledger.history.furthest_doubt) is not None:
            raise RunError(
                f"the ledger is still in doubt: one of this site's receipts refers to event {doubt.sequence}, which is "
                "missing and not covered by any given anchor; find a newer anchor, or freeze the population"
            )


def find_anchors(site: SiteFiles, given: Path | None) -> list[Path]:
    """List the anchors for checking a restored ledger: the given anchor and the anchor of the policy.

    Raises:
        ConfigError: there is no anchor, so charges made after the backup cannot be detected.
    """
    anchors = [given] if given else []
    if site.anchor is not None and (site.anchor.is_file() or not anchors):
        anchors.append(site.anchor)
    if not anchors:
        raise ConfigError("--anchor", NOT_GIVEN, "is required, because the policy names no anchor")
    return anchors


def charge_missing_events(path: Path, site: SiteFiles, anchors: Sequence[Path]) -> RestoreResult:
    """Charge the ledger at `path` for the events that are in the anchors and missing from the ledger.

    Raises:
        ConfigError: a file is not an anchor, or the site's key is missing.
        RunError: the ledger was altered, or an anchor belongs to another ledger.
    """
    verify(path)  # the ledger may be old, but must be intact
    ledger = SiteLedger(path, site.policy, site.load_key())
    # The newest anchor first, whether it was given or comes from the policy.
    heads = sorted((Head.read(anchor) for anchor in anchors), key=lambda head: head.sequence, reverse=True)
    gap: Counter[DpEvent] = Counter()
    lacking = [head for head in heads if not ledger.history.covers_head(head)]
    for head in lacking:
        gap += ledger.charge_gap(head)
    since = next((head for head in lacking[:1] if head.policy not in ("", site.policy.digest())), None)
    return RestoreResult(
        ledger=ledger, gap=gap, last=max((head.sequence for head in lacking), default=None), since=since
    )


def restore_site(
    source: Path, *, kit: Path, site_toml: Path, anchor: Path | None
) -> tuple[SiteFiles, RestoreResult | None]:
    """Restore the missing files of a site from a backup.

    Before the ledger is restored, it is charged for the events that are in an anchor but missing from the backup.

    Guarantee: nothing in a backup is used before the site's key has verified its signature; no command from it runs.

    Returns:
        The paths of the site's files, and the restored ledger with its additional charges.  The latter is None if an
        intact ledger exists already.

    Raises:
        ConfigError: the backup, the policy, an anchor or the site's key is missing or invalid, the key did not sign the
            backup, the site is running, or the existing ledger is another ledger or older than the backup's.
        RunError: the backup's ledger cannot be trusted.
    """
    with open_backup(source, kind="site") as (archive, about):
        _require_signature(archive, about, site_toml, source)
        _restore_file("site.toml", archive, site_toml)
        files = SiteFiles.from_site_toml(site_toml)
        with lock_ledger(files.ledger), lock_anchor(files.anchor):
            made_up = _restore_ledger(archive, files, anchor)
        if kit.is_dir():  # otherwise `fedtune site init` creates the folder, which must not exist
            for name in about["sha256"]:
                if name in _STATE or name.startswith("adapters/"):
                    _restore_file(name, archive, kit / name)
    return files, made_up


def _require_signature(archive: zipfile.ZipFile, about: Mapping[str, Any], site_toml: Path, source: Path) -> None:
    """Verify a manifest's signature with the key of `site_toml`, or, without this file, of the policy in the backup."""
    with tempfile.TemporaryDirectory() as folder:
        policy_file = site_toml
        if not os.path.lexists(site_toml):
            _restore_file("site.toml", archive, policy_file := Path(folder) / "site.toml")
        files = SiteFiles(read_policy(policy_file), site_toml)
    if policy_file != site_toml and files.policy.key_command:
        bound = "is missing, and the backup's copy sets a key_command, which must not run unread: extract and review it"
        raise ConfigError("policy", str(site_toml), bound)
    public = files.load_key().public
    signed = is_signed(public, _PURPOSE, encode_for_signature(about), str(about.get("signature")))
    require("FILE", str(source), signed, f"must be a backup that this site signed, with the key {public}")


def _restore_ledger(archive: zipfile.ZipFile, files: SiteFiles, anchor: Path | None) -> RestoreResult | None:
    key = files.load_key()
    with tempfile.TemporaryDirectory(prefix=".restore.", dir=files.ledger.parent) as folder:
        copy = Path(folder) / "ledger.db"
        _restore_file("ledger.db", archive, copy)
        inside = verify(copy, site_key=key.public)
        if files.ledger.exists():
            try:
                there = verify(files.ledger)
            except RunError:
                pass  # damaged: moved aside below
            else:
                hashes, last = there.history.hashes, inside.history.length
                if hashes[last - 1 : last] != [inside.history.hash]:
                    bound = "is a different ledger, or older than the ledger in the backup: move it away"
                    raise ConfigError("ledger", str(files.ledger), bound)
                return None
        made_up = charge_missing_events(copy, files, find_anchors(files, anchor))
        made_up.require_no_missing_events()
        # Move a damaged ledger aside together with its journal, which SQLite would apply to the restored ledger.
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        for ending in ("-journal", "-wal", "-shm", ""):
            part = files.ledger.with_name(f"{files.ledger.name}{ending}")
            if part.exists():
                part.rename(files.ledger.with_name(f"{files.ledger.name}.damaged-{stamp}{ending}"))
        with translate_write_errors(files.ledger, key="ledger"):
            os.link(copy, files.ledger)
            fsync_folder(files.ledger.parent)
        if files.anchor is not None:
            write_durably(files.anchor, made_up.ledger.head().to_bytes())
        return made_up


# Backups of a server and a lead.


def back_up_server(target: Path, *, data: Path) -> None:
    """Back up a server's database and audit log.

    Raises:
        ConfigError: the database is missing, or `target` cannot be written.
    """
    if not (data / DATABASE).is_file():
        raise ConfigError("--data", str(data), f"is not the server's data folder: {DATABASE} is missing")
    others = {path.name: path for path in data.glob("audit.jsonl*") if path.is_file()}
    write_backup(target, kind="server", files={DATABASE: data / DATABASE, **others})


def restore_server(source: Path, *, data: Path) -> None:
    """Restore a server's database and audit log if no database exists.

    Raises:
        ConfigError: a database exists already, or `source` is not a server's backup.
    """
    with open_backup(source, kind="server") as (archive, about):
        for part in (DATABASE, f"{DATABASE}-wal"):
            if (data / part).exists():
                raise ConfigError("--data", str(data / part), "already exists: stop the server, and move it away")
        for name in about["sha256"]:
            _restore_file(name, archive, data / name)


def back_up_federation(target: Path, *, federation: Path) -> None:
    """Back up the whole folder of a federation: authority, kits, roster, receipts, and all keys of the lead.

    Raises:
        ConfigError: the folder is not a federation folder, or `target` cannot be written.
    """
    with FederationFolder.open_locked(federation) as held:
        if target.resolve().is_relative_to(held.folder.resolve()):
            bound = "must be outside the federation's folder: later backups would contain this one"
            raise ConfigError("FILE", str(target), bound)
        write_backup(target, kind="lead", files=list_backup_files(held.folder, under="federation"))


def restore_federation(source: Path, *, out: Path) -> None:
    """Restore the folder of a federation from a backup into the new folder `out`.

    Raises:
        ConfigError: `out` exists, or `source` is not a lead's backup.
    """
    with open_backup(source, kind="lead") as (archive, about), create_folder(out, key="--out") as folder:
        for name in about["sha256"]:
            _restore_file(name, archive, folder / Path(name).relative_to("federation"))

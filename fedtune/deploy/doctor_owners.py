"""Whether a site's files belong to the account of its process, and nobody else can change them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.account import name_of, own_group
from fedtune.deploy.doctor_check import Check, failed, ok
from fedtune.privacy.site_files import SiteFiles

_NAME = "files"
_ROOT = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A file or folder.

    Attributes:
        what: it is, in words.
        written: whether the site's process writes it.
        shown: what to call it in a command, where its path is not to be shown; None: its path.
    """

    what: str
    path: Path
    written: bool = False
    shown: str | None = None


def owners(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[Check]:
    """One line for each file or folder that is in the wrong hands; one in all where none is.

    Args:
        kit: the kit's folder; the account that its connection key belongs to is the one of the site's process.
        site_toml: the policy.
        files: what the policy names; None where it cannot be read.
    """
    key = kit / "connection_key.pem"
    account = key.stat().st_uid if key.exists() else os.geteuid()
    wrong = [check for place in _places(kit, site_toml, files) for check in _wrong(place, account)]
    yield from wrong
    if account != os.geteuid():
        found = f"the site's process runs as account {name_of(account)}, and this is {name_of(os.geteuid())}"
        fix = f"Run the doctor as {name_of(account)}, for instance with `sudo -u {name_of(account)}`."
        yield failed(f"{_NAME}: account", found, fix=fix)
    elif not wrong:
        yield ok(_NAME, f"those of account {name_of(account)} are its own, and no other account but root changes any")


def _places(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[_Place]:
    yield _Place(what="policy", path=site_toml)
    yield _Place(what="policy's folder", path=site_toml.absolute().parent)
    yield _Place(what="kit", path=kit, written=True)
    yield from (_Place(what=name, path=kit / name) for name in ("kit.toml", "ca.pem", "site.pem", "models"))
    yield _Place(what="connection key", path=kit / "connection_key.pem", written=True)
    state = kit / "state"
    yield _Place(what="state", path=state, written=True)
    yield from (
        _Place(what=f"state/{path.relative_to(state)}", path=path, written=True) for path in sorted(_within(state))
    )
    if files is None:
        return
    yield _Place(what="ledger", path=files.ledger, written=True)
    yield _Place(what="ledger's folder", path=files.ledger.absolute().parent, written=True)
    lock = files.ledger.with_name(f"{files.ledger.name}.serving")
    yield _Place(what="ledger's lock", path=lock, written=True)
    yield _Place(what="site key", path=files.site_key, written=True)
    if files.anchor is not None:
        yield _Place(what="anchor", path=files.anchor, written=True)
        yield _Place(what="anchor's folder", path=files.anchor.absolute().parent, written=True)
    for dataset in files.policy.dataset:
        if dataset.path:
            shown = f"the file that `path` of [[dataset]] {dataset.id} names"
            yield _Place(what=f"data {dataset.id}", path=site_toml.parent / dataset.path, shown=shown)


def _within(folder: Path) -> Iterator[Path]:
    """Files and folders in `folder`, no link followed; those that may not be looked at are left out."""
    for base, folders, names in os.walk(folder):
        yield from (Path(base) / name for name in (*folders, *names))


def _wrong(place: _Place, account: int) -> Iterator[Check]:
    try:
        found = place.path.stat()
    except OSError:
        return  # that it is missing, or closed to this account, another line says
    name, shown = f"{_NAME}: {place.what}", place.shown or str(place.path)
    if place.shown is None and not _in_right_hands(place, found, account):
        owner, own = name_of(found.st_uid), name_of(account)
        said = f"{shown} belongs to account {owner}, and the site's process runs as {own}"
        yield failed(name, said, fix=f"Run `chown {own}: {shown}`.")
        return
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    who = "".join(_others(found, account))
    if who and not sticky:
        said = {"o": "every account", "g": f"everyone in group {found.st_gid}"}[who[-1]]
        command = f"chmod {','.join(f'{one}-w' for one in who)}"
        fix = f"Run `{command} {shown}`." if place.shown is None else f"Run `{command}` on {shown}."
        yield failed(name, f"{shown} can be changed by {said}", fix=fix)


def _others(found: os.stat_result, account: int) -> Iterator[str]:
    """Who else may write, as chmod calls them."""
    own = own_group(account)
    if found.st_mode & stat.S_IWGRP and found.st_gid not in (own if own is not None else os.getegid(), _ROOT):
        yield "g"
    if found.st_mode & stat.S_IWOTH:
        yield "o"


def _in_right_hands(place: _Place, found: os.stat_result, account: int) -> bool:
    """Whether the account, or root for it, has the file; root may also own a folder that the account may write into."""
    if found.st_uid == account:
        return True
    open_to = stat.S_ISDIR(found.st_mode) and os.access(place.path, os.W_OK)
    return found.st_uid == _ROOT and (not place.written or open_to)

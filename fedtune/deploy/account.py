"""The account that a site's files belong to: its process runs as it, and its commands act as it when root calls them.

What root wrote there would be root's, and the process could neither read nor write it any more.  And whoever has the
account could put a link in the place of a file, which root would follow.
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

from fedtune.spec import ConfigError


def act_as_owner(*places: Path) -> None:
    """Become the owner of the first of these that exists, for good, where root runs this and it is not root's.

    Raises:
        ConfigError: this root may not, as in some containers; or that account cannot read this Python.
    """
    place = next((place for place in places if os.path.lexists(place)), None)
    if place is None or os.geteuid() != 0:
        return
    owner = place.lstat()  # of a link itself, which is not followed
    if owner.st_uid == 0:
        return
    known = _known(owner.st_uid)
    group = known.pw_gid if known else owner.st_gid
    groups = os.getgrouplist(known.pw_name, group) if known else [group]
    name = name_of(owner.st_uid)
    try:
        os.setgroups(groups)
        os.setresgid(group, group, group)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    except OSError as error:
        bound = f"belongs to account {name}, which this root may not become ({error.strerror}): run this as {name}"
        raise ConfigError("account", str(place), bound) from None
    if not _python_is_readable():
        bound = f"cannot be read by account {name}, to which {place} belongs: install fedtune in /opt, for instance"
        raise ConfigError("Python", sys.prefix, bound)
    os.environ["HOME"] = known.pw_dir if known else "/"
    sys.stderr.write(f"fedtune: acting as account {name}, to which {place} belongs\n")


def name_of(uid: int) -> str:
    """The account's name; its number where it has none."""
    known = _known(uid)
    return known.pw_name if known else str(uid)


def own_group(uid: int) -> int | None:
    """The account's own group; None for an account without a name."""
    known = _known(uid)
    return known.pw_gid if known else None


def _python_is_readable() -> bool:
    return os.access(os.__file__, os.R_OK) and os.access(__file__, os.R_OK)


def _known(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None

"""Checks of a site's machine: clock, disks, memory, GPU and file owners."""

from __future__ import annotations

import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fedtune.ops.doctor.check import (
    SERVER,
    DoctorCheck,
    build_failed_check,
    build_passed_check,
    build_skipped_check,
    build_warning,
)
from fedtune.ops.files import get_account_name, get_primary_group
from fedtune.privacy.site_files import SiteFiles
from fedtune.system import effective_group, effective_user, grp

MAX_AHEAD_S, WRONG_S = 5.0, 60.0
"""A server rejects signatures dated more than 5 s in the future (Flower's SYSTEM_TIME_TOLERANCE) or some minutes in the
past.  An offset of a minute indicates that the clock is not synchronized."""
LITTLE_DISK_BYTES, TOO_LITTLE_DISK_BYTES = 2 * 2**30, 200 * 2**20
NETWORK_FILES = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "glusterfs", "lustre"})
_MODEL_COPIES, _BESIDE_MODEL_BYTES = 3, 2**30
_GIB = 2**30
_NAME = "files"
_ROOT = 0


def check_clock(ahead_s: tuple[float, float] | None, *, kept: bool = False) -> DoctorCheck:
    """Check the offset of this machine's clock from the server's clock.

    Args:
        ahead_s: the offset of this clock from the server's clock, and its uncertainty, in seconds; None if the server
            cannot be reached.
        kept: whether this machine's clock is synchronized, in which case the server's clock is wrong.
    """
    name, fix = "clock", "Turn on time synchronization, for instance with `timedatectl set-ntp true`."
    if ahead_s is None:
        return build_skipped_check(name, "the server's clock could not be read")
    ahead, unsure = ahead_s
    off = max(0.0, abs(ahead) - unsure)
    if kept and off > MAX_AHEAD_S:
        problem = (
            f"the server's clock is {abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead'}, "
            "but this machine's clock is synchronized"
        )
        fix = "Ask the server's operators to turn on time synchronization."
        if off > WRONG_S:
            return build_failed_check(name, problem, fix=fix, exit_code=SERVER)
        return build_warning(name, problem, fix=fix)
    shown = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if off > WRONG_S:
        return build_failed_check(name, shown, fix=fix)
    if off > MAX_AHEAD_S:
        more = f"; the server refuses signatures more than {MAX_AHEAD_S:g} s ahead" if ahead > 0 else ""
        return build_warning(name, shown + more, fix=fix)
    return build_passed_check(name, f"within {MAX_AHEAD_S:g} s of the server's")


def check_disks(
    folders: Mapping[str, Path], *, free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
) -> Iterator[DoctorCheck]:
    """Check the free disk space of each storage folder.

    Args:
        folders: kind of stored file -> its folder, which need not exist.
        free_bytes: returns the free space on the disk of a folder.
    """
    for what, folder in folders.items():
        name, free = f"disk of the {what}", free_bytes(find_nearest_existing(folder))
        space = f"{free / _GIB:.1f} GiB free"
        if free < TOO_LITTLE_DISK_BYTES:
            space = f"{free / 2**20:.0f} MiB free, but at least {TOO_LITTLE_DISK_BYTES // 2**20} MiB are needed"
            fix = "Free some space there: training stops if the ledger cannot be written."
            yield build_failed_check(name, space, fix=fix)
        elif free < LITTLE_DISK_BYTES:
            yield build_warning(name, space, fix=f"Free at least {LITTLE_DISK_BYTES // _GIB} GiB on that disk.")
        else:
            yield build_passed_check(name, space)


def check_ledger_disk(ledger: Path, *, system: Path = Path("/")) -> DoctorCheck:
    """Check that the ledger is on a local disk, because locks and syncs on a network file system depend on the file
    server.

    The type of the file system is read from the kernel's mount table below `system`.
    """
    name, kind, deepest = "file system", "an unknown file system", 0
    place = Path(os.path.realpath(find_nearest_existing(ledger)))
    for line in _read_text(system / "proc/self/mounts").splitlines():
        _, folder, file_system, *_ = line.split()
        folder = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), folder)  # octal escapes, such as \040
        # The deepest mount point contains the ledger; a later mount at one folder hides an earlier one.
        if place.is_relative_to(folder) and len(folder) >= deepest:
            kind, deepest = file_system, len(folder)
    if kind in NETWORK_FILES:
        problem = f"{kind}, a network file system, on which SQLite's locks and syncs are unreliable"
        return build_warning(name, problem, fix="Stop the site, and move the ledger to a local disk.")
    return build_passed_check(name, f"{kind}, on this machine")


def check_socket(place: Path) -> DoctorCheck:
    """Check that only the site's own user and one group can open the site's Unix socket."""
    name = "socket"
    if not place.parent.is_dir():
        fix = "Create it for the site's user and the SuperNode's group; systemd's RuntimeDirectory= does at each start."
        return build_warning(name, "its folder is missing", fix=fix)
    if not os.path.lexists(place):
        return build_passed_check(name, "created when the site starts")
    status = place.lstat()
    if not stat.S_ISSOCK(status.st_mode):
        fix = "Set `socket` in site.toml to another path."
        return build_failed_check(name, "the path is a file that is not a socket", fix=fix)
    if status.st_mode & stat.S_IRWXO:
        fix = "Stop the site, remove the socket, and start the site again."
        return build_failed_check(name, "every user of this machine can open it", fix=fix)
    number = status.st_gid
    named = grp and next((entry.gr_name for entry in grp.getgrall() if entry.gr_gid == number), None)
    group = named or str(number)
    return build_passed_check(name, f"accessible only to the site's user and members of group {group}")


def check_anchor_disk(ledger: Path, anchor: Path | None) -> DoctorCheck:
    """Check that the anchor is on another disk than the ledger, so that it detects a rollback of the ledger's disk."""
    name = "anchor's place"
    if anchor is None:
        problem = "the policy names no anchor, so a rollback of the ledger is not detected here"
        return build_warning(name, problem, fix="Set `anchor` in site.toml to a file on another disk.")
    if find_nearest_existing(anchor).stat().st_dev == find_nearest_existing(ledger).stat().st_dev:
        problem = "on the ledger's own disk: both can be rolled back together"
        fix = "Set `anchor` in site.toml to a file on another disk, and move the file there."
        return build_warning(name, problem, fix=fix)
    return build_passed_check(name, "on a different disk than the ledger")


def check_memory(model_bytes: int | None, *, in_four_bits: bool = False, system: Path = Path("/")) -> DoctorCheck:
    """Check that the available memory covers a rough estimate: 3 times the size of the largest model's files, plus 1
    GiB.

    The factor 3 covers weights, activations and gradients.

    Args:
        model_bytes: size of the weights of the largest installed base model; None: no model is installed.
        in_four_bits: whether runs quantize the base model to 4 bits, so that the full files are in memory only while
            the model is loaded.
        system: root of the kernel's files on memory, including a container's limit.
    """
    name, machine, cgroup = "memory", system / "proc/meminfo", system / "sys/fs/cgroup"
    figures = dict(re.findall(r"^(\w+): +(\d+) kB$", _read_text(machine), re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= set(figures):
        return build_skipped_check(name, f"{machine} does not report this machine's memory")
    total, available = (1024 * int(figures[key]) for key in ("MemTotal", "MemAvailable"))
    if (limit := _read_number(cgroup / "memory.max")) is not None and limit < total:
        total, available = limit, min(available, limit - (_read_number(cgroup / "memory.current") or 0))
    memory = f"{available / _GIB:.1f} GiB of {total / _GIB:.1f} GiB available"
    if model_bytes is None:
        return build_passed_check(name, f"{memory}; the required memory is known once a base model is installed")
    needed = (1 if in_four_bits else _MODEL_COPIES) * model_bytes + _BESIDE_MODEL_BYTES
    memory += f", about {needed / _GIB:.1f} GiB needed"
    if available < needed:
        return build_warning(name, memory, fix="End other processes, or run the site on a machine with more memory.")
    return build_passed_check(name, memory)


def _read_text(file: Path) -> str:
    """Read a text file; empty if it cannot be read."""
    try:
        return file.read_text("utf-8", "surrogateescape")
    except OSError:
        return ""


def _read_number(file: Path) -> int | None:
    """Read a number from a file; None if the file is missing or contains no number."""
    text = _read_text(file).strip()
    return int(text) if text.isdecimal() else None


def check_gpu(
    device: str, *, ask: Callable[[], str], driver: Path = Path("/proc/driver/nvidia/version")
) -> DoctorCheck:
    """Check that the device in the policy is available.

    Args:
        device: "auto", "cpu" or "cuda".
        ask: returns the name of the GPU, or "" if torch cannot use any; not called for the CPU, because importing torch
            is slow.
        driver: a file that exists if an NVIDIA driver is loaded.
    """
    name, fix = "GPU", "Install matching versions of driver and torch: compare `nvidia-smi` and torch.version.cuda."
    if device == "cpu":
        return build_passed_check(name, "not used: the policy sets the CPU as this site's device")
    if gpu := ask():
        return build_passed_check(name, gpu)
    if device == "cuda":
        fix += ' Or set `device = "auto"` under [machine] in site.toml.'
        return build_failed_check(name, "torch cannot use a GPU, but the policy requires one", fix=fix)
    if driver.exists():
        problem = "a driver is installed, but torch cannot use a GPU; this site trains on the CPU"
        return build_warning(name, problem, fix=fix)
    return build_passed_check(name, "no GPU; this site trains on the CPU")


def probe_gpu() -> str:
    """Return name and memory of the GPU that torch would use; empty if a small test computation fails."""
    from fedtune.training.accelerators import find_accelerator, get_device_name, get_total_memory

    with warnings.catch_warnings(), suppress(RuntimeError):  # the driver does not work
        warnings.simplefilter("ignore")  # torch warns about an old driver, which the check reports anyway
        if (device := find_accelerator()) is not None:
            return f"{get_device_name(device)} with {get_total_memory(device) / _GIB:.0f} GiB"
    return ""


def find_nearest_existing(path: Path) -> Path:
    """Return `path` if it exists, otherwise its nearest existing parent folder."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_owners(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[DoctorCheck]:
    """Check the owners of the policy, the keys and the ledger's files.

    Yields one failed check per wrong owner, or a single passed check.  The expected owner is the account of the site's
    process, which owns the kit's connection key.  `files` is None if the policy cannot be read.
    """
    key = kit / "connection_key.pem"
    account = key.stat().st_uid if key.exists() else effective_user()
    places = {"policy": site_toml, "kit": kit, "connection key": key}
    if files is not None:
        folder = files.ledger.absolute().parent
        places |= {"ledger": files.ledger, "ledger's folder": folder, "site key": files.site_key}
        if files.anchor is not None:
            places["anchor"] = files.anchor
    wrong = [check for what, path in places.items() if (check := _check_owner(what, path, account)) is not None]
    yield from wrong
    user = get_account_name(account)
    if account != effective_user():
        problem = f"the site's process runs as account {user}, but this is {get_account_name(effective_user())}"
        fix = f"Run the doctor as {user}, for instance with `sudo -u {user}`."
        yield build_failed_check(f"{_NAME}: account", problem, fix=fix)
    elif not wrong:
        finding = f"all files belong to account {user}, and only this account and root can change them"
        yield build_passed_check(_NAME, finding)


def _check_owner(what: str, path: Path, account: int) -> DoctorCheck | None:
    try:
        status = path.stat()
    except OSError:
        return None  # reported by another check
    name, folder = f"{_NAME}: {what}", stat.S_ISDIR(status.st_mode)
    # Root may own files that the site's process only reads, and folders that the process can write to.
    may_be_roots = what == "policy" or (folder and os.access(path, os.W_OK))
    if status.st_uid != account and not (status.st_uid == _ROOT and may_be_roots):
        user = get_account_name(account)
        problem = f"{path} belongs to account {get_account_name(status.st_uid)}, but the site's process runs as {user}"
        return build_failed_check(name, problem, fix=f"Run `chown {user}: {path}`.")
    own_gid = get_primary_group(account)
    trusted_gids = (effective_group() if own_gid is None else own_gid, _ROOT)
    others = status.st_mode & stat.S_IWGRP and status.st_gid not in trusted_gids
    # Other accounts with write access, in the notation of chmod.
    who = ("g" if others else "") + ("o" if status.st_mode & stat.S_IWOTH else "")
    if not who or (folder and status.st_mode & stat.S_ISVTX):
        return None
    writers = {"o": "every account", "g": f"every member of group {status.st_gid}"}[who[-1]]
    command = f"chmod {','.join(f'{letter}-w' for letter in who)}"
    return build_failed_check(name, f"{path} can be changed by {writers}", fix=f"Run `{command} {path}`.")

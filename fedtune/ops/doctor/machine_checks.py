"""Whether a site's machine is fit: its clock, its disks, its memory, its GPU, and whose the site's files are."""

from __future__ import annotations

import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from fedtune.ops.doctor.check import Check, failed, ok, skipped, warning
from fedtune.ops.files import name_of, own_group
from fedtune.ops.kits.certificates import Certificate
from fedtune.privacy.site_files import SiteFiles

MOST_AHEAD_S, WRONG_S = 5.0, 60.0
"""A server takes nothing that was signed more than 5 s in its future (Flower's SYSTEM_TIME_TOLERANCE), or some minutes
in its past; a clock that is off by a minute is not kept by anything."""
LITTLE_DISK_BYTES, TOO_LITTLE_DISK_BYTES = 2 * 2**30, 200 * 2**20
NETWORK_FILES = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "glusterfs", "lustre"})
_MODEL_COPIES, _BESIDE_MODEL_BYTES = 3, 2**30
_GIB = 2**30
_NAME = "files"
_ROOT = 0

FreeBytes = Callable[[Path], int]


def clock(ahead_s: tuple[float, float] | None, *, certificate: Certificate | None, now: datetime) -> Check:
    """The clock here beside the server's, and beside the day on which the site's certificate begins.

    Args:
        ahead_s: by how much it is ahead of the server's, and how far off that may be; None where the server is out of
            reach.
        certificate: None where the kit has none that can be read.
        now: by this machine's clock.
    """
    name, fix = "clock", "Turn on time synchronisation, for instance with `timedatectl set-ntp true`."
    if certificate is not None and now < certificate.not_before:
        found = f"says {now:%Y-%m-%d %H:%M} UTC, before the site's certificate was made"
        return failed(name, found, fix=fix)
    if ahead_s is None:
        return skipped(name, "the server's clock could not be asked")
    ahead, unsure = ahead_s
    off = max(0.0, abs(ahead) - unsure)
    shown = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if off > WRONG_S:
        return failed(name, shown, fix=fix)
    if off > MOST_AHEAD_S:
        more = f"; the server refuses what is signed more than {MOST_AHEAD_S:g} s ahead" if ahead > 0 else ""
        return warning(name, shown + more, fix=fix)
    return ok(name, f"within {MOST_AHEAD_S:g} s of the server's")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def disks(folders: Mapping[str, Path], *, free_bytes: FreeBytes = _free_bytes) -> Iterator[Check]:
    """Free space where each thing is kept; `folders` maps what is kept to where, which need not exist yet."""
    for what, folder in folders.items():
        name, free = f"disk of the {what}", free_bytes(existing(folder))
        found = f"{free / _GIB:.1f} GiB free"
        if free < TOO_LITTLE_DISK_BYTES:
            found = f"{free / 2**20:.0f} MiB free, and at least {TOO_LITTLE_DISK_BYTES // 2**20} MiB are needed"
            yield failed(name, found, fix="Make room on that disk: a ledger that cannot be written stops training.")
        elif free < LITTLE_DISK_BYTES:
            yield warning(name, found, fix=f"Make room on that disk, {LITTLE_DISK_BYTES // _GIB} GiB at least.")
        else:
            yield ok(name, found)


def ledger_place(ledger: Path, *, mounts: Path = Path("/proc/mounts")) -> Check:
    """Whether the ledger lies on a disk of this machine: over a network, locks and syncs are promises of a server."""
    name, kind = "file system", file_system(ledger, mounts=mounts)
    if kind is None:
        return skipped(name, "this system does not say what is mounted")
    if kind in NETWORK_FILES:
        found = f"{kind}, over a network: SQLite's locks and syncs are not to be relied on there"
        return warning(name, found, fix="Move the ledger to a disk of this machine, and stop the site while you do.")
    return ok(name, f"{kind}, on this machine")


def anchor_place(ledger: Path, anchor: Path | None) -> Check:
    """Whether the anchor can notice that the ledger's disk was put back."""
    name = "anchor's place"
    if anchor is None:
        found = "the policy names no anchor: nothing here notices when the ledger is put back to an older copy"
        return warning(name, found, fix="Set `anchor` in site.toml to a file on another disk.")
    if existing(anchor).stat().st_dev == existing(ledger).stat().st_dev:
        found = "on the ledger's own disk: both can be put back together"
        return warning(name, found, fix="Set `anchor` in site.toml to a file on another disk, and move the file there.")
    return ok(name, "on another disk than the ledger")


def memory(
    model_bytes: int | None,
    *,
    in_four_bits: bool = False,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/sys/fs/cgroup"),
) -> Check:
    """Memory beside a rough need: three times the largest model's files (weights, activations, gradients), and 1 GiB.

    Args:
        model_bytes: size of the largest installed base model's weights; None: none is installed.
        in_four_bits: a run keeps no other base than that, of which the files are in memory once, while it is loaded.
        meminfo: Linux's own account.
        cgroup: that of the container, where this runs in one that is limited.
    """
    name = "memory"
    try:
        fields = dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB$", meminfo.read_text()))
        total, available = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return skipped(name, "this system does not say how much there is")
    if (limit := _number(cgroup / "memory.max")) is not None and limit < total:
        total, available = limit, min(available, limit - (_number(cgroup / "memory.current") or 0))
    found = f"{available / _GIB:.1f} GiB of {total / _GIB:.1f} GiB available"
    if model_bytes is None:
        return ok(name, f"{found}; the need is known when a base model is installed")
    needed = (1 if in_four_bits else _MODEL_COPIES) * model_bytes + _BESIDE_MODEL_BYTES
    found += f", about {needed / _GIB:.1f} GiB needed"
    if available < needed:
        return warning(name, found, fix="End other processes, or run the site on a machine with more memory.")
    return ok(name, found)


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file, or a word in it."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The machine's GPU, as torch sees it.

    Attributes:
        usable: a small computation on it gave the right result.
        name: and memory; empty where it is not usable.
        driver: version of the NVIDIA driver; empty: none is loaded.
        build: CUDA version that torch was built for; empty: a build for CPUs.
    """

    usable: bool
    name: str
    driver: str
    build: str


def gpu(device: str, *, ask: Callable[[], Gpu]) -> Check:
    """Whether the device that the policy wants is there.

    Args:
        device: "auto", "cpu" or "cuda".
        ask: torch takes a second to import, and is not asked where the site trains on its CPU.
    """
    name = "GPU"
    if device == "cpu":
        return ok(name, "not wanted: the policy says that this site trains on the CPU")
    found = ask()
    if found.usable:
        return ok(name, f"{found.name}, driver {found.driver or 'unknown'}, torch for CUDA {found.build}")
    tolerant = device == "auto"
    if found.driver and found.build:
        why = f"driver {found.driver} is there, but torch for CUDA {found.build} cannot use it"
        fix = "Install a driver that is new enough, or the torch that is built for this one."
    elif found.driver:
        why = f"driver {found.driver} is there, but this torch is built for CPUs"
        fix = "Install a torch that is built for CUDA."
    elif tolerant:
        return ok(name, "none: this site trains on the CPU")
    else:
        why, fix = "none, and the policy wants one", 'Set `device = "auto"` under [machine] in site.toml, or add a GPU.'
    return warning(name, f"{why}; this site trains on the CPU", fix=fix) if tolerant else failed(name, why, fix=fix)


def this_gpu(*, version: Path = Path("/proc/driver/nvidia/version")) -> Gpu:
    """The GPU that torch would train on."""
    import torch

    driver = ""
    if version.is_file() and (found := re.search(r"\d+\.\d+(\.\d+)?", version.read_text().partition("\n")[0])):
        driver = found[0]
    build, usable, name = torch.version.cuda or "", False, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old; the line says it
        try:
            if torch.cuda.is_available():
                usable = bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
                whole = torch.cuda.get_device_properties(0).total_memory
                name = f"{torch.cuda.get_device_name(0)} with {whole / _GIB:.0f} GiB"
        except RuntimeError:  # no kernels for this GPU, or a driver that fails
            usable = False
    return Gpu(usable=usable, name=name, driver=driver, build=build)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def file_system(path: Path, *, mounts: Path) -> str | None:
    """The type of the file system that holds `path`; None where that is not known."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place = os.path.realpath(existing(path))
    best, kind = -1, None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        # Of mounts at the same place the last one is seen.
        if Path(place).is_relative_to(point) and len(point) >= best:
            best, kind = len(point), fields[2]
    return kind


class _Place(NamedTuple):
    """A file or folder: what it is, in words, whether the site's process writes it, and a name in place of its path."""

    what: str
    path: Path
    written: bool = False
    shown: str | None = None


def owners(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[Check]:
    """One line for each file or folder that is in the wrong hands; one in all where none is.

    The account that the kit's connection key belongs to is the one of the site's process; `files` is None where the
    policy cannot be read.
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
    yield _Place("policy", site_toml)
    yield _Place("policy's folder", site_toml.absolute().parent)
    yield _Place("kit", kit, written=True)
    yield from (_Place(name, kit / name) for name in ("kit.toml", "ca.pem", "site.pem", "models"))
    yield _Place("connection key", kit / "connection_key.pem", written=True)
    state = kit / "state"
    yield _Place("state", state, written=True)
    # Files and folders in it, no link followed; those that may not be looked at are left out.
    within = sorted(Path(base) / name for base, folders, names in os.walk(state) for name in (*folders, *names))
    yield from (_Place(f"state/{path.relative_to(state)}", path, written=True) for path in within)
    if files is None:
        return
    yield _Place("ledger", files.ledger, written=True)
    yield _Place("ledger's folder", files.ledger.absolute().parent, written=True)
    yield _Place("ledger's lock", files.ledger.with_name(f"{files.ledger.name}.serving"), written=True)
    yield _Place("site key", files.site_key, written=True)
    if files.anchor is not None:
        yield _Place("anchor", files.anchor, written=True)
        yield _Place("anchor's folder", files.anchor.absolute().parent, written=True)
    for dataset in files.policy.dataset:
        if dataset.path:
            shown = f"the file that `path` of [[dataset]] {dataset.id} names"
            yield _Place(f"data {dataset.id}", site_toml.parent / dataset.path, shown=shown)


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
    # Who else may write, as chmod calls them.
    own_gid = own_group(account)
    others = found.st_mode & stat.S_IWGRP and found.st_gid not in (os.getegid() if own_gid is None else own_gid, _ROOT)
    who = ("g" if others else "") + ("o" if found.st_mode & stat.S_IWOTH else "")
    if who and not sticky:
        said = {"o": "every account", "g": f"everyone in group {found.st_gid}"}[who[-1]]
        command = f"chmod {','.join(f'{one}-w' for one in who)}"
        fix = f"Run `{command} {shown}`." if place.shown is None else f"Run `{command}` on {shown}."
        yield failed(name, f"{shown} can be changed by {said}", fix=fix)


def _in_right_hands(place: _Place, found: os.stat_result, account: int) -> bool:
    """Whether the account, or root for it, has the file; root may also own a folder that the account may write into."""
    if found.st_uid == account:
        return True
    open_to = stat.S_ISDIR(found.st_mode) and os.access(place.path, os.W_OK)
    return found.st_uid == _ROOT and (not place.written or open_to)

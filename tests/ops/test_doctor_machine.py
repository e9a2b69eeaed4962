"""The doctor's machine checks: thresholds, texts, file owners, and results on this machine."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.ops.doctor import machine_checks as machine
from fedtune.ops.doctor import site_checks
from fedtune.ops.doctor.check import SERVER, DoctorCheck, Status
from fedtune.ops.files import get_account_name
from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_files import SiteFiles

from .conftest import check_snapshot

GIB, MIB = 2**30, 2**20


def check_lines(name: str, found: dict[object, DoctorCheck]) -> None:
    """Compare findings and fixes with a snapshot."""
    lines = [
        f"{case}: {one.status}, {one.found}" + (f" -> {one.fix}" if one.fix else "") for case, one in found.items()
    ]
    check_snapshot(name, "\n".join(lines))


def test_clock_check_allows_five_seconds_plus_uncertainty() -> None:
    """A slow answer increases the uncertainty and is not counted as a clock offset."""
    cases = [(0.0, 0.5), (5.4, 0.5), (-6.0, 0.5), (6.0, 0.5), (60.4, 0.5), (-61.0, 0.5), (9.0, 8.0)]
    check_lines(
        "a clock that is ahead",
        {f"{ahead} +- {off} s": machine.check_clock((ahead, off)) for ahead, off in cases},
    )
    # If this machine's clock is synchronized, the server's clock is wrong.
    assert [machine.check_clock(case, kept=True).status for case in cases] == [
        machine.check_clock(case).status for case in cases
    ]
    check = machine.check_clock((-61.0, 0.5), kept=True)
    assert (check.found, check.exit_code) == (
        "the server's clock is 61 s ahead, but this machine's clock is synchronized",
        SERVER,
    )


def test_disk_check_warns_and_fails_by_free_space(tmp_path: Path) -> None:
    paths: list[Path] = []

    def check_disk(mib: int) -> DoctorCheck:
        free = {"ledger": tmp_path / "not" / "yet"}
        (check,) = machine.check_disks(free, free_bytes=lambda path: paths.append(path) or mib * MIB)
        return check

    check_lines("free disk space", {f"{mib} MiB": check_disk(mib) for mib in (2048, 2047, 200, 199)})
    assert set(paths) == {tmp_path}, "a folder that does not exist is on its parent's disk"


def test_ledger_and_anchor_checks_detect_network_and_shared_disks(tmp_path: Path) -> None:
    share, mounts = tmp_path / "a share", tmp_path / "proc/self/mounts"
    mounts.parent.mkdir(parents=True)
    (share / "north").mkdir(parents=True)
    (tmp_path / "link").symlink_to(share / "north")
    escaped = str(share).replace(" ", r"\040")
    rows = ("rootfs / ramfs rw", "/dev/vda / ext4 rw", f"old {escaped} xfs rw", f"//it/share {escaped} cifs rw 0 0")
    mounts.write_text("".join(f"{row}\n" for row in rows))
    for path in ("a share/north/ledger.db", "link/ledger.db", "a share/not/yet/ledger.db"):
        check = machine.check_ledger_disk(tmp_path / path, system=tmp_path)
        assert check.status is Status.WARNING
        assert check.found.startswith("cifs, a network file system")
    for path in ("ledger.db", "a share2/ledger.db"):
        check = machine.check_ledger_disk(tmp_path / path, system=tmp_path)
        assert (check.status, check.found) == (Status.OK, "ext4, on this machine")
    assert machine.check_ledger_disk(tmp_path, system=tmp_path / "none").found.startswith("an unknown file system")
    ledger = tmp_path / "ledger.db"
    assert "names no anchor" in machine.check_anchor_disk(ledger, None).found
    local = machine.check_anchor_disk(ledger, tmp_path / "other" / "anchor.json")
    assert local.status is Status.WARNING
    assert "own disk" in local.found
    assert machine.check_anchor_disk(ledger, Path("/proc/anchor.json")).status is Status.OK


def test_memory_check_compares_model_size_with_available_memory(tmp_path: Path) -> None:
    (figures := tmp_path / "proc/meminfo").parent.mkdir()
    (cgroup := tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    figures.write_text("MemTotal:        8388608 kB\nMemFree:          102400 kB\nMemAvailable:    4194304 kB\n")

    def list_lines() -> dict[object, DoctorCheck]:
        sizes = {None: None, "1 GiB": GIB, "1.01 GiB": int(1.01 * GIB)}
        in_four_bits = {"3 GiB in four bits": 3 * GIB, "3.01 GiB in four bits": int(3.01 * GIB)}  # of its files
        return {
            name: machine.check_memory(size, in_four_bits=name in in_four_bits, system=tmp_path)
            for name, size in (sizes | in_four_bits).items()
        }

    check_lines("memory for a model", list_lines())
    (cgroup / "memory.max").write_text("max\n")
    check_lines("memory for a model", list_lines())
    (cgroup / "memory.max").write_text(f"{3 * GIB}\n")
    (cgroup / "memory.current").write_text(f"{GIB}\n")
    assert machine.check_memory(None, system=tmp_path).found.startswith("2.0 GiB of 3.0 GiB available")
    assert machine.check_memory(GIB, system=tmp_path / "none").status is Status.SKIPPED


def test_gpu_check_compares_the_policy_with_device_and_driver(tmp_path: Path) -> None:
    def check_gpu(device: str, name: str, driver: str) -> DoctorCheck:
        calls: list[str] = []
        check = machine.check_gpu(device, ask=lambda: calls.append(name) or name, driver=tmp_path / driver)
        assert bool(calls) == (device != "cpu"), "torch is slow to import, so it must be used only if needed"
        return check

    (tmp_path / "driver").touch()
    devices = [("cpu", "an H200"), ("auto", "an H200"), ("cuda", "an H200"), ("auto", ""), ("cuda", "")]
    cases = [(*case, driver) for case in devices for driver in ("driver", "no driver")]
    check_lines("the device required by a policy", {", ".join(filter(None, case)): check_gpu(*case) for case in cases})


def test_machine_checks_work_on_the_current_machine(tmp_path: Path) -> None:
    assert bool(machine.probe_gpu()) is torch.accelerator.is_available()
    assert " GiB available" in machine.check_memory(1).found
    assert machine.check_ledger_disk(tmp_path / "ledger.db").found.endswith(", on this machine")
    (check,) = machine.check_disks({"kit": tmp_path})
    assert check.found.endswith(" GiB free")


# The owner of keys, policy and ledger.

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file")
STRANGER = 54321
PLACES = {
    "kit": "kit",
    "ledger": "ledger.db",
    "site key": "site_key.pem",
    "anchor": "other disk/anchor.json",
    "policy": "site.toml",
}


@pytest.fixture
def site(tmp_path: Path, site_policy: Any) -> Path:
    """A site's folder, owned by its account."""
    for folder in ("kit", "other disk"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kit" / "connection_key.pem").touch(mode=0o600)
    write_policy(site_policy("north", anchor="other disk/anchor.json"), tmp_path / "site.toml")
    SiteFiles.from_site_toml(tmp_path / "site.toml").open_ledger(create=True)
    return tmp_path


def check_owners(site: Path) -> list[DoctorCheck]:
    return list(machine.check_owners(site / "kit", site / "site.toml", SiteFiles.from_site_toml(site / "site.toml")))


@pytest.mark.parametrize(("what", "name"), {**PLACES, "connection key": "kit/connection_key.pem"}.items())
def test_world_writable_files_are_reported_with_a_working_fix(site: Path, what: str, name: str) -> None:
    path = site / name
    path.chmod(path.stat().st_mode | 0o022)
    (check,) = check_owners(site)
    assert (check.name, check.status) == (f"files: {what}", Status.FAILED)
    assert check.found == f"{path} can be changed by every account"
    # The suggested command must suffice.
    command = check.fix.removeprefix("Run `").removesuffix("`.").replace(str(path), f"'{path}'")
    subprocess.run(command, shell=True, check=True)
    (check,) = check_owners(site)
    assert check.status is Status.OK
    assert get_account_name(os.geteuid()) in check.found


@AS_ROOT
@pytest.mark.parametrize(("what", "name"), PLACES.items())
def test_files_of_another_account_or_group_are_reported(site: Path, what: str, name: str) -> None:
    path = site / name
    os.chown(path, STRANGER, STRANGER)
    (check,) = check_owners(site)
    assert (check.name, check.status) == (f"files: {what}", Status.FAILED)
    assert f"belongs to account {STRANGER}, but the site's process runs as root" in check.found
    assert check.fix == f"Run `chown root: {path}`."
    os.chown(path, 0, STRANGER)
    path.chmod(path.stat().st_mode | 0o060)
    (check,) = check_owners(site)
    assert check.found.endswith(f"can be changed by every member of group {STRANGER}")
    assert check.fix == f"Run `chmod g-w {path}`."


@AS_ROOT
def test_files_created_by_root_are_reported_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: after root's commands, the site could not open its own ledger, and the doctor suggested a restore."""
    for path in (site, *site.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    (check,) = check_owners(site)
    assert f"the site's process runs as account {STRANGER}, but this is root" in check.found
    for name in ("ledger.db", "other disk/anchor.json"):
        os.chown(site / name, 0, 0)
    monkeypatch.setattr(machine, "effective_user", lambda: STRANGER)
    monkeypatch.setattr(site_checks.os, "access", lambda path, mode: Path(path).stat().st_uid == STRANGER)
    assert [check.name for check in check_owners(site)] == ["files: ledger", "files: anchor"]
    check, history = site_checks.check_ledger_state(SiteFiles.from_site_toml(site / "site.toml"))
    assert history is None
    assert "this account cannot read or write" in check.found
    assert "restore" not in check.fix

"""The doctor's look at a machine: bounds and words, and on Linux this machine's own answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from fedtune.ops.doctor import machine_checks as machine
from fedtune.ops.doctor.check import Check, Status
from fedtune.ops.doctor.machine_checks import Gpu
from fedtune.ops.kits.certificates import Certificate

NOW = datetime(2026, 6, 1, tzinfo=UTC)
GIB, MIB = 2**30, 2**20


def clock(ahead_s: float | None, *, unsure_s: float = 0.5, begins: datetime = NOW - timedelta(days=1)) -> Check:
    certificate = Certificate(name="north", not_before=begins, not_after=NOW + timedelta(days=9), fingerprint="")
    ahead = None if ahead_s is None else (ahead_s, unsure_s)
    return machine.clock(ahead, certificate=certificate, now=NOW)


@pytest.mark.parametrize(
    ("ahead_s", "status"),
    [
        (0.0, Status.OK),
        (5.4, Status.OK),
        (-5.4, Status.OK),
        (6.0, Status.WARNING),
        (-6.0, Status.WARNING),
        (60.4, Status.WARNING),
        (61.0, Status.FAILED),
        (-61.0, Status.FAILED),
    ],
)
def test_how_far_off_a_clock_may_be(ahead_s: float, status: Status) -> None:
    check = clock(ahead_s)
    assert check.status is status
    assert bool(check.fix) is (status is not Status.OK)


def test_what_a_clock_that_is_off_means() -> None:
    assert clock(12.0).found.startswith("12 s ahead of the server's; the server refuses")
    assert clock(-12.0).found == "12 s behind the server's"


def test_a_slow_answer_does_not_count_against_the_clock() -> None:
    assert clock(9.0, unsure_s=8.0).status is Status.OK
    assert clock(9.0, unsure_s=1.0).status is Status.WARNING


def test_a_clock_before_the_certificate_needs_no_server() -> None:
    check = clock(None, begins=NOW + timedelta(hours=1))
    assert check.status is Status.FAILED
    assert "2026-06-01 00:00 UTC" in check.found
    assert clock(None).status is Status.SKIPPED
    assert machine.clock(None, certificate=None, now=NOW).status is Status.SKIPPED


@pytest.mark.parametrize(
    ("free", "status", "found"),
    [
        (2 * GIB, Status.OK, "2.0 GiB free"),
        (2 * GIB - MIB, Status.WARNING, "2.0 GiB free"),
        (200 * MIB, Status.WARNING, "0.2 GiB free"),
        (199 * MIB, Status.FAILED, "199 MiB free, and at least 200 MiB are needed"),
    ],
)
def test_how_much_disk_is_enough(tmp_path: Path, free: int, status: Status, found: str) -> None:
    (check,) = machine.disks({"ledger": tmp_path / "not" / "yet"}, free_bytes=lambda _: free)
    assert (check.name, check.status, check.found) == ("disk of the ledger", status, found)


def test_the_disk_of_a_folder_that_is_yet_to_be_made_is_its_parent_s(tmp_path: Path) -> None:
    asked: list[Path] = []
    list(machine.disks({"anchor": tmp_path / "a" / "b"}, free_bytes=lambda folder: asked.append(folder) or GIB * 9))
    assert asked == [tmp_path]
    (check,) = machine.disks({"kit": tmp_path})
    assert check.found.endswith(" GiB free")


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """What Linux would say of some mounts, one of them below a folder with a space in its name."""
    path = tmp_path / "mounts"
    (tmp_path / "net share" / "north").mkdir(parents=True)
    (tmp_path / "net share2").mkdir()
    place = str(tmp_path).replace(" ", r"\040")
    path.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        "proc /proc proc rw 0 0\n"
        f"fs:/old {place}/net\\040share ext4 rw 0 0\n"
        f"//nas/share {place}/net\\040share cifs rw 0 0\n"
        "nonsense\n"
    )
    return path


def test_a_ledger_on_a_network_share(tmp_path: Path, mounts: Path) -> None:
    ledger = tmp_path / "net share" / "north" / "ledger.db"
    check = machine.ledger_place(ledger, mounts=mounts)
    assert check.status is Status.WARNING
    assert check.found.startswith("cifs, over a network")
    (tmp_path / "link").symlink_to(ledger.parent)
    assert machine.ledger_place(tmp_path / "link" / "ledger.db", mounts=mounts).status is Status.WARNING
    mounts.write_text(mounts.read_text().replace("cifs", "nfs4"))
    assert machine.ledger_place(ledger, mounts=mounts).status is Status.WARNING


def test_a_ledger_beside_a_network_share(tmp_path: Path, mounts: Path) -> None:
    for place in ("ledger.db", "net share2/ledger.db", "not/yet/ledger.db"):
        check = machine.ledger_place(tmp_path / place, mounts=mounts)
        assert (check.status, check.found) == (Status.OK, "ext4, on this machine")


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    nothing = tmp_path / "none"
    assert machine.ledger_place(tmp_path / "ledger.db", mounts=nothing).status is Status.SKIPPED
    assert machine.memory(1, meminfo=nothing).status is Status.SKIPPED


def test_where_the_anchor_lies(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    assert "names no anchor" in machine.anchor_place(ledger, None).found
    here = machine.anchor_place(ledger, tmp_path / "other" / "anchor.json")
    assert here.status is Status.WARNING
    assert "own disk" in here.found
    assert machine.anchor_place(ledger, Path("/proc/anchor.json")).status is Status.OK


@pytest.mark.parametrize(
    ("model_bytes", "status"), [(None, Status.OK), (GIB, Status.OK), (int(1.01 * GIB), Status.WARNING)]
)
def test_how_much_memory_a_model_needs(tmp_path: Path, model_bytes: int | None, status: Status) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        f"MemTotal:       {8 * MIB} kB\nMemFree:  1 kB\nMemAvailable:   {4 * MIB} kB\nHugePages_Total: 0\n"
    )
    check = machine.memory(model_bytes, meminfo=meminfo, cgroup=tmp_path)
    assert check.status is status
    assert check.found.startswith("4.0 GiB of 8.0 GiB available")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(model_bytes, meminfo=meminfo, cgroup=tmp_path) == check
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    limited = machine.memory(model_bytes, meminfo=meminfo, cgroup=tmp_path)
    assert limited.found.startswith("2.0 GiB of 3.0 GiB available")


def test_a_base_in_four_bits_needs_its_files_once(tmp_path: Path) -> None:
    (meminfo := tmp_path / "meminfo").write_text(f"MemTotal: {8 * MIB} kB\nMemAvailable: {4 * MIB} kB\n")
    for size, status in ((3 * GIB, Status.OK), (int(3.01 * GIB), Status.WARNING)):
        assert machine.memory(size, in_four_bits=True, meminfo=meminfo, cgroup=tmp_path).status is status


def test_this_machine_s_memory() -> None:
    assert " GiB available" in machine.memory(1).found


def gpu(device: str, **found: object) -> Check:
    values = {"usable": False, "name": "", "driver": "", "build": "", **found}
    return machine.gpu(device, ask=lambda: Gpu(**values))  # type: ignore[arg-type]


def test_a_gpu_that_is_not_wanted_is_not_asked_for() -> None:
    def ask() -> Gpu:
        raise AssertionError("torch takes a second to import")

    assert machine.gpu("cpu", ask=ask).status is Status.OK


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_is_there(device: str) -> None:
    check = gpu(device, usable=True, name="NVIDIA H200 with 140 GiB", driver="550.54.15", build="12.8")
    assert check.status is Status.OK
    assert check.found == "NVIDIA H200 with 140 GiB, driver 550.54.15, torch for CUDA 12.8"


@pytest.mark.parametrize(
    ("driver", "build", "auto", "found", "fix"),
    [
        ("", "", Status.OK, "none", "device"),
        ("", "12.8", Status.OK, "none", "device"),
        ("470.1", "", Status.WARNING, "built for CPUs", "built for CUDA"),
        ("470.1", "12.8", Status.WARNING, "cannot use it", "new enough"),
    ],
)
def test_a_gpu_that_cannot_be_used(driver: str, build: str, auto: Status, found: str, fix: str) -> None:
    tolerant = gpu("auto", driver=driver, build=build)
    assert tolerant.status is auto
    assert "trains on the CPU" in tolerant.found
    strict = gpu("cuda", driver=driver, build=build)
    assert strict.status is Status.FAILED
    assert found in strict.found
    assert fix in strict.fix


def test_this_machine_s_gpu(tmp_path: Path) -> None:
    found = machine.this_gpu()
    assert found.usable is torch.cuda.is_available()
    assert bool(found.name) is found.usable
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12.2.0\n")
    assert machine.this_gpu(version=version).driver == "550.54.15"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build\n")
    assert machine.this_gpu(version=version).driver == "570.86"

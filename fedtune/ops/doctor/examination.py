"""The sequence of all checks of `fedtune site doctor`.

The checks train nothing, and write neither the ledger nor the policy.  `DoctorCheck` limits the content of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fedtune.config import RunConfig
from fedtune.ops.doctor import machine_checks, site_checks
from fedtune.ops.doctor.check import (
    DoctorCheck,
    PrivateLog,
    build_check_from_error,
    build_passed_check,
    build_skipped_check,
)
from fedtune.ops.doctor.connection_checks import STEPS, Connection, check_control_api
from fedtune.ops.kits.kit_file import Kit
from fedtune.privacy.ledger.history import History
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.sites.site_settings import read_site_settings
from fedtune.spec import ConfigError, DataError, FedtuneError
from fedtune.training.spec import Machine

_KIT, _POLICY, _LEDGER = "the kit", "the policy", "the ledger"


@dataclass(kw_only=True)
class Examination:
    """Runner of all checks of a site; the failure of one check does not stop the others.

    Later checks reuse the files that earlier checks have read.  A check is skipped if one of its files was unreadable.
    """

    kit_folder: Path  # the folder of the site's kit
    site_toml: Path  # the path of the policy
    model: Path | None = None  # a base model to install first, as an argument of `install_model`
    # composes the configuration of the run to preview; None: no preview
    run: Callable[[Policy], RunConfig] | None = None
    timeout_s: float = 10.0  # timeout of each connection
    kit: Kit = field(init=False)
    files: SiteFiles = field(init=False)
    machine: Machine = field(init=False)
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self._log = PrivateLog(self.kit_folder / "state" / "doctor.log")
        self._read: set[str] = set()

    @property
    def policy(self) -> Policy:
        """The site's policy, from `files`."""
        return self.files.policy

    def run_checks(self) -> Iterator[DoctorCheck]:
        """Run the checks in sequence and yield their lines."""
        for names, needs, look in self._list_checks():
            if missing := [need for need in needs if need not in self._read]:
                yield from (build_skipped_check(name, f"{missing[0]} cannot be used") for name in names)
                continue
            try:
                yield from look()
            except Exception as error:
                # The text of a DataError may quote records; the texts of fedtune's other errors never do.
                if isinstance(error, FedtuneError) and not isinstance(error, DataError):
                    yield build_check_from_error(names[0], error, fix="Fix the problem named here.")
                else:
                    yield site_checks.report_unexpected_error(names[0], error, self._log)

    def _list_checks(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Callable[[], Iterable[DoctorCheck]]]]:
        """Yield each check as a tuple: the names of its lines, the files that it requires, and its function."""
        yield (("policy",), (), self._read_policy)
        yield (("kit",), (), self._read_kit)
        yield (
            ("files",),
            (),
            lambda: machine_checks.check_owners(self.kit_folder, self.site_toml, self._files_or_none),
        )
        now = datetime.now(UTC)
        yield (("certificate",), (_KIT,), lambda: [site_checks.check_site_certificate(self.kit, now)])
        yield (("site's name",), (_KIT, _POLICY), lambda: [site_checks.check_matching_names(self.kit, self.policy)])
        yield (("lead",), (_KIT, _POLICY), lambda: [site_checks.check_lead(self.kit, self.policy)])
        if self._files_or_none is not None and self.policy.socket:
            yield (
                ("Flower's control",),
                (_KIT,),
                lambda: [check_control_api(self.kit.server, timeout_s=self.timeout_s)],
            )
            yield (("socket",), (), lambda: [machine_checks.check_socket(self.site_toml.parent / self.policy.socket)])
        else:
            yield ((*STEPS, "clock"), (_KIT,), self._check_connection)
        yield (("disks",), (), self._check_disks)
        if (model := self.model) is not None:
            yield (("import",), (_KIT,), lambda: [site_checks.import_base_model(model, self.kit)])
        yield (("base models",), (_KIT, _POLICY), lambda: site_checks.check_base_models(self.kit, self.policy))
        yield (("memory",), (), self._check_memory)
        gpu = machine_checks.probe_gpu
        yield (("GPU",), (_POLICY,), lambda: [machine_checks.check_gpu(self.machine.device, ask=gpu)])
        data = partial(site_checks.check_data_sets, folder=self.site_toml.parent, log=self._log)
        yield (("data",), (_POLICY,), lambda: data(self.policy))
        yield (("ledger",), (_POLICY,), self._read_ledger)
        yield (("site key",), (_POLICY,), lambda: [site_checks.check_site_key(self.files, self._history_or_none)])
        yield (("budget",), (_POLICY, _LEDGER), lambda: [site_checks.check_budget(self.history, self.policy)])
        yield (("serving",), (), lambda: [site_checks.check_serving(self.kit_folder / "state")])
        if (run := self.run) is None:
            yield (("run",), (), lambda: [build_skipped_check("run", "no experiment was given")])
        else:
            yield (("run",), (_KIT, _POLICY, _LEDGER), lambda: self._check_run(run(self.policy)))

    def _check_run(self, config: RunConfig) -> Iterator[DoctorCheck]:
        path, policy = self.site_toml, self.policy
        yield site_checks.preview_run(config, kit=self.kit, site_toml=path, policy=policy, history=self.history)
        yield from site_checks.check_run_records(config, policy=policy, folder=path.parent, log=self._log)

    @property
    def _history_or_none(self) -> History | None:
        return self.history if _LEDGER in self._read else None

    @property
    def _files_or_none(self) -> SiteFiles | None:
        return self.files if _POLICY in self._read else None

    def _read_policy(self) -> Iterator[DoctorCheck]:
        try:
            self.files = SiteFiles.from_site_toml(self.site_toml)
            self.machine = read_site_settings(self.site_toml).machine
        except ConfigError as error:
            fix = "Fix the problem named here; `fedtune site template` explains every key."
            yield build_check_from_error("policy", error, fix=fix)
            return
        self._read.add(_POLICY)
        finding = f"valid, for site {self.policy.site} and population {self.policy.population.name}"
        yield build_passed_check("policy", finding)

    def _read_kit(self) -> Iterator[DoctorCheck]:
        try:
            self.kit = Kit.read(self.kit_folder, kind="site")
        except ConfigError as error:
            yield build_check_from_error("kit", error, fix="Unzip the complete kit from the lead into this folder.")
            return
        self._read.add(_KIT)
        finding = f"complete, for federation {self.kit.federation} at {self.kit.server}; its key is private"
        yield build_passed_check("kit", finding)

    def _check_connection(self) -> Iterator[DoctorCheck]:
        connection = Connection(self.kit, timeout_s=self.timeout_s)
        yield from connection.run_checks()
        from fedtune.ops.wire.identity import is_clock_synchronized  # Flower takes a second to import

        yield machine_checks.check_clock(connection.clock_ahead_s, kept=is_clock_synchronized())

    def _check_disks(self) -> Iterator[DoctorCheck]:
        folders, files = {"kit": self.kit_folder}, self._files_or_none
        if files is None:
            yield from machine_checks.check_disks(folders)
            return
        folders["ledger"] = files.ledger.parent
        if files.anchor is not None:
            folders["anchor"] = files.anchor.parent
        yield from machine_checks.check_disks(folders)
        yield machine_checks.check_ledger_disk(files.ledger)
        yield machine_checks.check_anchor_disk(files.ledger, files.anchor)

    def _check_memory(self) -> Iterator[DoctorCheck]:
        both = {_KIT, _POLICY} <= self._read
        model_bytes = site_checks.measure_largest_model_bytes(self.kit, self.policy) if both else None
        in_four_bits = both and self.policy.allow.dtypes == ("nf4",)
        yield machine_checks.check_memory(model_bytes, in_four_bits=in_four_bits)

    def _read_ledger(self) -> Iterator[DoctorCheck]:
        check, history = site_checks.check_ledger_state(self.files)
        if history is not None:
            self.history = history
            self._read.add(_LEDGER)
        yield check

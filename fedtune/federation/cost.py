"""What a run takes beside epsilon: energy and carbon, as codecarbon measures or estimates them.

codecarbon (MIT licence; the extra `cost`) is asked for numbers alone: it writes no file, and it calls nobody, whatever
its own configuration files and environment variables say.  It reads the machine's counters where it can (RAPL, NVML),
and elsewhere estimates from the processor's load and model.

Only the machine that runs this is measured: in a simulation all of the run, with real sites the lead's part.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from fedtune.spec import ConfigError, spec


@spec
class CostSpec:
    """What a run's cost is told in; it changes no result.

    Attributes:
        energy: measure the energy that this machine uses, with codecarbon (the extra `cost`).
        country: whose electricity it is, as a code of three letters (DEU, FRA, USA), for the carbon; null: no carbon.
    """

    energy: bool = False
    country: str | None = None

    def __post_init__(self) -> None:
        if self.country is not None and not re.fullmatch("[A-Z]{3}", self.country):
            raise ConfigError("country", self.country, "must be a code of three capital letters, such as DEU or USA")
        if self.country is not None and not self.energy:
            raise ConfigError("country", self.country, "needs cost.energy=true")

    def check_can_measure(self) -> None:
        """Check that what is asked can be had, before a run begins.

        Raises:
            ConfigError: codecarbon is not installed, or does not know the country.
        """
        if not self.energy:
            return
        if find_spec("codecarbon") is None:
            raise ConfigError("cost.energy", True, "needs the extra: pip install 'fedtune[cost]'")
        if self.country is not None:
            from codecarbon.input import DataSource

            known = DataSource().get_global_energy_mix_data()
            if self.country not in known:
                raise ConfigError("cost.country", self.country, f"must be one of {len(known)} that codecarbon knows")


@spec
class Energy:
    """What a run took, on this machine.

    Attributes:
        kwh: of processor, memory and GPUs.
        carbon_kg: of CO2 and what warms as much; None: no country was given.
        seconds: that were measured: of a resumed run those since it was resumed.
    """

    kwh: float
    carbon_kg: float | None
    seconds: float


class Meter:
    """Measures energy from now on, where the settings ask for it; `check_can_measure` has passed."""

    def __init__(self, spec: CostSpec) -> None:
        self._country, self._began = spec.country, time.monotonic()
        self._tracker = _tracker(spec.country) if spec.energy else None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Energy | None:
        """What was used, and the end of measuring; None: nothing is measured any more, or it failed."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return None
        with suppress(Exception):  # counters that cannot be read any more end no run
            tracker.stop()
            found = tracker.final_emissions_data
            return Energy(
                kwh=float(found.energy_consumed),
                carbon_kg=float(found.emissions) if self._country else None,
                seconds=time.monotonic() - self._began,
            )
        return None


def _tracker(country: str | None) -> Any:
    """One of codecarbon's that has begun, and tells nobody."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").disabled = True
    tracker = OfflineEmissionsTracker(
        country_iso_code=country,
        # Each of these could otherwise come from a file or a variable of the environment, and reach the network.
        output_methods=[],
        emissions_endpoint=None,
        electricitymaps_api_token="",
        cloud_provider=None,
        cloud_region=None,
        region=None,
        force_carbon_intensity_g_co2e_kwh=None if country else 0.0,
        allow_multiple_runs=True,
        measure_power_secs=5.0,
        tracking_mode="machine",
        log_level="critical",
    )
    tracker.start()
    return tracker

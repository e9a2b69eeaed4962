"""Energy use and carbon emissions of a run, measured or estimated by codecarbon.

codecarbon (MIT license; the extra `cost`) only returns numbers here: it writes no file and makes no network call,
regardless of its configuration files and environment variables. It reads the hardware counters of the machine if
possible (RAPL, NVML), and otherwise estimates from the load and the model of the processor.

Only the local machine is measured: the whole run in a simulation, the lead's part with real sites.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fedtune.extras import require_extra
from fedtune.spec import ConfigError, spec

if TYPE_CHECKING:  # slow import, which readers of measurements do not need
    from fedtune.config import CostSpec


def check_can_measure(spec: CostSpec) -> None:
    """Check before a run that codecarbon is installed and supports the configured country.

    Raises:
        ConfigError: codecarbon is not installed, or does not know the country.
    """
    if not spec.energy:
        return
    require_extra("cost.energy", True, "cost", "codecarbon")
    if spec.country is not None:
        from codecarbon.input import DataSource

        known = DataSource().get_global_energy_mix_data()
        if spec.country not in known:
            bound = f"must be one of {len(known)} countries that codecarbon supports"
            raise ConfigError("cost.country", spec.country, bound)


@spec
class Energy:
    """The energy that a run used on this machine.

    Attributes:
        kwh: kilowatt-hours of processor, memory and GPUs together.
        carbon_kg: kilograms of CO2 equivalent; None without a country.
        seconds: duration of the measurement, which starts again when a run is resumed.
    """

    kwh: float
    carbon_kg: float | None
    seconds: float


class Meter:
    """An energy meter that starts to measure on construction, if the settings enable it.

    Call `check_can_measure` first.
    """

    def __init__(self, spec: CostSpec) -> None:
        self._country, self._began = spec.country, time.monotonic()
        self._tracker = _start_tracker(spec.country) if spec.energy else None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Energy | None:
        """Stop the measurement, and return the energy use; None if the measurement is disabled or failed."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return None
        with suppress(Exception):  # unreadable counters must not end a run
            tracker.stop()
            emissions = tracker.final_emissions_data
            return Energy(
                kwh=float(emissions.energy_consumed),
                carbon_kg=float(emissions.emissions) if self._country else None,
                seconds=time.monotonic() - self._began,
            )
        return None


def _start_tracker(country: str | None) -> Any:
    """Start a codecarbon tracker without file output and network access."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").disabled = True
    tracker = OfflineEmissionsTracker(
        country_iso_code=country,
        # Set explicitly, because files or environment variables could otherwise cause network calls.
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

"""What a run takes beside epsilon: energy and carbon as codecarbon measures them, and money by the hour.

codecarbon (MIT licence; the extra `cost`) is asked for numbers alone: it writes no file, and it calls
nobody, whatever its own configuration files and environment variables say.  It reads the machine's counters where it
can (RAPL, NVML), and elsewhere estimates from the processor's load and model: `Energy.how` says which.

Only the machine that runs this is measured: in a simulation all of the run, with real sites the lead's part.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

from fedtune.spec import ConfigError, check_positive, spec

_EVERY_S = 5.0
"""How often codecarbon reads the counters."""
_COUNTERS = ("rapl", "power gadget", "powermetrics", "energy meter")
"""In codecarbon's names of what it reads, those of hardware that counts."""


@spec
class CostSpec:
    """What a run's cost is told in; it changes no result.

    Attributes:
        energy: measure the energy that this machine uses, with codecarbon (the extra `cost`).
        country: whose electricity it is, as a code of three letters (DEU, FRA, USA), for the carbon; null: no carbon.
        price_per_hour: the price of an hour of this machine; null: no money is told.
        currency: that the price is in.
    """

    energy: bool = False
    country: str | None = None
    price_per_hour: float | None = None
    currency: str = "EUR"

    def __post_init__(self) -> None:
        if self.country is not None and not re.fullmatch("[A-Z]{3}", self.country):
            raise ConfigError("country", self.country, "must be a code of three capital letters, such as DEU or USA")
        if self.country is not None and not self.energy:
            raise ConfigError("country", self.country, "needs cost.energy=true")
        if self.price_per_hour is not None:
            check_positive("price_per_hour", self.price_per_hour)
        if not re.fullmatch(r"\S{1,8}", self.currency):
            raise ConfigError("currency", self.currency, "must be a word of at most 8 letters, such as EUR")

    def money(self, seconds: float | None) -> float | None:
        """The price of so much time; None: nothing is said of it."""
        return None if self.price_per_hour is None or seconds is None else self.price_per_hour * seconds / 3600

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
    """What a stretch of work took, on this machine.

    Attributes:
        kwh: of processor, memory and GPUs.
        carbon_kg: of CO2 and what warms as much; None: no country was given.
        seconds: that were measured: of a resumed run those since it was resumed.
        how: "counters" of the hardware, or an "estimate" from its load and model.
    """

    kwh: float
    carbon_kg: float | None
    seconds: float
    how: Literal["counters", "estimate"]

    def scaled(self, seconds: float) -> Energy:
        """What so much time takes at the same power."""
        factor = seconds / self.seconds
        carbon = None if self.carbon_kg is None else self.carbon_kg * factor
        return replace(self, kwh=self.kwh * factor, carbon_kg=carbon, seconds=seconds)


@spec
class Cost:
    """What a run took: its energy, where it was measured, and its price, where one was given.

    Attributes:
        money: `CostSpec.price_per_hour` for all of the run's time, whatever part of it was measured.
        currency: of the money.
    """

    energy: Energy | None = None
    money: float | None = None
    currency: str | None = None


class Meter:
    """Measures energy from now on, where the settings ask for it.

    Args:
        spec: `check_can_measure` has passed.
    """

    def __init__(self, spec: CostSpec) -> None:
        self._spec = spec
        self._tracker = _tracker(spec.country) if spec.energy else None
        self._found: Energy | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Energy | None:
        """What was used so far, and the end of measuring; None: nothing is measured, or it failed."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return self._found
        with suppress(Exception):  # counters that cannot be read any more end no run
            tracker.stop()
            found = tracker.final_emissions_data
            self._found = Energy(
                kwh=float(found.energy_consumed),
                carbon_kg=float(found.emissions) if self._spec.country else None,
                seconds=time.monotonic() - self._began,
                how=_how(tracker),
            )
        return self._found

    def cost(self, seconds: float) -> Cost | None:
        """What so much time took, and the end of measuring; None: the settings ask for nothing."""
        if not self._spec.energy and self._spec.price_per_hour is None:
            return None
        money = self._spec.money(seconds)
        return Cost(energy=self.stop(), money=money, currency=None if money is None else self._spec.currency)


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
        measure_power_secs=_EVERY_S,
        tracking_mode="machine",
        log_level="critical",
    )
    tracker.start()
    return tracker


def _how(tracker: Any) -> Literal["counters", "estimate"]:
    """Whether the processor's own counters were read."""
    hardware = str(getattr(tracker, "_conf", {}).get("hardware", "")).lower()
    return "counters" if any(name in hardware for name in _COUNTERS) else "estimate"

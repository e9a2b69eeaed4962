import socket
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import CostSpec
from fedtune.runs.cost import Energy, Meter, check_can_measure
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import ConfigError


def burn_cpu(spec: CostSpec, seconds: float = 1.2) -> Energy | None:
    with Meter(spec) as meter:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return meter.stop()


def test_energy_is_measured_without_network_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    for key in ("CO2_SIGNAL_API_TOKEN", "ELECTRICITYMAPS_API_TOKEN"):
        monkeypatch.setenv(f"CODECARBON_{key}", "token")
    environment = {"EMISSIONS_ENDPOINT": "http://192.0.2.1/told", "OUTPUT_METHODS": "api,csv", "SAVE_TO_API": "true"}
    for key, value in environment.items():
        monkeypatch.setenv(f"CODECARBON_{key}", value)
    with_country, without_country = burn_cpu(CostSpec(energy=True, country="DEU")), burn_cpu(CostSpec(energy=True))
    assert (without_country.carbon_kg, without_country.kwh > 0, with_country.kwh > 0) == (None, True, True)
    assert 0.05 < with_country.carbon_kg / with_country.kwh < 1.0, "kg of CO2 per kWh in Germany"
    assert (no_network.called, list(tmp_path.iterdir())) == (False, [])
    assert burn_cpu(CostSpec(), seconds=0.0) is None, "energy must be measured only on request"


def test_unknown_country_is_refused_before_the_run() -> None:
    for energy, country in ((True, "Germany"), (False, "DEU")):
        with pytest.raises(ConfigError) as caught:
            CostSpec(energy=energy, country=country)
        assert caught.value.key == "country"
    pytest.importorskip("codecarbon")
    with pytest.raises(
        ConfigError, match=r"cost.country = 'XYZ': must be one of \d+ countries that codecarbon supports"
    ):
        check_can_measure(CostSpec(energy=True, country="XYZ"))
    check_can_measure(CostSpec(energy=True, country="FRA"))


def test_cost_settings_do_not_change_the_run_id_and_are_not_sent() -> None:
    plain = compose_run(["experiment=debug", "name=x", "privacy.noise_multiplier=4"])
    config = compose_run(["experiment=debug", "name=x", "privacy.noise_multiplier=4", "cost.energy=true"])
    assert config.run_id() == plain.run_id()
    assert select_settings_for_sites(config).cost == CostSpec()


def test_measured_energy_is_in_run_json_and_the_report(tiny: Any, command: Any, result_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    words = tiny("cost.energy=true", "cost.country=DEU", "tracking=quiet", into=tmp_path)
    assert command("simulate", *words).code == 0
    energy = result_of(tmp_path / "run")["final"]["energy"]
    assert energy["kwh"] > 0 < energy["carbon_kg"]
    assert "Energy of this machine:" in (tmp_path / "run" / "report.html").read_text()
    assert command("report", "verify", str(tmp_path / "run")).code == 0

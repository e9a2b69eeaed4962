"""Check the run folder that `.ci/run` made: files, keys, and the epsilon recomputed from what the run says it did."""

import json
import sys
from pathlib import Path

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from fedtune.privacy.ledger.verify import verify
from fedtune.report import signing
from fedtune.report.verify_report import problems

folder = Path(sys.argv[1])
run = json.loads((folder / "run.json").read_text())
for name in (
    "config.yaml",
    "environment.json",
    "log.txt",
    "report.html",
    "report.json",
    "adapter/adapter_model.safetensors",
    "checkpoints",
):
    assert (folder / name).exists(), f"{name} is missing"
assert len(run["rounds"]) == 2
assert 0 < run["final"]["metrics"]["accuracy"] <= 1
for site, spent in run["privacy"]["sites"].items():
    for name in ("site.toml", "site_key.pem", "ledger.db"):
        assert (folder / "sites" / site / name).exists(), f"{name} of {site} is missing"
    history = verify(folder / "sites" / site / "ledger.db").history
    assert sum(history.charges().values()) == spent["steps"]
    accountant = PLDAccountant()
    event = PoissonSampledDpEvent(spent["sampling_rate"], GaussianDpEvent(spent["noise_multiplier"]))
    accountant.compose(event, spent["steps"])
    assert abs(accountant.get_epsilon(run["privacy"]["delta"]) - spent["epsilon"]) < 1e-3
    assert spent["epsilon"] <= 8
report = signing.parse_report((folder / "report.json").read_bytes())
assert problems(report) == []
assert (report.verdict.state, report.epsilon) == ("within", run["privacy"]["epsilon"])
sys.stdout.write(f"run folder is right: {folder.name}\n")

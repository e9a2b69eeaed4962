"""The two files that a run leaves at its end."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from fedtune.report import from_run, model, signing
from fedtune.report.derive.profile import round_up_figures
from fedtune.report.model import Ceiling, Meaning
from fedtune.report.model_card import write_report_and_card
from fedtune.report.page import render
from fedtune.spec import REPORT_SCHEMA, ConfigError

from ..books import Books
from ..conftest import make_site_policy, run_proposal
from .shown import NAMES, build_reports


def test_run_ends_with_a_report_page_and_model_card(run_folder: Path) -> None:
    data = (run_folder / "report.json").read_bytes()
    report = signing.parse_report(data)
    assert report == from_run.build_run_report(run_folder), "later, the same run_folder gives the same report"
    assert data.decode() == signing.report_to_json(report)
    assert (run_folder / "report.html").read_text() == render.render(report, language="en")
    assert json.loads(data)["schema_version"] == REPORT_SCHEMA
    paths = [run_folder / name for name in ("report.json", "report.html", "adapter/README.md", "adapter/label.svg")]
    before = [path.read_bytes() for path in paths]
    write_report_and_card(run_folder, language="en")
    with pytest.raises(ConfigError, match=r"report\.language"):
        write_report_and_card(run_folder, language="xx")
    assert [path.read_bytes() for path in paths] == before, "equal runs give equal reports and cards"


_DIGESTS = """
import hashlib, sys
from pathlib import Path
from fedtune.report import from_ledger, signing
reports = [signing.report_to_json(from_ledger.build_ledger_report(Path(path))) for path in sys.argv[1:]]
print(*sorted(hashlib.sha256(text.encode()).hexdigest() for text in reports))
"""


@pytest.mark.nightly
def test_threads_and_order_do_not_change_report_bytes(tmp_path: Path) -> None:
    # At this plan a share of found records differs in its last digit between one thread and two.
    plan = {"sampling_rate": 0.2, "noise_multiplier": 0.8988, "local_steps": 2, "num_rounds": 10, "spare_rounds": 0}
    limits = {"min_noise_multiplier": 0.5, "max_rounds": 50, "max_sampling_rate": 0.5}
    ledgers = []
    for name, noise in (("one", 0.8988), ("two", 1.5)):
        books = Books.made(tmp_path / name, make_site_policy(limits=limits, budget={"max_epsilon": 50.0}))
        books.charge(run_proposal(**plan | {"noise_multiplier": noise}), *range(1, 11))
        ledgers.append(str(books.ledger))
    printed = set()
    for threads, order in (("1", ledgers), ("2", ledgers[::-1])):
        several = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        command, environment = [sys.executable, "-c", _DIGESTS, *order], os.environ | several
        process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
        printed.add(process.stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("last", [-3, -1, 0, 1, 3])
def test_rounding_hides_last_digit_differences_in_the_report(last: int) -> None:
    share = 0.04296797538628186
    rate = Ceiling(operating_point=0.001, ceiling=1.0, mechanism=share + last * math.ulp(share))
    posterior = Ceiling(operating_point=0.5, ceiling=0.5)
    factor = 1 + abs(last) * math.ulp(1.0)
    figures = {"correct_of_100_ceiling": 50 * factor, "correct_of_100_for_2": 75 * factor, "correct_of_100_for_5": 99.0}
    failures = {"correct_of_100_mechanism": None, "expected_failures": 230 * 1e-05}
    stated = round_up_figures(Meaning(**figures, **failures, posterior=(posterior,), hit_rates=(rate,)))
    assert stated.hit_rates == (replace(rate, mechanism=0.0429679754),), "upwards, in nine digits"
    assert (stated.correct_of_100_ceiling, stated.expected_failures) == (50.0, 0.0023)
    assert (stated.correct_of_100_for_2, stated.posterior) == (75.0, (posterior,))


@pytest.mark.parametrize("name", NAMES)
def test_reports_match_the_published_json_schema(name: str) -> None:
    schema = json.loads(model.render_schema())
    assert schema["$defs"]["Release"]["properties"]["reason"]["description"] == "reason for a refusal"
    validator = jsonschema.Draft202012Validator(schema)
    data = json.loads(signing.report_to_json(build_reports()[name]))
    validator.validate(data)
    assert not validator.is_valid({**data, "epsilon": "much"})
    assert not validator.is_valid({**data, "surprise": 1})

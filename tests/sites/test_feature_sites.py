"""A real site's table: its own names of the columns, its policy, and rows that cannot be used."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.data.features import FeatureReader
from fedtune.model.base_model import model_sha256
from fedtune.model.spec import ModelSpec
from fedtune.preparation.check_data import check
from fedtune.privacy.policy_file import read_policy
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.shared_settings import at_own_site, at_site, for_sites

from .conftest import LABELS, TABLE, letters, write_records

GOOD = [(f"{20 + number}", "ab"[number % 2], LABELS[number % 3]) for number in range(40)]


@pytest.fixture
def site(station: Callable[..., Any]) -> Any:
    """The site north, whose file calls age otherwise."""
    made = station(**TABLE)
    made.first = SharedModel(letters(**TABLE)).initial_adapter
    made.edit(dataset={"columns": {"label": "KIND", "feature:age": "AGE_YEARS"}})
    return made


def write(site: Any, rows: list[tuple[str, ...]]) -> None:
    write_records(site.data, rows, header=("AGE_YEARS", "ward", "KIND"))
    site.restart()


def test_a_table_is_trained_on_under_the_site_s_own_names(site: Any) -> None:
    write(site, GOOD)
    update = site.update()
    shapes = {name: one.shape for name, one in update.tensors.items()}
    assert shapes == {"head.weight": (len(LABELS), 5), "head.bias": (len(LABELS),)}
    sent = for_sites(site.config)
    assert sent.model.sha256 == model_sha256(ModelSpec(path="none"))
    # As a policy allows it.
    asked = sent.proposal(lead="x", plan=sent.plan())
    assert (asked.adapter, asked.base_model, asked.target_modules) == ("none", sent.model.sha256, ())
    assert asked.train_head


def test_the_check_reads_the_file_as_training_does(site: Any) -> None:
    write(site, [*GOOD, ("old", "a", LABELS[0])])
    config = at_own_site(site.config, read_policy(site.site_toml), folder=site.folder)
    (file,) = check(config, FeatureReader(config.data.features), within=1).files
    assert (file.rows, file.uses, sum(file.num_errors.values())) == (41, {"train": 40}, 1)
    sent = for_sites(site.config)
    trained = at_site(sent, read_policy(site.site_toml), folder=site.folder, installed=lambda sha256: site.folder)
    assert replace(config.data, declared_sizes=trained.data.declared_sizes) == trained.data


def test_rows_that_cannot_be_used_add_nothing(site: Any) -> None:
    write(site, GOOD)
    without = site.update().tensors
    bad = [("old", "a"), ("1e999", "a"), ("", "b"), ("nan", "a"), ("[1]", "b")]
    site.edit(limits={"max_rounds": 99})
    write(site, [*GOOD, *((*one, LABELS[0]) for one in bad), ("30", "a", "no label")])
    found = site.update(replace(site.config, name="second"), round=1).tensors
    for name, one in found.items():
        np.testing.assert_array_equal(one, without[name])

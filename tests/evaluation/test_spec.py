from __future__ import annotations

import pytest

from fedtune.evaluation.spec import EvaluationSpec
from fedtune.spec import ConfigError


@pytest.mark.parametrize("key", ["max_tokens", "max_new_tokens", "generation_rows"])
def test_a_size_below_one_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = 0: .*at least 1"):
        EvaluationSpec(**{key: 0})


def test_the_defaults_are_valid_and_generate_nothing() -> None:
    assert EvaluationSpec().generate is False
    assert EvaluationSpec().generation_rows is None

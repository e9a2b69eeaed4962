"""Invalid model settings are refused, and the settings import without torch."""

from typing import Any

import pytest

from fedtune.model.spec import LoraSpec, ModelSpec
from fedtune.spec import ConfigError


@pytest.mark.parametrize("other", [{"train_a": False}, {"kind": "dora"}], ids=str)
def test_alternating_rounds_require_lora_with_trained_a(other: Any) -> None:
    with pytest.raises(ConfigError, match=r"^alternate = "):
        LoraSpec(alternate=True, **other)


@pytest.mark.parametrize(
    ("kind", "reason"), [("prompt", "occupy positions"), ("prefix", "cache"), ("adalora", "without noise")]
)
def test_unsupported_adapter_kinds_are_refused_with_a_reason(kind: str, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^kind = '{kind}': is not supported: .*{reason}.*; it must be one of lora, dora, ia3"
    ):
        LoraSpec(kind=kind)


def test_ia3_has_no_rank_matrices_or_scale() -> None:
    ia3 = LoraSpec(kind="ia3", rank=64, alpha=1e6)
    assert (ia3.scale, ia3.effective_rank) == (1.0, 1)
    assert (LoraSpec(kind="dora", rank=64, alpha=32.0).scale, LoraSpec(kind="dora", rank=64).effective_rank) == (
        0.5,
        64,
    )


@pytest.mark.parametrize(
    ("path", "public"),
    [
        *((path, path) for path in ("bert-base-uncased", "google/bert_uncased", "random:bert")),
        *((path, path) for path in ("package:models/customer/llama",)),
        *((path, "llama") for path in ("/data/customer-x/llama", "~/llama", "./customer-x/llama", "../llama/")),
        *(
            (path, "llama")
            for path in ("models/customer-x/llama", "C:\\customer-x\\llama", "C:/llama", "models\\llama")
        ),
    ],
)
def test_public_path_of_a_local_model_is_its_last_part(path: str, public: str) -> None:
    assert ModelSpec(path=path).public_path == public

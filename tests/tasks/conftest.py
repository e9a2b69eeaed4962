"""The tiny models, batches and tokenizers of the layers below."""

from __future__ import annotations

from ..data.conftest import decoder_tokenizer, encoder_tokenizer, leading_tokenizer, make_tokenizer
from ..model.conftest import examples, spec, trained

__all__ = [
    "decoder_tokenizer",
    "encoder_tokenizer",
    "examples",
    "leading_tokenizer",
    "make_tokenizer",
    "spec",
    "trained",
]

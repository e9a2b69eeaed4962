"""The tokenizers of the layer below."""

from ..data.conftest import decoder_tokenizer, encoder_tokenizer, leading_tokenizer, make_tokenizer

__all__ = ["decoder_tokenizer", "encoder_tokenizer", "leading_tokenizer", "make_tokenizer"]

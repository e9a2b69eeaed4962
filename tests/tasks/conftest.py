"""Tokenizer fixtures from the data layer."""

from ..data.conftest import decoder_tokenizer, encoder_tokenizer, leading_tokenizer, make_tokenizer

__all__ = ["decoder_tokenizer", "encoder_tokenizer", "leading_tokenizer", "make_tokenizer"]

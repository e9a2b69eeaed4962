"""Settings of evaluation and text generation."""

from __future__ import annotations

from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, spec

MAX_NEW_TOKENS = 1_000_000
SMALLEST = 20  # default minimum number of units in a group with its own score


def build_missing_test_records_error() -> ConfigError:
    """Build the error for a comparison without test records."""
    bound = "is missing: a comparison needs records that no run trains on (or data.test_fraction, or a data file)"
    return ConfigError("data.test_file", None, bound)


@spec
class EvaluationSpec:
    """Settings for the scoring of the lead's own data.

    None of these settings touches a private record; `max_tokens` affects speed and memory, and changes scores only by
    rounding.

    Attributes:
        max_tokens: the maximum number of padded tokens in a forward pass (rows times longest row); a longer example is
            processed alone.  Except for generation, a CPU uses at most 2048.
        generate: true also generates texts, if the model's task can, and scores them with BLEU and ROUGE-L (needs the
            extra `text`).
        max_new_tokens: the maximum length of a generated text, in tokens.
        generation_rows: the number of distinct prompts to generate texts for, the first ones in the file, each with all
            of its references; null: all prompts.
    """

    max_tokens: int = 4096
    generate: bool = False
    max_new_tokens: int = 64
    generation_rows: int | None = None

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_most("max_new_tokens", self.max_new_tokens, MAX_NEW_TOKENS)
        if self.generation_rows is not None:
            check_at_least("generation_rows", self.generation_rows, 1)


@spec
class WritingSpec:
    """Settings of text generation; the fields are also command-line options.

    Attributes:
        max_new_tokens: the maximum length of the text, in tokens.
        temperature: divides the logits before a token is drawn; 0 selects the likeliest token.
        top_p: draw from the smallest set of likeliest tokens with this total probability (Holtzman et al. 2020, arXiv
            1904.09751); 1: from all tokens.
        guidance: above 0, when generating many texts, prefer tokens that another text's prompt makes less likely: the
            difference of the log-probabilities, times this factor, is added to the likeliest tokens' log-probabilities
            (Sanchez et al. 2023, arXiv 2306.17806).
        seed: the seed of the random draws.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    guidance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_most("max_new_tokens", self.max_new_tokens, MAX_NEW_TOKENS)
        check_at_least("temperature", self.temperature, 0)
        check_fraction("top_p", self.top_p, one=True)
        check_at_least("guidance", self.guidance, 0)
        check_at_most("guidance", self.guidance, 1e9)
        check_at_least("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ConfigError("seed", self.seed, "must be below 2**63")

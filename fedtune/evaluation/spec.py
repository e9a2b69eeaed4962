"""Settings of an evaluation, and of the writing of a text."""

from __future__ import annotations

from fedtune.spec import ConfigError, check_at_least, check_at_most, check_fraction, spec

MOST_NEW_TOKENS = 1_000_000
SMALLEST = 20  # units of the smallest group that is scored by itself, unless somebody asks for another number


def build_missing_test_records_error() -> ConfigError:
    """Return the error for a comparison without test records: the runs hold none out, and no data file is given."""
    bound = "is required to compare (or data.test_fraction, or --data FILE): records that no run trains on"
    return ConfigError("data.test_file", None, bound)


@spec
class EvaluationSpec:
    """How the lead's own data is scored.

    None of these settings touches a private record; `max_tokens` affects speed and memory, and changes scores by no
    more than rounding.

    Attributes:
        max_tokens: the maximum of padded tokens in a forward pass (rows times longest row); a longer example still
            runs, alone.  Except for generation, a CPU uses at most 2048.
        generate: true also writes texts, if the model's task can, and scores them with BLEU and ROUGE-L (the extra
            `text`).
        max_new_tokens: the longest text to write, in tokens.
        generation_rows: write texts for this many distinct prompts only, the first ones, each with all of its
            references; null: for every prompt.
    """

    max_tokens: int = 4096
    generate: bool = False
    max_new_tokens: int = 64
    generation_rows: int | None = None

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_most("max_new_tokens", self.max_new_tokens, MOST_NEW_TOKENS)
        if self.generation_rows is not None:
            check_at_least("generation_rows", self.generation_rows, 1)


@spec
class WritingSpec:
    """How a text is written; the fields are also command-line options.

    Attributes:
        max_new_tokens: the longest text, in tokens.
        temperature: divides the logits before a token is drawn; 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens with this total probability (Holtzman et al. 2020, arXiv
            1904.09751); 1: from all tokens.
        guidance: above 0, when many texts are written, prefer tokens that another text's prompt makes less likely: the
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
        check_at_least("--max-new-tokens", self.max_new_tokens, 1)
        check_at_most("--max-new-tokens", self.max_new_tokens, MOST_NEW_TOKENS)
        check_at_least("--temperature", self.temperature, 0)
        check_fraction("--top-p", self.top_p, one=True)
        check_at_least("--guidance", self.guidance, 0)
        check_at_most("--guidance", self.guidance, 1e9)
        check_at_least("--seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ConfigError("--seed", self.seed, "must be below 2**63")

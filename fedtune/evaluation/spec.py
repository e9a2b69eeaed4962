"""The settings of one evaluation."""

from __future__ import annotations

from fedtune.spec import check_at_least, spec


@spec
class EvaluationSpec:
    """How the lead's own data is scored.

    None of these settings touches a private record; `max_tokens` affects speed and memory, and
    changes no score beyond rounding.

    Attributes:
        max_tokens: the most padded tokens in a forward pass (rows times longest row); a longer
            example still runs, alone.
        generate: true lets a model whose task writes text also write texts, which BLEU and ROUGE-L score.
        max_new_tokens: the longest text to write, in tokens.
        generation_rows: write texts for the first distinct prompts only, this many, each with all of its
            references; null: for every prompt.
    """

    max_tokens: int = 4096
    generate: bool = False
    max_new_tokens: int = 64
    generation_rows: int | None = None

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        if self.generation_rows is not None:
            check_at_least("generation_rows", self.generation_rows, 1)

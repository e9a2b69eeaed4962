"""The settings of one evaluation."""

from __future__ import annotations

from fedtune.spec import check_at_least, spec


@spec
class EvaluationSpec:
    """How data that the lead may look at is scored.

    None of these settings touches a private record; `max_tokens` is a speed and memory knob and
    changes no score beyond rounding.

    Attributes:
        max_tokens: padded tokens a forward pass may hold (rows times longest row); one example
            longer than this still runs, alone.
        generate: whether a model whose task writes text also writes some, which BLEU and ROUGE-L score.
        max_new_tokens: longest text to write, in tokens.
        generation_rows: write for this many distinct prompts only, from the first on, each with all of its
            references; `None` writes for every prompt.
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

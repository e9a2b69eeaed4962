from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.generation import PromptSet, evaluate_generation, generate, text_scores, write_greedily
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import TaskModel

from .conftest import END

CPU = torch.device("cpu")
ENDS = frozenset({END})


def prompts_of(dataset: TextDataset) -> list[np.ndarray]:
    """Prompts of many lengths: the first half of each text."""
    return [ids[: (len(ids) + 1) // 2] for ids in dataset.input_ids]


def written_without_cache(model: TaskModel, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """Greedy text by whole forward passes over one unpadded row."""
    token_ids = torch.as_tensor(prompt, dtype=torch.int64)[None]
    with torch.no_grad():
        for _ in range(num_tokens):
            token_ids = torch.cat([token_ids, model.base(input_ids=token_ids).logits[:, -1].argmax()[None, None]], 1)
    return token_ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["language_model", "language_model_without_positions"])
def test_padding_and_cache_change_no_token(
    family: str, completions: TextDataset, request: pytest.FixtureRequest
) -> None:
    language_model = request.getfixturevalue(family)
    prompts = prompts_of(completions)
    assert len({len(prompt) for prompt in prompts}) > 3
    written = write_greedily(language_model.base, prompts, end_ids=frozenset(), pad_id=2, max_new_tokens=8, device=CPU)
    expected = [written_without_cache(language_model, prompt, 8) for prompt in prompts]
    assert len({tuple(row) for row in expected}) > 10, "the texts have to differ for this test to mean anything"
    assert written == expected


def test_each_row_ends_at_its_own_end_of_text(language_model: TaskModel, completions: TextDataset) -> None:
    prompts = prompts_of(completions)
    whole = [written_without_cache(language_model, prompt, 8) for prompt in prompts]
    end = whole[0][3]
    written = write_greedily(
        language_model.base, prompts, end_ids=frozenset({end, 999}), pad_id=2, max_new_tokens=8, device=CPU
    )
    assert written == [row[: row.index(end)] if end in row else row for row in whole]
    assert len(written[0]) <= 3


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_texts_come_in_the_order_of_prompts_whatever_the_batches(
    language_model: TaskModel, completions: TextDataset, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> None:
    prompts = prompts_of(completions)
    expected = []
    for prompt in prompts:
        row = written_without_cache(language_model, prompt, 6)
        row = row[: row.index(2)] if 2 in row else row
        expected.append(tokenizer.decode(row, skip_special_tokens=True))
    texts = generate(
        language_model, prompts, tokenizer=tokenizer, end_ids=ENDS, max_new_tokens=6, max_tokens=max_tokens
    )
    assert texts == expected
    assert sum(text.startswith("w") for text in texts) > 10


def test_a_text_beyond_the_models_positions_is_refused(
    language_model: TaskModel, completions: TextDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation.max_new_tokens = 30: .* takes 32 in all"):
        generate(
            language_model,
            prompts_of(completions),
            tokenizer=tokenizer,
            end_ids=ENDS,
            max_new_tokens=30,
            max_tokens=100,
        )


def test_bleu_and_rouge_by_hand_with_unequal_numbers_of_references() -> None:
    hypotheses = ["the cat is on the mat", "a b c d e"]
    references = [["the cat sat on the mat"], ["z z z z z z z", "a b c d e"]]
    # Matched n-grams of order 1 to 4: 5 of 6, 3 of 5, 1 of 4, 0 of 3 and 5 of 5, 4 of 4, 3 of 3, 2 of 2.
    bleu = 100 * (10 / 11 * 7 / 9 * 4 / 7 * 2 / 5) ** 0.25
    # Longest common subsequences: 5 of 6 words in both directions, and all.
    assert text_scores(hypotheses, references) == pytest.approx({"bleu": bleu, "rouge_l": (5 / 6 + 1) / 2})
    assert text_scores(hypotheses[::-1], references[::-1]) == pytest.approx({"bleu": bleu, "rouge_l": 11 / 12})


def test_scores_of_equal_and_of_empty_texts() -> None:
    reference = "one two three four five"
    assert text_scores([reference], [[reference]]) == pytest.approx({"bleu": 100.0, "rouge_l": 1.0})
    assert text_scores([""], [[reference]]) == {"bleu": 0.0, "rouge_l": 0.0}


def test_a_prompt_is_written_for_once_with_all_its_references() -> None:
    asked = [np.array(row, dtype=np.int32) for row in ([5, 6], [5], [5, 6])]
    prompts = PromptSet.of(asked, ["first", "other", "second"])
    assert prompts.references == (("first", "second"), ("other",))
    assert [ids.tolist() for ids in prompts.input_ids] == [[5, 6], [5]]
    assert PromptSet.of(asked, ["first", "other", "second"], rows=1).references == (("first", "second"),)


def test_no_prompt_at_all_is_a_data_error() -> None:
    with pytest.raises(DataError, match="must hold at least one prompt"):
        PromptSet.of([], [])


def test_generated_text_is_scored_against_its_prompt(
    language_model: TaskModel, completions: TextDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"tokenizer": tokenizer, "end_ids": ENDS, "max_new_tokens": 8, "max_tokens": 100}
    texts = generate(language_model, prompts_of(completions), **options)
    said = [(prompt, text) for prompt, text in zip(prompts_of(completions), texts, strict=True) if text]
    assert len(said) > 10
    copied = PromptSet(
        input_ids=tuple(prompt for prompt, _ in said), references=tuple((text, "w3") for _, text in said)
    )
    scores = evaluate_generation(language_model, copied, **options)
    assert scores == pytest.approx({"bleu": 100.0, "rouge_l": 1.0})

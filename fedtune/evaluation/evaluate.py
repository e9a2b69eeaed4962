"""The one entry point: score a task model on data that the lead may look at."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fedtune.data.tokenise import TextDataset
from fedtune.evaluation.causal_lm import evaluate_causal_lm
from fedtune.evaluation.classification import evaluate_classification
from fedtune.evaluation.forward import KeptStates
from fedtune.evaluation.generation import PromptSet, evaluate_generation
from fedtune.evaluation.spec import EvaluationSpec
from fedtune.model.task import CausalLMModel, TaskModel
from fedtune.spec import check_one_of


def evaluate(
    task_model: TaskModel,
    dataset: TextDataset,
    *,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    prompts: PromptSet | None = None,
    kept: KeptStates | None = None,
) -> dict[str, float]:
    """Score `task_model` on `dataset`, without gradients; its training flags end as they were.

    The scores are exact and not covered by any privacy guarantee: they must not leave a site when
    the data is private.

    Args:
        task_model: a model of the given task.
        dataset: the tokenised examples, at least one.
        task: "classification" or "causal_lm".
        tokenizer: the model's, with a padding token (which one does not matter).
        spec: batch and text sizes.
        prompts: what to generate from and score against, when `spec.generate`; `None` skips
            generation, as after a round, when only the loss is wanted.
        kept: what the model's frozen layers made of `dataset`, from one scoring to the next; empty before the first.

    Returns:
        classification: `accuracy`, `macro_f1`, `loss`.  causal_lm: `loss`, `perplexity`, and with
        generation `bleu` (0 to 100) and `rouge_l` (0 to 1).

    Raises:
        DataError: when there is nothing to score.
        ConfigError: when `task` is unknown or a text may outgrow the model's positions.
    """
    check_one_of("task", task, ("classification", "causal_lm"))
    pad_id = tokenizer.pad_token_id
    if task == "classification":
        return evaluate_classification(task_model, dataset, pad_id=pad_id, max_tokens=spec.max_tokens, kept=kept)
    scores = evaluate_causal_lm(task_model, dataset, pad_id=pad_id, max_tokens=spec.max_tokens, kept=kept)
    if not spec.generate or prompts is None:
        return scores
    assert isinstance(task_model, CausalLMModel)
    return scores | evaluate_generation(
        task_model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=spec.max_new_tokens,
        max_tokens=spec.max_tokens,
    )

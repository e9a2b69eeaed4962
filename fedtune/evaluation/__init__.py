"""Evaluation of a task model: scores, scores by group, confidence intervals, text generation, BLEU and ROUGE-L."""

"""Evaluation of a task model: scores, scores by group, confidence intervals, and text generation with BLEU and
ROUGE-L.
"""

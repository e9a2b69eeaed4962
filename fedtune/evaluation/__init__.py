"""Scores of a task model: classification, causal language modelling, generated text.

Start at `fedtune.evaluation.evaluate.evaluate`.  Nothing is imported here, so that `spec` stays light.
"""

"""Evaluation of a task model: scores (`scoring`), scores by group (`groups`), confidence intervals (`bootstrap`), text
generation with BLEU and ROUGE-L (`generation`), and the settings (`spec`).
"""

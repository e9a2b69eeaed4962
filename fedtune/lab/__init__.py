"""Tools that no run depends on: multi-run studies, audits and attacks, data preparation, distillation and
personalization.
"""

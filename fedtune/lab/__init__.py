"""What no run needs: studies of several runs, attacks on the guarantee, preparation of data files, distillation and
personalization.
"""

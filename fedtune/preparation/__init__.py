"""What a person does with a data file before a run: see what it is, get a first experiment for it, check and clean it.

Training reads none of this.
"""

"""What a person does with a data file before a run: see what it is.  Training reads none of this."""

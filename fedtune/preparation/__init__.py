"""What a person does with a data file before a run: see what it is, check it, clean it.  Training reads none of this."""

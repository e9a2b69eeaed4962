"""What a lead keeps of its runs and reads again: results, environment, provenance, finished models side by side."""

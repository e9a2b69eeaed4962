"""Privacy audits, which attack the guarantee: empirical lower bounds on epsilon, next to the claimed upper bounds."""

"""Known attacks on finished runs, each compared with the bound that the guarantee implies."""

"""What no run needs: studies of several runs, attacks on the guarantee, and the preparation of data files."""

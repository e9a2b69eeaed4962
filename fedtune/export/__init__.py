"""A finished run's model in forms that others load without fedtune."""

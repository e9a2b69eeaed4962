"""One round of a federation as plain functions that are independent of the network."""

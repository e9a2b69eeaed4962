"""One round of a federation as plain functions, without a word of the network."""

"""What a run or a ledger left behind, as its files are."""

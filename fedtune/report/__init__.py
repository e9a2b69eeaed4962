"""The privacy report of a run or a ledger."""

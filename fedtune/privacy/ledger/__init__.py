"""The record of everything done to one population's records: a file of signed events, and what follows from them.

chain       one event, the hash chain, signed heads, what a ledger that was put back takes over from an anchor
history     what events add up to: runs, charges, what is set aside
register    under which cohort each person was first admitted, where people arrive over time
store       the SQLite file, and events written to it durably
spending    what is left of a cap; whether more fits every cap
site_ledger the `Ledger`: each decision one transaction
verify      checking somebody's ledger with the file and a public key
"""

"""The record of everything done to one population's records: a file of signed events, and the figures derived from it.

chain       a single event, the hash chain, signed heads, and what a restored ledger takes over from an anchor
history     the sum of the events: runs, charges, reservations
register    the cohort under which each person was first admitted, in populations with arrivals
store       the SQLite file, and durable writes of events
spending    the room left under a cap, and whether a new charge fits every cap
site_ledger the `Ledger`: each decision is one transaction
verify      verification of a ledger from its file and a public key alone
"""

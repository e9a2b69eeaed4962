"""The ledger of a population: a file of signed events, and the spending and decisions derived from these events.

chain       events, the hash chain, signed heads and restore notes
history     the state derived from the events: runs, charges, reservations
register    the cohort of each person at first admission, in populations with arrivals
store       durable storage of events in SQLite
spending    the remaining budget, and checks of new charges against every cap
site_ledger the `SiteLedger`, where each decision is one transaction
verify      verification of a ledger from its file and a public key
"""

"""The ledger of a population: a file of signed events, and the spending and decisions derived from these events.

chain          events, the hash chain, signed heads and restore notes
history        the state derived from the events: runs, charges, reservations
register       the cohort of each person at first admission, in populations with arrivals
run_acceptance the remaining budget, and checks of new runs and charges against every cap
site_ledger    the `SiteLedger`, where each decision is one transaction
store          durable storage of events in SQLite
verify         verification of a ledger from its file and a public key
"""

"""The privacy core: what one step costs, what a site allows, what it has spent, and what may leave it.

docs/privacy_review.md says in which order to read it, and which test shows what.  In short:

    events accountant filter          what happened, and what that comes to as epsilon
    randomness mechanism plan         noise and samples; the numbers of a run
    policy policy_tables policy_file  a site's own limits, and their file
    proposal release                  what a lead asks for, and all that may leave
    ledger spending                   decisions: one transaction each, within every cap
    event_store ledger_file chain notes history verify keys site_files durable     what the ledger stands on

It needs only the standard library, numpy, dp-accounting and cryptography, so that it can be audited alone.
"""

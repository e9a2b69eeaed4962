"""The privacy core: what one step costs, what a site allows, what it has spent, and what may leave it.

docs/privacy_review.md says in which order to read it, and which test shows what.  In short:

    events accountant filter    what happened, and what that comes to as epsilon
    randomness mechanism plan   noise and samples; the numbers of a run
    policy policy_file          a site's own limits, and their file
    proposal release            what a lead asks for, and all that may leave
    ledger/                     decisions, each one transaction within every cap, and the file of signed events
    keys durable site_files     keys and signatures, files that a crash leaves whole, where a site's files lie

It needs only the standard library, numpy, dp-accounting, cryptography and mpmath, so that it can be audited alone.
"""

"""The privacy core: what one step costs, what a site allows, what it has spent, and what may leave it.

docs/privacy_review.md says in which order to read it, and which test shows what.  In short:

    events accountant filter            what happened, and what that comes to as epsilon
    randomness mechanism                noise and samples
    distributed_noise threshold trust   the noise of a secure sum, how many sites must help, whom a site relies on
    run_plan selection                  the numbers of a run, and the price of a search over runs
    site_policy policy_file             a site's own limits, and their file
    proposal release about              what a lead asks for, all that may leave, and what it is for
    ledger/                             decisions, each one transaction within every cap, and the file of signed events
    keys durable site_files             keys and signatures, files that a crash leaves whole, where a site's files lie

It needs only the standard library, numpy, scipy, dp-accounting, cryptography and mpmath, so that it can be audited
alone.
"""

"""The privacy core: the cost of a training step, the limits and the spending of a site, and everything that may leave
it.

docs/privacy_review.md suggests a reading order and names the test behind each claim.  In short:

    events accountant filter            privacy events, and the epsilon that they add up to
    randomness mechanism                noise and sampling
    distributed_noise threshold trust   shared noise for secure aggregation, its threshold, and a site's trust in others
    run_plan selection                  the parameters of a run, and the price of a search over several runs
    site_policy policy_file             a site's own limits, and the file that holds them
    proposal release about              a lead's proposal, everything that may leave a site, and its purpose
    own_release                         a count, a sum or other software's training, which the site charges itself
    ledger/                             the signed event log of a site, and its decisions: one transaction each
    keys durable find_site_files             keys and signatures, crash-safe files, and the paths of a site's files

The package needs only the standard library, numpy, scipy, dp-accounting, cryptography and mpmath, so that it can be
audited alone.
"""

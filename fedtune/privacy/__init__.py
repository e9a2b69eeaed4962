"""The privacy core: accounting, sampling, noise, a site's limits and ledger, and the types of all releases.

docs/privacy_review.md suggests a reading order and names the test behind each claim. In short:

    events accountant filter            privacy events, and the epsilon of their composition
    randomness mechanism                noise and sampling
    distributed_noise threshold trust   distributed noise and the threshold of secure aggregation; trust between sites
    run_plan selection                  the parameters of a run, and the privacy cost of a hyperparameter search
    site_policy policy_file             a site's limits, and the file format of these limits
    proposal release                    a lead's proposal, and the types of everything that may leave a site
    own_release                         a site's own releases: a count, a sum, or training with other software
    ledger/                             the signed event log of a site; each decision is one transaction
    keys durable site_files             keys and signatures, crash-safe writes, and the paths of a site's files

The package depends only on the standard library, numpy, scipy, dp-accounting, cryptography and mpmath, so that it can
be audited separately.
"""

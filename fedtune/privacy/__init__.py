"""The privacy core: mechanism, randomness, accounting, plan, ledger, release.

Read it in the order events, accountant, randomness, mechanism, plan, ledger, release.  It needs only the standard
library, numpy, dp-accounting and cryptography, so that it can be audited alone.
"""

"""The small run of the tests of sites, and the receipts of those of a federation."""

from __future__ import annotations

from ..federation.conftest import adapter, key_of, plan, receipt
from ..sites.conftest import letters

__all__ = ["adapter", "key_of", "letters", "plan", "receipt"]

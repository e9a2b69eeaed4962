"""Whether what a command prints has room on a terminal of 80 columns."""

import re

COLUMNS = 80
_COPIED = re.compile(r"[^\s]*(?:/|[0-9a-f]{32,})[^\s]*")


def too_wide(text: str) -> list[str]:
    """Lines that are wider, but for a path, key or hash in one piece: such a one is copied, and so never cut."""
    return [line for line in text.splitlines() if len(_COPIED.sub(lambda found: found[0][:20], line)) > COLUMNS]

"""The `fedtune` command with training that a test can pause or make fail: `python held_site.py FOLDER ARGUMENTS`.

A trained round does not return while FOLDER/hold exists. If FOLDER/fail exists, training raises its text. A site that
lost its server retries every two seconds, where a real one waits for up to fifteen.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedtune.ops.services.site_service as site_service
import fedtune.sites.work as site_work
from fedtune.cli.main import main

_HOLD, _FAIL = Path(sys.argv[1]) / "hold", Path(sys.argv[1]) / "fail"


def hold_training(train_function: Callable[..., Any]) -> Callable[..., Any]:
    def train(*args: Any, **kwargs: Any) -> Any:
        result = train_function(*args, **kwargs)
        while _HOLD.exists():
            time.sleep(0.02)
        if _FAIL.exists():
            raise ValueError(_FAIL.read_text())
        return result

    return train


site_work.train_round = hold_training(site_work.train_round)
site_work.compute_round_share = hold_training(site_work.compute_round_share)
site_service._MAX_WAIT_S = 2.0
raise SystemExit(main(sys.argv[2:]))

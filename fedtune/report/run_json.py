"""The form of a `run.json`: a run folder may come from anybody, and a report relies on these values being there."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import FiniteFloat, TypeAdapter, ValidationError

_Scores = dict[str, FiniteFloat | None]
"""null for one that is not finite."""


@dataclass
class _Spent:
    rounds: int
    steps: int
    sampling_rate: FiniteFloat
    noise_multiplier: FiniteFloat
    metrics_noise_multiplier: FiniteFloat
    upper_bound: bool
    epsilon: FiniteFloat | None = None
    epsilon_rdp: FiniteFloat | None = None
    planned_epsilon: FiniteFloat | None = None


@dataclass
class _Privacy:
    delta: FiniteFloat
    seeded_noise: bool
    sites: dict[str, _Spent]
    unit: str = "record"


@dataclass
class _Final:
    metrics: _Scores
    metrics_before: _Scores = field(default_factory=dict)
    seconds: FiniteFloat | None = None
    peak_memory_bytes: int | None = None


@dataclass
class _Round:
    round: int
    seconds: FiniteFloat
    sites: list[str]
    failed_sites: dict[str, str]
    bytes_down: int
    bytes_up: int
    metrics: _Scores
    site_scores: dict[str, tuple[FiniteFloat, FiniteFloat]] = field(default_factory=dict)
    ended: str = ""


@dataclass
class _Run:
    rounds: list[_Round]
    final: _Final
    privacy: _Privacy
    config_sha256: str = ""
    fedtune_version: str = ""


_ADAPTER = TypeAdapter(_Run)


def check(data: bytes) -> None:
    """Require the form of a `run.json`; keys beside those that are needed are let be.

    Raises:
        ValueError: it has another form.
    """
    try:
        run = _ADAPTER.validate_json(data, strict=True)
    except ValidationError as error:
        about = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, about['loc']))}: {about['msg']}") from None
    if not run.privacy.sites:
        raise ValueError("privacy.sites: names no site")

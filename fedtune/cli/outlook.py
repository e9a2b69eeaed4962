"""A run before any data is touched, as a value that `fedtune plan` shows and writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.config import RunConfig
from fedtune.federation.planner import Change, Price, SecureSums, signal_to_noise
from fedtune.federation.verdict import Verdict
from fedtune.privacy.accountant import NEIGHBOURING_RELATION
from fedtune.privacy.run_plan import Plan
from fedtune.show.sections import SCHEMA_VERSION
from fedtune.version import __version__
from fedtune.words import jsonable

if TYPE_CHECKING:
    from fedtune.runs.forecast import Forecast  # which imports torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A run before any data is touched.

    Attributes:
        config: the run's settings; where something was solved for, `price.plan` has the answer.
        solved: "noise", "rounds" or "sampling_rate", if the plan was solved for it.
        epsilon: that `changes` keep within.
        device: that the forecast was timed on.
        lead_assumed: policies were asked for the first lead that each allows.
        model_sha256: of the base model's weights; None: the settings do not pin it, and no model was loaded.
        secure_sums: what they would give in place of a plain run; None: they are planned, or cannot be.
    """

    config: RunConfig
    price: Price
    solved: str | None
    epsilon: float
    changes: tuple[Change, ...]
    forecast: Forecast | None
    device: str
    verdicts: tuple[Verdict, ...]
    lead_assumed: bool
    model_sha256: str | None = None
    secure_sums: SecureSums | None = None

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return self.price.plan

    @property
    def signal_to_noise(self) -> float | None:
        """See `planner.signal_to_noise`; None: no model was loaded, so nobody counted what is trained."""
        sizes = {name: site.declared_size for name, site in self.price.sites.items()}
        return signal_to_noise(self.plan, sizes, values=self.forecast.values) if self.forecast else None

    @property
    def calibrated(self) -> bool:
        """Whether the noise was found from epsilon, and not given."""
        return self.config.privacy.noise_multiplier is None and self.solved in (None, "noise")

    @property
    def guaranteed(self) -> bool:
        """Whether the epsilons promise anything."""
        return self.plan.private and not self.config.runtime.seeded_noise

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain JSON; null stands for no bound."""
        config, price, plan = self.config, self.price, self.plan
        common = {
            "steps": price.steps,
            "sampling_rate": plan.sampling_rate,
            "noise_multiplier": plan.noise_multiplier,
            "epsilon": price.epsilon,
            "epsilon_rdp": price.epsilon_rdp,
            "epsilon_filter": price.epsilon_filter,
        }
        figures: dict[str, Any] = jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "fedtune_version": __version__,
                "run": config.name,
                "config_sha256": config.digest(),
                "model": config.model.path,
                "model_sha256": self.model_sha256,
                "dataset": config.data.dataset,
                "solved_for": self.solved,
                "target_epsilon": config.privacy.epsilon if plan.private else None,
                "guaranteed": self.guaranteed,
                "seeded_noise": config.runtime.seeded_noise,
                "neighbouring_relation": NEIGHBOURING_RELATION.name.lower(),
                "noise_calibrated": self.calibrated,
                **dataclasses.asdict(price),
                "sites": {name: dataclasses.asdict(site) | common for name, site in price.sites.items()},
                "steps": price.steps,
                "signal_to_noise": self.signal_to_noise,
                "what_if_epsilon": self.epsilon,
                "what_if": self.changes,
                "secure_sums": self.secure_sums,
                "forecast": self.forecast and dataclasses.asdict(self.forecast) | {"device": self.device},
                "lead_assumed": self.lead_assumed,
                "policies": [dataclasses.asdict(one) | {"allowed": one.allowed} for one in self.verdicts],
            }
        )
        return figures

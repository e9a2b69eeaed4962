"""Everyone in a simulation, in one process: virtual sites with their records and ledgers, and the lead with its own."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedtune.config import RunConfig, parse
from fedtune.data import Record, TextDataset
from fedtune.data.load import SiteRecords, lead_records, simulated_site_records, tokenise
from fedtune.data.records import record_key
from fedtune.evaluation.evaluate import evaluate
from fedtune.evaluation.generation import PromptSet
from fedtune.evaluation.units import unit_scores
from fedtune.federation.protocol import RoundRequest
from fedtune.federation.site import Site, Trained
from fedtune.model import Adapter, TaskModel, load_task_model, load_tokenizer
from fedtune.privacy.ledger import Ledger
from fedtune.privacy.mechanism import noised_scores
from fedtune.privacy.plan import Plan
from fedtune.privacy.randomness import Randomness, SeededRandomness, SystemRandomness
from fedtune.sites.virtual_site import VirtualSites
from fedtune.training.examples import SiteExamples
from fedtune.training.local import RoundOfTraining, train_round
from fedtune.training.machine import device_for, keeps_frozen_states, ready_model
from fedtune.training.preflight import check_examples_alone


class Participants:
    """One frozen base model, shared by every site and the lead; sites differ in records and ledger only.

    Args:
        config: the run's.
        folder: the run folder, where each site's ledger lies.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.sites = VirtualSites.of(config, folder, config.plan())
        self.device = device_for(config.runtime.device)
        self.tokenizer = load_tokenizer(config.model)
        self.model = ready_model(
            config.task_model(), config.runtime, max_length=config.data.max_length, device=self.device
        )
        self.initial_adapter = Adapter.of(self.model)
        self._randomness: Randomness = (
            SeededRandomness(config.seed) if config.runtime.seeded_noise else SystemRandomness()
        )

    def check_model(self) -> None:
        """Try a training pass on made-up examples.

        Raises:
            ConfigError: the model cannot be trained with per-example clipping.
        """
        if self.config.privacy.private:
            check_examples_alone(self.model, task=self.config.task)

    @cached_property
    def _site_records(self) -> dict[str, SiteRecords]:
        """Each active site's records."""
        sites = simulated_site_records(
            self.config.data,
            task=self.config.task,
            num_sites=self.config.federation.num_sites,
            seed=self.config.seed,
        )
        federation = self.config.federation
        return {n: records for n, records in zip(federation.names, sites, strict=True) if n in federation.active}

    @cached_property
    def site_data(self) -> dict[str, SiteExamples]:
        """Each site's tokenised training records."""
        return {
            name: SiteExamples(
                self._tokenised(records.training),
                pad_id=self.tokenizer.pad_token_id,
                max_tokens=self.config.runtime.micro_batch_tokens,
                device=self.device,
            )
            for name, records in self._site_records.items()
        }

    @cached_property
    def _heldout_data(self) -> dict[str, TextDataset]:
        """Each site's tokenised held-out records."""
        return {name: self._tokenised(records.heldout) for name, records in self._site_records.items()}

    def _tokenised(self, records: Sequence[Record]) -> TextDataset:
        return tokenise(records, self.tokenizer, spec=self.config.data, task=self.config.task)

    @property
    def plan(self) -> Plan:
        """The run's plan, its noise calibrated once in a process."""
        return self.sites.plan

    @cached_property
    def _keeps_frozen_states(self) -> bool:
        """Whether what the frozen layers make of every site's records fits the memory set aside for it."""
        # From public numbers: no site's records decide how another site's are computed.
        tokens = sum(self.config.declared_sizes().values()) * self.config.data.max_length
        return keeps_frozen_states(self.model, self.config.runtime, num_tokens=tokens)

    @cached_property
    def validation(self) -> LeadData | None:
        """The lead's validation data, if it has a file."""
        data = self.config.data
        return self.lead_data(data.validation_file, rows=data.validation_rows, key="data.validation_file")

    @cached_property
    def test(self) -> LeadData | None:
        """The lead's test data, if it has a file."""
        data = self.config.data
        return self.lead_data(data.test_file, rows=data.test_rows, key="data.test_file")

    def lead_data(self, file: str | None, *, rows: int | None, key: str) -> LeadData | None:
        """Records of the lead's own, tokenised; None for no file."""
        if file is None:
            return None
        return LeadData.read(file, self.config, self.tokenizer, rows=rows, key=key)

    def site(self, index: int) -> Site:
        """Open a site with its ledger, as the file stands now."""
        name = self.config.federation.active[index]
        ledger = self.sites.ledger(name)
        proposal = self.config.proposal(lead=self.sites.lead_key().public, plan=self.plan)

        def train(request: RoundRequest, adapter: Adapter, attempt: int) -> Trained:
            scores = self._noised_scores(name, request.round, attempt, adapter) if self.plan.releases_metrics else None
            trained = self._train(request, adapter, attempt)
            return Trained(adapter=trained, scores=scores, fingerprint=self._fingerprint(name, ledger))

        return Site(
            name=name,
            proposal=proposal,
            template=self.initial_adapter,
            declared_size=self.config.declared_sizes()[name],
            ledger=ledger,
            train=train,
        )

    def score(self, adapter: Adapter, data: LeadData | None, *, generate: bool = False) -> dict[str, float]:
        """Scores of `adapter` on the lead's data; empty without data."""
        if data is None:
            return {}
        adapter.load_into(self.model)
        return _score(self.model, self.tokenizer, data, self.config, generate=generate)

    def _train(self, request: RoundRequest, adapter: Adapter, attempt: int) -> Adapter:
        examples = self.site_data[request.site]
        if self._keeps_frozen_states:
            examples.keep_frozen_states(self.model)
        return train_round(
            self.model,
            adapter,
            examples,
            RoundOfTraining(
                site=request.site,
                round=request.round,
                attempt=attempt,
                plan=request.proposal.plan,
                training=self.config.training,
                declared_size=self.config.declared_sizes()[request.site],
            ),
            randomness=self._randomness,
        )

    def _noised_scores(self, site: str, round: int, attempt: int, adapter: Adapter) -> tuple[float, float]:
        """How the adapter that was sent does on the site's held-out records, noised as the plan says."""
        adapter.load_into(self.model)
        exact = unit_scores(
            self.model, self._heldout_data[site], task=self.config.task, pad_id=self.tokenizer.pad_token_id
        )
        return noised_scores(
            exact,
            declared_size=self.config.declared_sizes()[site] * self.config.data.heldout_fraction,
            noise_multiplier=self.plan.metrics_noise_multiplier,
            stream=self._randomness.stream(site, round, attempt, "scores"),
        )

    def _fingerprint(self, site: str, ledger: Ledger) -> str:
        """HMAC, in hex, of the records that the site trained on, under a key of the site's own."""
        digest = hmac.new(ledger.fingerprint_key(), digestmod="sha256")
        for record in self._site_records[site].training:
            digest.update(hashlib.sha256(record_key(record)).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class LeadData:
    """Records that the lead may look at, and the same tokenised; not covered by the guarantee."""

    records: list[Record]
    examples: TextDataset

    @classmethod
    def read(
        cls, file: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, key: str
    ) -> LeadData:
        """Read and tokenise a file that the setting `key` named."""
        records = lead_records(config.data, file, task=config.task, rows=rows, key=key)
        return cls(records, tokenise(records, tokenizer, spec=config.data, task=config.task))


@lru_cache(maxsize=1)
def participants(config_json: str, folder: str) -> Participants:
    """A run's participants in this process, built on first use: a Ray actor keeps its base model between rounds."""
    return Participants(parse(json.loads(config_json)), Path(folder))


def score_saved(config: RunConfig, adapter_folder: Path, data_file: str) -> dict[str, float]:
    """Scores of a saved adapter on a file that has the columns of `config`."""
    tokenizer = load_tokenizer(config.model)
    data = LeadData.read(data_file, config, tokenizer, rows=None, key="--data")
    model = load_task_model(adapter_folder, model=config.model, device=device_for(config.runtime.device))
    return _score(model, tokenizer, data, config, generate=True)


def _score(
    model: TaskModel, tokenizer: PreTrainedTokenizerBase, data: LeadData, config: RunConfig, *, generate: bool
) -> dict[str, float]:
    spec = config.evaluation
    wanted = generate and spec.generate and config.task == "causal_lm"
    prompts = PromptSet.of(data.examples, data.records, rows=spec.generation_rows) if wanted else None
    return evaluate(model, data.examples, task=config.task, tokenizer=tokenizer, spec=spec, prompts=prompts)

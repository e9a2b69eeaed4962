"""`RunConfig`: a run's settings, composed from the specs of all layers, validated by pydantic, and their digest."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from fedtune.codec import hash_json, read_bounded_file
from fedtune.data.spec import DataSpec
from fedtune.evaluation.spec import EvaluationSpec
from fedtune.federation.run_folder import RunFolder, suggest_run_folders
from fedtune.federation.spec import FederationSpec, PublicSpec
from fedtune.model.spec import HeadSpec, LoraSpec, ModelSpec, TaskModelSpec
from fedtune.privacy import accountant
from fedtune.privacy.mechanism import PrivacySpec
from fedtune.privacy.proposal import UNVERIFIED, Proposal
from fedtune.privacy.release import Offer
from fedtune.privacy.run_plan import Plan
from fedtune.spec import NOT_GIVEN, RUN_SCHEMA, ConfigError, check_name, check_schema, expand_home, spec
from fedtune.tasks.base import Task
from fedtune.tasks.registry import get_task
from fedtune.training.spec import STUDIED_SCALE, RuntimeSpec, TrainingSpec, choose_learning_rate

MAX_NAME = 200
"""Maximum length of a run's name. The names of a site's files also contain 33 characters of the digest, a suffix and a
process id, and file systems allow at most 255 bytes."""

MAX_SEED = 2**63 - 1  # limit of random generators
_FILES = frozenset({"public.train_file", *(f"data.{part}_file" for part in ("train", "validation", "test"))})
_FOLDERS = {"resume", "tracking.output_dir", "model.adapter", "model.cache_dir", "runtime.sites_dir"}
PATHS = _FILES | _FOLDERS | {"runtime.kept_states_folder"}
"""Settings that are always paths on this machine.  `model.path` is resolved separately (`fedtune.model.source`)."""
_MAX_YAML = 1 << 24  # maximum size of a settings file in bytes


@spec
class TrackingSpec:
    """Settings for the terminal display, the log file and the experiment tracker of a run.

    Attributes:
        progress: display rounds, sites, scores, epsilon and remaining time on the terminal.
        output_dir: parent folder of run folders.
        log_level: level of `log.txt`; "debug" also logs the RDP epsilon at the end of a run.
        tracker: also log the run to "mlflow", "tensorboard" or "wandb" (each an extra), in a folder of that name in
            `output_dir`; "none": no tracker.
        send_to: URL of an MLflow or wandb server that receives the run instead of that folder. This releases the
            content of run.json; null: nothing leaves this machine.
    """

    progress: bool = True
    output_dir: str = "runs"
    log_level: Literal["debug", "info", "warning"] = "info"
    tracker: Literal["none", "mlflow", "tensorboard", "wandb"] = "none"
    send_to: str | None = None

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("output_dir", self.output_dir, "must not be blank; '.' is the current folder")
        has_server = self.tracker in ("mlflow", "wandb")
        if self.send_to is not None and not (has_server and re.match("https?://", self.send_to)):
            bound = "must be null, or an https:// or http:// URL for mlflow or wandb"
            raise ConfigError("send_to", self.send_to, bound)


@spec
class AboutSpec:
    """Description of a release for a public registry, written by a person. No result depends on it.

    An empty string means "not given".

    Attributes:
        curator: organization that is responsible for the release.
        description: purpose and content of the training, for a general audience.
        intended_use: intended use of the model.
        sector: sector of the application, such as health, banking, public administration.
        published: release date, past or planned.
        access: recipients of the release: everybody, some organizations by contract, or nobody outside.
        channel: form of the release: such as a hub, a download, or a query interface.
        acceptable_use: permitted and prohibited uses of the release.
        dynamics: whether the records are static, or dynamic (added to or changed between runs).
        preprocessing: processing of the records before fedtune read them.
        tuning: method of selecting the settings, and the records used for it, unless a fedtune search selected them.
        justification: reason for this privacy unit, this epsilon and this delta.
    """

    curator: str = ""
    description: str = ""
    intended_use: str = ""
    sector: str = ""
    published: str = ""
    access: str = ""
    channel: str = ""
    acceptable_use: str = ""
    dynamics: str = ""
    preprocessing: str = ""
    tuning: str = ""
    justification: str = ""

    @property
    def purpose(self) -> str | None:
        """Purpose of the training: the intended use, the description if that is empty, or None if both are empty."""
        return self.intended_use or self.description or None


@spec
class ReportSpec:
    """Settings of a run's report.

    Attributes:
        language: language of the page, "en" or "de"; report.json is identical in every language.
    """

    language: Literal["en", "de"] = "en"
    about: AboutSpec = AboutSpec()


@spec
class CostSpec:
    """Settings for measuring a run's energy use, which does not affect any result.

    Attributes:
        energy: measure the energy use of this machine with codecarbon (the extra `cost`).
        country: three-letter code (DEU, FRA, USA) of the country whose power grid determines the carbon emissions;
            null: no carbon figure.
    """

    energy: bool = False
    country: str | None = None

    def __post_init__(self) -> None:
        if self.country is not None and not re.fullmatch("[A-Z]{3}", self.country):
            raise ConfigError("country", self.country, "must be a code of three capital letters, such as DEU or USA")
        if self.country is not None and not self.energy:
            raise ConfigError("country", self.country, "requires cost.energy=true")


@spec
class RunConfig:
    """The complete configuration of a run.

    Attributes:
        name: name of the run and of its folder.
        task: name of the task.
        task_settings: settings specific to the task; null: its defaults, or none.
        seed: seed of the adapter's random initialization and of the partition into sites; seed of the noise only in a
            marked study.
        resume: run folder to continue, or null.
    """

    name: str
    task: str
    model: ModelSpec
    data: DataSpec
    task_settings: Any = None
    lora: LoraSpec = LoraSpec()
    head: HeadSpec = HeadSpec()
    privacy: PrivacySpec = PrivacySpec()
    training: TrainingSpec = TrainingSpec()
    federation: FederationSpec = FederationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    tracking: TrackingSpec = TrackingSpec()
    report: ReportSpec = ReportSpec()
    cost: CostSpec = CostSpec()
    public: PublicSpec = PublicSpec()
    seed: int = 0
    resume: str | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name, most=MAX_NAME, marks="-_.,=")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError("seed", self.seed, f"must be from 0 to {MAX_SEED}")
        task = self.bound_task
        object.__setattr__(self, "task_settings", task.own)
        task.check_own(self.data)
        try:
            if self.runtime.kind == "deployment":
                self.data.require_lead_files()
            task.check_data(self.data)
            self.data.check_unit(self.privacy.unit, arrivals=self.privacy.cohorts is not None)
            sizes = self.data.list_site_sizes(self.federation.num_sites)
            if self.federation.uses_validation_scores:
                self.data.require_decisive_validation()
        except ConfigError as error:
            raise error.under("data") from None
        if self.federation.aggregation == "secure":
            _check_secure(self)
        self.federation.check_requirements(self)
        if self.privacy.private:
            _check_privacy(self, largest_size=max(sizes))
        if self.privacy.metrics != "none" and self.data.heldout_fraction == 0:
            bound = f"must be above 0 for privacy.metrics = {self.privacy.metrics}"
            raise ConfigError("data.heldout_fraction", 0, bound)
        if not (self.model.adapter or self.model.adapter_sha256):
            for key, value in self.privacy.start.items():
                if value is not None:
                    raise ConfigError(f"privacy.{key}", value, "requires model.adapter")
        task.check_spec(self.task_model())

    @property
    def bound_task(self) -> Task:
        """The task, configured with this run's task settings."""
        return get_task(self.task, self.task_settings)

    def task_model(self) -> TaskModelSpec:
        """Collect the specs that define the model."""
        return TaskModelSpec(
            # Without the start adapter, because a loaded model can start from any adapter.
            model=dataclasses.replace(self.model, adapter=None, adapter_sha256=None),
            lora=self.lora,
            head=self.head,
            task=self.task,
            labels=self.data.labels,
            target_range=self.data.target_range,
            seed=self.seed,
            texts=self.bound_task.count_texts_per_record(self.data),
            input=self.data.input,
            values=tuple(value for feature in self.data.features for value in feature.iter_value_names()),
            task_settings=self.task_settings,
        )

    def plan(self) -> Plan:
        """Build the plan that the lead proposes to sites, with calibrated noise."""
        return Plan.from_privacy(
            self.privacy,
            local_steps=self.training.local_steps,
            num_rounds=self.federation.num_rounds,
            spare_rounds=self.federation.spare_rounds,
            together=self.federation.together,
            bound=self.bound_task.max_aggregated_value(self.data.list_site_sizes(self.federation.num_sites)),
        )

    def proposal(self, *, lead: str, plan: Plan) -> Proposal:
        """Build the proposal to the sites, on which their policies decide.

        Args:
            lead: public key of the lead, in hex.
            plan: the plan of the run.
        """
        has_head = self.bound_task.has_head
        return Proposal(
            run=self.run_id(),
            lead=lead,
            dataset=self.data.dataset,
            task=self.task,
            base_model=self.model.sha256 or UNVERIFIED,
            target_modules=self.lora.adapted_modules,
            adapter=self.lora.kind,
            rank=self.lora.effective_rank,
            train_head=has_head and self.head.train,
            seeded_noise=self.runtime.seeded_noise,
            dtype=self.model.dtype,
            lora_scale=self.lora.scale,
            head_scale=self.head.scale if has_head else 0.0,
            num_sites=len(self.federation.active),
            plan=plan,
            start_adapter=self.model.adapter_sha256 or "",
            algorithm=self.federation.algorithm,
            ranks={site: rank for site, rank in self.federation.site_ranks.items() if rank is not None},
        )

    def with_rates(self) -> RunConfig:
        """Return a copy in which computed learning rates replace "auto".

        Raises:
            ConfigError: "auto" is not available for this task or this type of adapter.
        """
        if self.training.learning_rate != "auto":
            return self
        task = self.bound_task
        if task.auto_lr_shares is None:
            bound = f"has not been studied for task {task.name}: give a number"
            raise ConfigError("training.learning_rate", "auto", bound)
        if self.lora.kind != "lora":
            bound = f"has not been studied for lora.kind = {self.lora.kind}: give a number"
            raise ConfigError("training.learning_rate", "auto", bound)
        steps = self.federation.num_rounds * self.training.local_steps
        rate = choose_learning_rate(steps=steps, schedule=self.training.schedule, private=self.privacy.private)
        of_lora, of_head = task.auto_lr_shares
        lora, head = (float(f"{share * rate:.3g}") for share in (of_lora * STUDIED_SCALE / self.lora.scale, of_head))
        chosen: dict[str, Any] = {"learning_rate": lora, "head_learning_rate": head if task.has_head else None}
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **chosen))

    def with_number_format(self, dtype: str) -> RunConfig:
        """Return a copy in which `dtype` replaces the number format "auto".  Explicit formats do not change."""
        if self.model.dtype != "auto":
            return self
        model: Any = dataclasses.replace(self.model, dtype=dtype)  # type: ignore[arg-type]
        return dataclasses.replace(self, model=model)

    @property
    def primary_metric(self) -> str:
        """Name of the score that ranks models."""
        return self.bound_task.primary_metric_for(self.data)

    def declared_sizes(self) -> dict[str, int]:
        """Return the declared size of each participating site: site -> number of units."""
        sizes = dict(zip(self.federation.names, self.data.list_site_sizes(self.federation.num_sites), strict=True))
        return {site: sizes[site] for site in self.federation.active}

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a JSON object, from which `parse` restores it."""
        return dataclasses.asdict(self)

    @property
    def may_be_fitted(self) -> bool:
        """Whether rounds or noise may be adapted to the sites' budgets."""
        return self.privacy.private and self.federation.if_over_budget != "stop"

    def can_use_offer(self, offer: Offer) -> bool:
        """Return True if a site with this offer can participate after the adjustment in `federation.if_over_budget`."""
        if not self.may_be_fitted:
            return True
        if self.federation.if_over_budget == "fewer_rounds":
            return offer.max_rounds > 0
        return offer.min_noise is not None and 0 < offer.min_noise <= accountant.MAX_NOISE

    def fit_to_offers(self, offers: Sequence[Offer]) -> RunConfig:
        """Return a copy with the most rounds, or the least noise, within the budgets of all these sites, and with ranks
        that their policies allow.

        `federation.if_over_budget` selects rounds or noise. If rounds are reduced, the noise does not change.
        """
        plan, settings = self.plan(), self.to_json()
        settings["federation"]["ranks"] = self.federation.lower_ranks(offers)
        match self.federation.if_over_budget:
            case "fewer_rounds":
                rounds = min((offer.max_rounds for offer in offers), default=plan.num_rounds)
                if rounds < plan.num_rounds:
                    settings["federation"]["num_rounds"] = rounds
                    settings["privacy"]["noise_multiplier"] = plan.noise_multiplier
            case "more_noise":
                noise = max((offer.min_noise or 0.0 for offer in offers), default=0.0)
                if noise > plan.noise_multiplier:
                    settings["privacy"]["noise_multiplier"] = noise
        return parse(settings)

    def decisive(self) -> dict[str, Any]:
        """Return all settings that can change a result as a JSON object, without names, paths and performance settings.

        The object includes whether noise is seeded, because seeded noise voids the guarantee.
        """
        fields = self.to_json()
        for key in ("name", "resume", "tracking", "report", "cost", *(() if self.public.train_file else ("public",))):
            del fields[key]
        patience = [("federation", key) for key in ("round_timeout_s", "enough_sites", "straggler_grace_s", "renewal")]
        patience.append(("training", "ignore_weak_signal"))
        # The path of an adapter is irrelevant; its digest identifies it.
        places = [("model", key) for key in ("cache_dir", "public_id", "adapter")]
        privacy = self.privacy
        is_unset = {
            "records_per_user": privacy.unit == "record",
            "cohorts": privacy.cohorts is None,
            "planned_runs": privacy.planned_runs == 1,
            **{key: value is None for key, value in privacy.start.items()},
        }
        of_no_effect = [("privacy", key) for key, unset in is_unset.items() if unset]
        of_no_effect += [] if self.federation.ranks else [("federation", "ranks")]
        # They act when a run is composed: what counts is what they replaced.
        own_recipe = ("unclipped_local_steps", "unclipped_schedule", "unclipped_sampling_rate")
        of_no_effect += [("training", key) for key in own_recipe]
        for group, key in (("evaluation", "max_tokens"), *patience, *places, *of_no_effect):
            del fields[group][key]
        return fields | {"runtime": {"seeded_noise": self.runtime.seeded_noise}}

    def digest(self) -> str:
        """Return the SHA-256 of all settings that can change a result, in hex."""
        return hash_json(self.decisive())

    def run_id(self) -> str:
        """Return the identifier under which sites charge the run: its name with a prefix of its digest."""
        return f"{self.name}-{self.digest()[:32]}"


_NO_YAML = {
    UnicodeDecodeError: "bytes that are not UTF-8",
    yaml.reader.ReaderError: "control characters",
    yaml.MarkedYAMLError: "a line that is not YAML, or a duplicate key; tabs cannot indent, [ and quotes must close",
    yaml.YAMLError: "a reference (& and *) or a tag (!), which are not supported",
}
"""Descriptions of invalid settings files by the type of PyYAML's exception.  The first matching type applies."""


_ONLY_YAML = re.compile(r"(?i)[-+]?0[\dxb].*|.*[:_].*|yes|no|on|off|\d+-.*|<<")
"""Scalars that only YAML 1.1 does not read as text: octal numbers, 1:30, yes, dates."""


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML loader for text, numbers, lists and mappings only, because a few aliases could exhaust the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) or getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError("a reference or a tag")
        return super().compose_node(parent, index)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return self.DEFAULT_SCALAR_TAG if kind is yaml.ScalarNode and _ONLY_YAML.fullmatch(value) else tag

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for (key, _), place in zip(node.value, range(len(node.value)), strict=True):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:place]:  # YAML would silently use the last one
                raise yaml.MarkedYAMLError(problem="a key twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def format_config_yaml(config: RunConfig) -> bytes:
    """Serialize a configuration as the `config.yaml` of a run folder."""
    settings = {"schema_version": RUN_SCHEMA, **config.to_json()}
    as_it_is = "\x85" not in json.dumps(settings, ensure_ascii=False)  # YAML would read U+0085 back as a space
    return bytes(yaml.safe_dump(settings, allow_unicode=as_it_is, encoding="utf-8", sort_keys=False))


def read_saved_settings(folder: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run folder without validating its settings.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or was written by another version.
    """
    path = RunFolder(folder).config
    if not os.path.isfile(path):  # also False for names that are too long
        raise ConfigError("run folder", str(folder), f"must contain a config.yaml{suggest_run_folders(folder)}")
    settings = read_plain_yaml(path, key="run folder")
    check_schema(f"{path}: schema_version", settings.pop("schema_version", None), RUN_SCHEMA, of="run folder")
    return settings


def read_saved_config(folder: Path) -> RunConfig:
    """Read the configuration of a run folder.

    Raises:
        ConfigError: the folder has no configuration, or this version does not accept it.
    """
    return parse(read_saved_settings(folder))


def read_plain_yaml(path: Path, *, key: str) -> dict[str, Any]:
    """Read a YAML mapping as plain data.

    Args:
        path: path of the file.
        key: setting that names the file, for error messages.

    Raises:
        ConfigError: the file is missing, too large or not a YAML mapping. The message contains the line if known.
    """
    if len(data := read_bounded_file(path, key=key)) > _MAX_YAML:
        raise ConfigError(key, str(path), f"must have at most {_MAX_YAML} bytes")
    try:
        settings = yaml.load(data.decode(), Loader=_PlainLoader)
        if not isinstance(settings, dict):
            raise ValueError("no keys")
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        why = next(
            (words for kind, words in _NO_YAML.items() if isinstance(error, kind)), "no mapping of keys to values"
        )
        raise ConfigError(key, where, f"must contain a configuration as YAML ({why})") from None
    return {str(name): value for name, value in settings.items()}


def parse(settings: Mapping[str, Any], *, for_real_sites: bool = False) -> RunConfig:
    """Validate plain data, and return a `RunConfig` with computed learning rates instead of "auto".

    Integer labels become text, as in records. A number format of "auto" becomes float32, except in a simulation, which
    selects it at its start (`fedtune.sites.virtual_site.fix_number_format`).

    Args:
        settings: nested plain data.
        for_real_sites: plan a simulation as a run over real sites.

    Raises:
        ConfigError: a setting is invalid. The message contains the first invalid key, its value and accepted values.
    """
    try:
        config = _ADAPTER.validate_python(_convert_labels_to_text(expand_home_paths(settings)))
    except ValidationError as error:
        raise convert_first_error(error) from None
    _reject_booleans(settings, config.to_json())
    # Real sites compute on other machines, and a seeded run must be reproducible on any machine.
    if for_real_sites or config.runtime.kind != "simulation" or config.runtime.seeded_noise:
        config = config.with_number_format("float32")
    return config.with_rates()


def expand_home_paths(settings: Mapping[str, Any], *, within: str = "") -> dict[str, Any]:
    """Return a copy of the settings in which a `~` at the beginning of a path is expanded.

    Raises:
        ConfigError: a path names the home folder of an unknown user.
    """
    expanded = {}
    for key, value in settings.items():
        path = f"{within}{key}"
        value = expand_home_paths(value, within=f"{path}.") if isinstance(value, Mapping) else value
        expanded[key] = expand_home(value, key=path) if path in PATHS and isinstance(value, str) else value
    return expanded


def _convert_labels_to_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    data = settings.get("data")
    if not (isinstance(data, Mapping) and isinstance(data.get("labels"), list | tuple)):
        return dict(settings)
    labels = [str(label) if type(label) is int else label for label in data["labels"]]
    return {**settings, "data": {**data, "labels": labels}}


def _check_privacy(config: RunConfig, *, largest_size: int) -> None:
    """Check privacy settings that depend on other settings."""
    privacy = config.privacy
    if privacy.delta >= 1 / largest_size:
        bound = f"must be below 1 / data.declared_sizes = {1 / largest_size:.3g}"
        raise ConfigError("privacy.delta", privacy.delta, bound)
    if privacy.noise_multiplier is not None:
        plan = config.plan()
        epsilon = accountant.compute_epsilon_above_limit([plan.all_runs_event], privacy.delta, limit=privacy.epsilon)
        if epsilon is not None:
            steps = plan.local_steps * plan.max_rounds * plan.runs
            bound = f"results in epsilon {epsilon:.4g} over {steps} steps, above privacy.epsilon = {privacy.epsilon:g}"
            raise ConfigError("privacy.noise_multiplier", privacy.noise_multiplier, bound)


def _check_secure(config: RunConfig) -> None:
    """Check that all other settings are compatible with secure aggregation."""
    for key, value, required, why in (
        ("privacy.mechanism", config.privacy.mechanism, "dp_sgd", "each site adds only its share of the noise"),
        ("training.local_steps", config.training.local_steps, 1, "only one site's noise would protect further steps"),
        ("lora.alternate", config.lora.alternate, False, "all tensors of a sum share one step size"),
        ("runtime.ray_address", config.runtime.ray_address, None, "the sites' keys stay in one process"),
    ):
        if value != required:
            shown = json.dumps(required).strip('"')
            raise ConfigError(key, value, f"must be {shown} with federation.aggregation = secure: {why}")


def _reject_booleans(value: Any, validated: Any, key: str = "") -> None:
    """Reject booleans for numeric settings, which pydantic would convert to 1 and 0."""
    if isinstance(value, bool) and not isinstance(validated, bool):
        raise ConfigError(key, value, "must be a number")
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in parts:
        _reject_booleans(item, validated[name], f"{key}.{name}".lstrip("."))


def convert_first_error(error: ValidationError) -> ConfigError:
    """Convert the first pydantic error to a ConfigError with a user-facing message."""
    details = error.errors(include_url=False)[0]
    # For unions, pydantic appends the branch to the location.
    loc, is_unknown = [str(part) for part in details["loc"]], details["type"] == "unexpected_keyword_argument"
    ours = (part for part in loc if re.fullmatch(r"\w+", part, re.ASCII) or (is_unknown and part is loc[-1]))
    location = ".".join(part for part in ours if part not in ("int", "str", "float", "tuple"))
    if isinstance(raised := details.get("ctx", {}).get("error"), ConfigError):
        return raised.under(location)
    if is_unknown:
        return ConfigError(location, details["input"], "is not a setting of fedtune")
    if details["type"] == "missing":
        return ConfigError(location, NOT_GIVEN, "is required")
    bound = _BOUNDS.get(details["type"]) or f"must be {details['msg'].removeprefix('Input should be ')}"
    return ConfigError(location, details["input"], bound)


_BOUNDS = {
    "tuple_type": "must be a list, as in [a,b]",
    "too_long": "must have fewer values",
    "int_parsing_size": f"must be a whole number of at most {MAX_SEED}",
    **dict.fromkeys(("int_from_float", "int_parsing", "int_type"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    "string_type": "must be text; put quotes around it",
    "invalid_key": "must be text, like every key; put quotes around it",
    **dict.fromkeys(("dict_type", "mapping_type"), "must be keys and values, as in {text: body}"),
    "dataclass_type": "must be keys and values; select an option with defaults: [override /GROUP: OPTION]",
}
"""Messages by pydantic error type, for types whose own message is written for programmers."""
_ADAPTER = TypeAdapter(RunConfig)

"""Settings of a run's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from fedtune.data.features import MAX_VALUES, FeatureSpec, check_names, check_range, map_feature_columns
from fedtune.data.partition import PartitionSpec
from fedtune.data.values import ANSWERS, FEATURE, OPTIONAL_ROLES, normalize_category
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.site_policy import Dataset
from fedtune.spec import (
    ConfigError,
    check_at_least,
    check_at_most,
    check_fraction,
    check_name,
    check_one_of,
    spec,
)

_MAX_TEMPLATE = 4096
"""Maximum number of characters; the template is processed for each record, or at each site before its reply."""
_MAX_WINDOWS = 8
AT_SITE = "at-site"  # replaces every file and folder in the settings that are sent to sites
SITE = "{site}"  # placeholder for a site's name in `train_file`
_OF_THE_LEAD = {"partition", "on_bad_record", "train_fraction"}
_OF_THE_LEAD |= {f"{file}_{what}" for file in ("validation", "test") for what in ("file", "rows", "fraction")}
"""Settings of the lead's own files and of simulations, which are sent to sites with their default values."""
_ROLE_OF_PARTITION = {"dirichlet": "label", "column": "site"}


@spec
class DataSpec:
    """Settings of a run's data: files, columns, labels and partition.

    Attributes:
        dataset: the name of the data set at sites and in ledgers.
        train_file: the sites' records; in a simulation one file, partitioned by `partition`, or with `{site}` in its
            name one file for each site.
        validation_file: the lead's own records, scored after each round; null: none.
        test_file: the lead's own records, scored only before and after the run; null: none.
        columns: the column name in the files for each role.  Roles are the task's own: `text` (or `image`) with
            `label`, `labels` or `target`, and `text_pair` for records of two texts; `tokens` and `tags`, or `text` and
            `spans`; or `prompt`, `completion` and all other names in `prompt_template`.  Additional roles are `label`
            (partition "dirichlet"); `site` (partition "column"); `user` (privacy.unit "user"), one opaque id per
            record; and `arrival` (`privacy.cohorts`), an ISO date or month, of which each user's earliest counts.
        labels: the declared label set, in the order of the classes; never discovered from records.
        declared_sizes: the number of records (users, with privacy.unit "user") that each site publishes as its size;
            one number for all sites, or one for each site.
        label_separator: the separator between the labels of a multi-label record, if they are one text and not a JSON
            list.
        target_range: the smallest and the largest target of a task that learns a number; declared, and never taken from
            records.  A record outside the range is unusable.  An embedding of text pairs with scores maps this range to
            cosines from 0 to 1.
        event_values: the two values of the role `event`: for censored records, and for records with an event; empty: 0
            and 1, or false and true.
        prompt_template: the text before the completion, with roles in braces; write a literal brace twice.  A task that
            reads one text can use `{text}` and other roles in it.
        chat_template: the conversion of a conversation to text: "model" (the model's own chat template), "plain" (turns
            labeled User and Assistant), or "none" (prompt and completion unchanged).
        input: the kind of record: "text"; "features", the columns in `features`; or "image", stored in the record or in
            a file next to the records' file.
        features: the columns of numbers and categories in a record's feature vector, with their declared ranges.
        max_length: the maximum number of tokens of an example, or of each of its texts or windows; 1 for features; for
            an image exactly the number of positions of its model: patches and special tokens.
        windows: the maximum number of windows of `max_length` tokens per record, for a task that splits long texts;
            tokens after the last window are not read.  Each window takes its time, even for short records.
        stride: the number of tokens that two adjacent windows share, each of which is learned in one of them.
        partition: the partition of `train_file` in a simulation.
        heldout_fraction: the fraction of each site's records that is held out from training, selected by the hash of
            each record or of its user.
        train_fraction: the fraction of `train_file` that a smaller run uses, selected by the same hash.
        validation_fraction: in a simulation without `validation_file`, the fraction of `train_file` that belongs to the
            lead, selected by the same hash.
        test_fraction: the same fraction for the test records, in a simulation without `test_file`.
        validation_rows: the number of validation records to score, selected by their hash; null: all.
        test_rows: the number of test records to score, selected by their hash; null: all.
        on_bad_record: the treatment of unusable records in a simulation and in the lead's own files: "error" stops the
            command and counts all such records, "skip" continues without them.  A real site always skips them.
    """

    dataset: str
    train_file: str
    columns: Mapping[str, str]
    declared_sizes: int | tuple[int, ...]
    max_length: int
    windows: int = 1
    stride: int = 0
    validation_file: str | None = None
    test_file: str | None = None
    input: Literal["text", "features", "image"] = "text"
    features: tuple[FeatureSpec, ...] = ()
    labels: tuple[str, ...] = ()
    label_separator: str = ";"
    target_range: tuple[float, float] | None = None
    event_values: tuple[str, ...] = ()
    prompt_template: str = "{prompt}"
    chat_template: Literal["none", "model", "plain"] = "none"
    partition: PartitionSpec = PartitionSpec()
    heldout_fraction: float = 0.0
    train_fraction: float = 1.0
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    validation_rows: int | None = None
    test_rows: int | None = None
    on_bad_record: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        check_name("dataset", self.dataset)
        if not self.train_file.strip():
            raise ConfigError("train_file", self.train_file, "must not be blank")
        for size in (self.declared_sizes,) if isinstance(self.declared_sizes, int) else self.declared_sizes:
            check_at_least("declared_sizes", size, 1)
        for key in ("validation_rows", "test_rows"):
            if getattr(self, key) is not None:
                check_at_least(key, getattr(self, key), 1)
        if self.max_length != 1:  # 1 for feature vectors; a text needs one token between [CLS] and [SEP]
            check_at_least("max_length", self.max_length, 3)
        check_one_of("windows", self.windows, range(1, _MAX_WINDOWS + 1))
        check_at_least("stride", self.stride, 0)
        if self.windows > 1 and self.stride > (self.max_length - 2) // 2:
            raise ConfigError("stride", self.stride, "must be at most (data.max_length - 2) / 2")
        check_fraction("heldout_fraction", self.heldout_fraction, zero=True)
        check_fraction("train_fraction", self.train_fraction, one=True)
        for name in ("validation", "test"):
            fraction = getattr(self, f"{name}_fraction")
            check_fraction(f"{name}_fraction", fraction, zero=True)
            if fraction and getattr(self, f"{name}_file") is not None:
                raise ConfigError(f"{name}_fraction", fraction, f"must be 0 if data.{name}_file is set")
        if self.validation_fraction + self.test_fraction >= 1:
            bound = "must be smaller: no records of data.train_file are left for the sites"
            raise ConfigError("test_fraction", self.test_fraction, bound)
        check_names("labels", self.labels)
        if len(self.label_separator) != 1 or self.label_separator in '[]"\\':
            raise ConfigError("label_separator", self.label_separator, 'must be one character other than []"\\')
        if self.target_range is not None:
            check_range("target_range", self.target_range)
        different = set(map(normalize_category, self.event_values))
        if not len(different) == len(self.event_values) in (0, 2):
            raise ConfigError("event_values", list(self.event_values), "must be two different values, or none")
        columns = [column for feature in self.features for column in feature.columns]
        check_names("features", columns)
        check_at_most("features", sum(feature.width for feature in self.features), MAX_VALUES)
        of_features = map_feature_columns(self.features, self.columns).values()
        times = Counter([*of_features, *(column for role, column in self.columns.items() if role in ANSWERS)])
        if twice := [column for column in of_features if times[column] > 1]:
            bound = "is used twice: a column can be one feature, and not also the answer"
            raise ConfigError("features", twice[0], bound)
        list_template_roles(self.prompt_template)
        role, kind = _ROLE_OF_PARTITION.get(self.partition.kind), self.partition.kind
        if role is not None and role not in self.columns:
            raise ConfigError("partition.kind", kind, f"requires data.columns.{role}")
        if (kind == "file") != (SITE in self.train_file):
            bound = f"must contain {SITE} if data.partition.kind = file, and must not otherwise"
            raise ConfigError("train_file", self.train_file, bound)

    @property
    def template_roles(self) -> tuple[str, ...]:
        return list_template_roles(self.prompt_template)

    @property
    def skips_bad_records(self) -> bool:
        """Whether a simulation and the lead skip unusable records instead of raising an error."""
        return self.on_bad_record == "skip"

    def check_unit(self, unit: Unit, *, arrivals: bool = False) -> None:
        """Check that the columns and the partition support the privacy unit.

        For users, the files need a user column (and with `arrivals` an arrival column), and the partition must not
        depend on values that differ between a user's records.

        Raises:
            ConfigError: for a key of this spec.
        """
        if unit == "user" and "user" not in self.columns:
            bound = "has no column for role 'user', which privacy.unit = user requires"
            raise ConfigError("columns", dict(self.columns), bound)
        if arrivals and "arrival" not in self.columns:
            bound = "has no column for role 'arrival', which privacy.cohorts requires"
            raise ConfigError("columns", dict(self.columns), bound)
        if unit == "user" and self.partition.kind == "dirichlet":
            bound = "partitions records by label, which would split users; use iid or column if privacy.unit = user"
            raise ConfigError("partition.kind", self.partition.kind, bound)

    def require_decisive_validation(self) -> None:
        """Require the lead's own validation file for exact scores that select a round, a checkpoint or a trial.

        Raises:
            ConfigError: for `validation_file`.
        """
        if self.validation_file is None:
            bound = (
                "must be the lead's own file if its scores select anything (early_stopping_patience, best checkpoint, "
                "a search); data.validation_fraction uses the sites' records, which exact scores would not protect"
            )
            raise ConfigError("validation_file", self.validation_file, bound)

    def require_lead_files(self) -> None:
        """Require validation and test records from the lead's own files: the lead has no access to real sites' files.

        Raises:
            ConfigError: for `validation_fraction` or `test_fraction`.
        """
        for key in ("validation_fraction", "test_fraction"):
            if getattr(self, key):
                bound = f"must be 0 with real sites: the lead cannot read their files; set data.{key[:-9]}_file"
                raise ConfigError(key, getattr(self, key), bound)

    def map_required_columns(
        self, roles: Collection[str], *, partition: bool = False, unit: Unit = "record"
    ) -> dict[str, str]:
        """Map each required role to its column: `roles`, the roles of the privacy unit and the partition, and all
        features.
        """
        needed = {*roles, *(("user", "arrival") if unit == "user" else ())}
        if partition and self.partition.kind in _ROLE_OF_PARTITION:
            needed.add(_ROLE_OF_PARTITION[self.partition.kind])
        columns = {role: column for role, column in self.columns.items() if role in needed}
        return columns | map_feature_columns(self.features, self.columns)

    def for_sites(self, roles: Collection[str]) -> DataSpec:
        """Return the settings to send to sites: each role is its own column, and the lead's settings are omitted."""
        unsaid: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in _OF_THE_LEAD}
        return replace(self, **unsaid, train_file=AT_SITE, columns={role: role for role in roles})

    def apply_to_site_dataset(self, dataset: Dataset, *, folder: Path) -> DataSpec:
        """Apply the settings to a site's own file, whose path in the policy is relative to `folder`.

        Raises:
            ConfigError: the site has no column for a role of the run.
        """
        # Only the run's roles: a data set may have columns for several tasks, or for several kinds of record.
        columns = {role: dataset.columns[role] for role in self.columns if role in dataset.columns}
        for role in self.columns.keys() - columns.keys() - OPTIONAL_ROLES:
            if not role.startswith(FEATURE):
                raise ConfigError("columns", dict(dataset.columns), f"has no column for role {role!r}")
        return replace(self, train_file=str(folder / dataset.path), columns=columns)

    def list_site_sizes(self, num_sites: int) -> tuple[int, ...]:
        """Return the declared size of each site.

        Raises:
            ConfigError: for a key of this spec, if the settings are for another number of sites.
        """
        try:
            self.partition.check_sites(num_sites)
        except ConfigError as error:
            raise error.under("partition") from None
        if isinstance(self.declared_sizes, int):
            return (self.declared_sizes,) * num_sites
        if len(self.declared_sizes) != num_sites:
            bound = f"must be one number, or one for each of {num_sites} sites"
            raise ConfigError("declared_sizes", self.declared_sizes, bound)
        return self.declared_sizes


@lru_cache(maxsize=64)
def list_template_roles(template: str) -> tuple[str, ...]:
    """Return the roles in a template; they must be in plain braces, because `str.format` fields could access
    attributes.

    Raises:
        ConfigError: for `prompt_template`.
    """
    if len(template) > _MAX_TEMPLATE:
        bound = f"must have at most {_MAX_TEMPLATE} characters"
        raise ConfigError("prompt_template", f"{len(template)} characters", bound)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError("prompt_template", template, f"{error} (write a literal brace twice)") from None
    roles = [name for _, name, _, _ in parts if name is not None]
    plain = not any(format_spec or conversion for _, _, format_spec, conversion in parts)
    if not plain or not all(role.isidentifier() for role in roles):
        raise ConfigError("prompt_template", template, "must contain only role names in braces")
    if len(set(roles)) < len(roles):
        bound = "must name each role at most once: repeated texts lengthen prompts"
        raise ConfigError("prompt_template", template, bound)
    return tuple(roles)


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template with a record's texts, and drop paragraphs whose roles are all blank."""
    texts = {role: fields.get(role, "") for role in list_template_roles(template)}
    paragraphs = [(paragraph, list_template_roles(paragraph)) for paragraph in template.split("\n\n")]
    kept = (paragraph for paragraph, roles in paragraphs if not roles or any(texts[role].strip() for role in roles))
    return "\n\n".join(kept).format_map(texts)

"""A saved adapter: a folder that PEFT can load by itself, with the task's head and settings as additional files.

adapter_config.json  adapter_model.safetensors   for `peft.PeftModel.from_pretrained(base, folder)`
offsets.safetensors                              for DoRA and IA3: their scales as trained, from which PEFT's tensors
                                                 are computed (`fedtune.model.ia3_and_dora`)
                                                 (these two if a base is adapted: not for features)
head.safetensors                                 the task's own tensors; for classification "weight" (labels, h) and
                                                 "center" (h,), see `HeadSpec`:
                                                 logits = scale * weight @ normalized(pooled - center)
fedtune.json                                     settings, labels, the base's hash, the trained tensors' hash
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.codec import decode, parse_json, read_bounded_file
from fedtune.model.adapter import Adapter, AdapterError, copy_tensors
from fedtune.model.adapter_files import (
    MATRIX_A,
    OFFSET,
    PEFT_SCALES,
    SCALE_OF_IA3,
    TENSOR_FILES,
    compute_adapter_digest,
    copy_adapter_files,
    list_tensor_names,
)
from fedtune.model.base_model import hash_model
from fedtune.model.head_only import NoBase
from fedtune.model.ia3_and_dora import iter_peft_scales
from fedtune.model.layers import make_peft_config
from fedtune.model.source import find_public_location, is_public_location
from fedtune.model.spec import LORA_A, NO_ADAPTER, ModelSpec, TaskModelSpec
from fedtune.model.unsupported_models import PRIVATE_TO
from fedtune.spec import RUN_SCHEMA, ConfigError, check_schema, format_value, name_file_in_errors
from fedtune.tasks.registry import get_task
from fedtune.tasks.task_model import TaskModel, assemble

_SETTINGS, _FOR_PEFT = "fedtune.json", "adapter_config.json"
_TOLERANCE = 1e-4  # tolerance for values that two machines compute from the same seed or labels
_HEAD = "head."  # prefix of the task's own tensors; its public constants are buffers of the model itself
_MATCHING_SETTINGS = ["task", "task_settings", "model.sha256", "labels", "target_range", "values", "lora.kind"]
_MATCHING_SETTINGS += ["lora.scale", "head.scale", "head.center"]
"""Settings that must match before an adapter of another run is loaded into a model; other mismatches show in the shapes
of the tensors.
"""


def save_task_model(model: TaskModel, folder: Path, *, private_to: str | None = None) -> None:
    """Write the adapter folder atomically.

    Matrices that were frozen at their initial values (FFA-LoRA) are saved too, so that the folder is complete.
    `private_to` names the site whose records trained the adapter without noise; None for the adapter of a run.
    """
    with replace_folder(folder) as complete:
        write_task_model(model, complete, private_to=private_to)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Provide an empty folder that replaces `folder` on exit; a crash leaves the old folder, or none."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        complete, replaced = Path(scratch, "complete"), Path(scratch, "replaced")
        complete.mkdir()
        yield complete
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(complete, folder)


@dataclass(frozen=True)
class SavedAdapter:
    """Settings of a saved adapter folder; tensors are read on first use, and no model is loaded."""

    folder: Path
    spec: TaskModelSpec  # the spec of the saved model, with the base pinned
    trained_sha256: str  # `Adapter.digest` of the trained tensors, from the folder's settings; sites know this digest
    private_to: str | None = None  # the site whose records trained it without noise; None: the adapter of a run

    @classmethod
    def read(cls, folder: Path, *, model: ModelSpec | None = None, private: bool = False) -> SavedAdapter:
        """Read the settings of an adapter folder that `save_task_model` wrote.

        Args:
            folder: the adapter folder.
            model: the location of the base, if it has moved; it must be the same model.
            private: whether to accept an adapter that is private to a site, for uses whose results stay at that site.

        Raises:
            ConfigError: the settings are missing or malformed, or the adapter is private to a site.
        """
        path, bound = folder / _SETTINGS, "must contain an adapter's settings"
        data = read_bounded_file(path, key="adapter", bound=bound)
        settings = parse_json(data, key=str(path), bound=f"{bound} in JSON")
        check_schema(f"{path}: schema_version", settings.pop("schema_version", None), RUN_SCHEMA, of="adapter")
        if (site := settings.pop(PRIVATE_TO, None)) is not None and not private:
            bound = (
                f"is private to {format_value(site)} and has no guarantee: nothing derived from it may leave that site"
            )
            raise ConfigError("adapter", str(folder), bound)
        with name_file_in_errors(path):
            trained, task_settings = str(settings.pop("trained_sha256", None)), settings.pop("task_settings", {})
            spec = decode(TaskModelSpec, settings)
            spec = replace(spec, task_settings=get_task(spec.task, task_settings).own)
        if model is not None:  # a base at another location must be the model that the adapter was trained on
            spec = replace(spec, model=replace(model, sha256=spec.model.sha256))
        return cls(folder, spec, trained, site)

    @classmethod
    def read_initial(cls, name: str) -> SavedAdapter:
        """Read the initial adapter of a run, from a run's folder or from its adapter folder.

        Raises:
            ConfigError: for `model.adapter`.
        """
        folder = next((inner for inner in (Path(name, "adapter"), Path(name)) if (inner / _SETTINGS).is_file()), None)
        if folder is None:
            bound = f"must be the folder of a finished run or of its adapter, but has no {_SETTINGS}"
            raise ConfigError("model.adapter", name, bound)
        try:
            return cls.read(folder)
        except ConfigError as error:
            raise ConfigError("model.adapter", name, f"must be a saved adapter ({error})") from error

    def _build_invalid_adapter_error(self, bound: str) -> ConfigError:
        return ConfigError("adapter", str(self.folder), bound)

    @cached_property
    def digest(self) -> str:
        """The digest of all files that decide the model's answers, as in run.json; see `combine_hashes`."""
        return compute_adapter_digest(self.folder)

    @cached_property
    def _without_base(self) -> TaskModel:
        """The task's head without a base: it has the names of the head's tensors, but not their shapes."""
        task, base = get_task(self.spec.task, self.spec.task_settings), cast(Any, NoBase(1, device="cpu"))
        task.check_spec(self.spec)
        return TaskModel(self.spec, task, base)

    @cached_property
    def _files(self) -> dict[str, dict[str, np.ndarray]]:
        """The tensors in each safetensors file, by the file's name without its suffix.

        Raises:
            ConfigError: a file is missing or damaged, or has not exactly the tensors that settings and task require.
        """
        kinds, model = TENSOR_FILES[self.spec.lora.kind], self._without_base
        read: dict[str, dict[str, np.ndarray]] = {}
        for name in (*kinds, *(("head",) if model.task.has_head else ())):
            file = self.folder / f"{name}.safetensors"
            if not file.is_file():
                raise self._build_invalid_adapter_error(f"lacks {file.name} with the adapter's tensors")
            try:
                read[name] = load_file(file)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:  # or of a type without NumPy
                raise self._build_invalid_adapter_error(f"has a damaged {file.name}; copy the folder again") from error
        wanted = list_tensor_names(self.spec.lora.kind, read)
        wanted["head"] = {name.removeprefix(_HEAD) for name in model.collect_adapter_parameters()}
        wanted["head"] |= dict(model.named_buffers(recurse=False)).keys()
        for name, tensors in read.items():
            for odd in sorted(tensors.keys() ^ wanted[name]):
                bound = f"{'lacks the' if odd in wanted[name] else 'has an unexpected'} tensor {odd}"
                raise self._build_invalid_adapter_error(f"{bound} in {name}.safetensors")
        return read

    @cached_property
    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Adapter tensors by their public names, and the task's own tensors without the prefix `head.`.

        Raises:
            ConfigError: a file is missing or damaged, or its tensors do not match the names, rank and hash that follow
                from the settings.
        """
        lora, model = self.spec.lora, self._without_base
        read = dict(self._files)
        head = read.pop("head", {})
        tensors = {name: one for file in read.values() for name, one in file.items() if not name.endswith(PEFT_SCALES)}
        if any(array.shape[:1] != (lora.rank,) for name, array in tensors.items() if name.endswith(MATRIX_A)):
            raise ConfigError("lora.rank", lora.rank, "must match the rank of the saved matrices")
        # Excludes an A that FFA-LoRA froze, everything that votes do not train, and a frozen head.
        moves = {name for name in tensors if not model.task.counts_units and (lora.train_a or LORA_A not in name)}
        trained = {name: tensors[name] for name in moves}
        trained |= {name: head[name.removeprefix(_HEAD)] for name in model.trainable()}
        try:
            sha256 = Adapter(trained).digest()
        except AdapterError as error:
            raise self._build_invalid_adapter_error(f"must contain an adapter's tensors: {error}") from None
        if sha256 != self.trained_sha256:
            raise self._build_invalid_adapter_error(f"has tensors that do not match the digest in its {_SETTINGS}")
        return tensors, head

    def build(self, *, device: torch.device | str = "cpu") -> TaskModel:
        """Build the model on the adapter's base; the head is neither initialized nor loaded yet."""
        # check the rank before matrices are allocated: a file could claim a rank that fills the memory
        _ = self.tensors
        return assemble(self.spec, device=device)

    def load_into(self, model: TaskModel) -> None:
        """Copy the tensors into a model with the same settings.

        Raises:
            AdapterError: names or shapes differ from the model's.
        """
        (tensors, head), constants = self.tensors, dict(model.named_buffers(recurse=False))
        trained = {_HEAD + name: array for name, array in head.items() if name not in constants}
        copy_tensors(tensors | trained, model.collect_adapter_parameters())
        copy_tensors({name: array for name, array in head.items() if name in constants}, constants)

    def require_same_model(self, other: TaskModelSpec) -> None:
        """Require that the adapter's tensors have the same effect in a model with the settings `other`.

        Names and shapes of the tensors are checked on loading.

        Raises:
            ConfigError: for `adapter`; the message names the first difference.
        """
        for key, was, now in _list_differing_settings(_MATCHING_SETTINGS, self.spec, other):
            difference = f"{key} is {format_value(was, 30)}, not {format_value(now, 30)}"
            raise self._build_invalid_adapter_error(f"was tuned on a different model: {difference}")

    def can_reuse_head(self, spec: TaskModelSpec) -> bool:
        """Whether a run with the settings `spec`, which may declare additional labels, can reuse the saved head."""
        was = self.spec
        same = (was.target_range, was.task_settings) == (spec.target_range, spec.task_settings)
        # A row of an ordinal head is a threshold between two adjacent labels.
        known = was.labels == spec.labels or (spec.task != "ordinal" and set(was.labels) <= set(spec.labels))
        return get_task(spec.task).has_head and same and known

    def require_compatible(self, spec: TaskModelSpec) -> None:
        """Check that the adapter matches the settings of a run, as far as possible without the base.

        Raises:
            ConfigError: for `model.adapter`; the message lists all differences.
        """
        keys = ["task", "input", "values", "head.hidden"]
        keys += [f"lora.{key}" for key in ("kind", "rank", "target_modules", "layers", "scale")]
        with_texts = ("label_texts",) if self.spec.labels == spec.labels else ()
        keys += [f"head.{key}" for key in ("scale", "center", *with_texts) if self.can_reuse_head(spec)]
        differences = [
            f"its {key} is {format_value(was)}, not {format_value(now)}"
            for key, was, now in _list_differing_settings(keys, self.spec, spec)
        ]
        if differences:
            bound = f"must have the run's task and LoRA settings: {'; '.join(differences)}"
            raise ConfigError("model.adapter", str(self.folder), bound)

    def find_initial_adapter(self, model: TaskModel) -> Adapter:
        """Return the initial adapter for a run of `model`.

        The rows of a reusable head are reordered to the run's labels; all other head values keep their initialization.

        Raises:
            ConfigError: for `model.adapter`, if it does not match, is damaged, or has non-finite values.
        """
        self.require_compatible(model.spec)
        was, now = self.spec.model.sha256, hash_model(model.spec.model)
        if was != now:
            bound = f"was tuned for base model {was}, but the run uses {now}"
            raise ConfigError("model.adapter", str(self.folder), bound)
        parameters = model.collect_adapter_parameters()
        try:
            tensors, head = self.tensors
            saved = tensors | {
                name: head[name.removeprefix(_HEAD)] for name in self._without_base.collect_adapter_parameters()
            }
            with_head = self.can_reuse_head(model.spec)
            taken = {name: value for name, value in saved.items() if with_head or not name.startswith(_HEAD)}
            here = Adapter({name: parameter.detach().cpu().numpy() for name, parameter in parameters.items()}).tensors
            # Rows of the last layer move to the current index of their label; rows of new labels are initialized.
            was_of, now_of = (get_task(spec.task).name_outputs(spec.labels) for spec in (self.spec, model.spec))
            last = next((name.rpartition(".")[0] for name in reversed(parameters) if name.startswith(_HEAD)), "")
            for name in (f"{last}.weight", f"{last}.bias"):
                if name in taken and len(saved[name]) == len(was_of):
                    taken[name] = here[name].copy()
                    taken[name][[now_of.index(output) for output in was_of]] = saved[name]
            start = Adapter({name: value for name, value in here.items() if name.startswith(_HEAD)} | taken)
            if not start.has_same_shapes(Adapter(here)):
                raise AdapterError("its tensors have other names or shapes than the run's")
            if not all(bool(np.isfinite(value).all()) for value in taken.values()):
                raise AdapterError("it has non-finite values")
            for name, value in taken.items():
                if not parameters[name].requires_grad and not np.allclose(value, here[name], atol=_TOLERANCE):
                    whose = f"the adapter has seed {self.spec.seed} and lora.init {self.spec.lora.init}"
                    raise AdapterError(f"the run does not train {name}, and its value differs ({whose})")
        except (ConfigError, AdapterError) as error:
            raise ConfigError("model.adapter", str(self.folder), f"cannot be the starting point: {error}") from error
        return Adapter({name: start.tensors[name] for name in model.trainable()})


def _list_differing_settings(keys: Iterable[str], *specs: TaskModelSpec) -> Iterator[tuple[str, Any, Any]]:
    """Yield each dotted key whose values differ between two specs, with both values."""
    for key in keys:
        was, now = (attrgetter(key)(spec) for spec in specs)
        if key in ("lora.target_modules", "lora.layers"):  # in any order
            was, now = (tuple(sorted(value)) if isinstance(value, tuple) else value for value in (was, now))
        if was != now:
            yield key, was, now


def load_task_model(folder: Path, *, model: ModelSpec | None = None, private: bool = False) -> TaskModel:
    """Load a saved model on the CPU; see `SavedAdapter` for arguments and errors."""
    saved = SavedAdapter.read(folder, model=model, private=private)
    loaded = saved.build(device="cpu")
    saved.load_into(loaded)
    return loaded


def verify_adapter(folder: Path, spec: TaskModelSpec) -> tuple[str, str]:
    """Check that an adapter's folder is the one that a run of `spec` saves.

    Guarantee: the folder is a function of `spec`, the base's hash and the tensors, none of which is read from its
    settings.  Each file is read once, into a private copy.  The tensors have exactly the names that `spec` requires,
    and if the copy's files are written again from `spec` and these tensors, they are the same.  Not checked are values
    that nobody trains and that need the base: a frozen A, a head's constants or frozen head, and PEFT's scales of DoRA.

    Args:
        folder: the adapter folder.
        spec: the model of the run, with the hash of its base.

    Returns:
        The digest of all files, as `compute_adapter_digest`, and the `Adapter.digest` of the trained tensors.

    Raises:
        ConfigError: the folder has another file or tensor, or cannot be read.
    """
    kinds, head = TENSOR_FILES[spec.lora.kind], ("head",) if get_task(spec.task).has_head else ()
    names = [_SETTINGS, *(f"{name}.safetensors" for name in (*kinds, *head)), *([_FOR_PEFT] if kinds else ())]
    with TemporaryDirectory(prefix="fedtune-adapter-") as scratch:
        once, again = Path(scratch, "once"), Path(scratch, "again")
        again.mkdir()
        copy_adapter_files(folder, once, names=names)
        try:
            saved, peft = replace(SavedAdapter.read(once), spec=spec), dict[str, Any]()
            (tensors, _), files = saved.tensors, dict(saved._files)
            if spec.lora.kind == "ia3":  # its initial scales are ones
                scales = {name.replace(OFFSET, SCALE_OF_IA3): 1 + offset[:, None] for name, offset in tensors.items()}
                files["adapter_model"] = scales
            if kinds:
                peft_config = parse_json((once / _FOR_PEFT).read_bytes(), key=_FOR_PEFT, bound="must be an object")
                place = peft_config.get("base_model_name_or_path")
                peft["base_model_name_or_path"] = place if is_public_location(spec.model, place) else spec.model.path
                peft["fan_in_fan_out"] = peft_config.get("fan_in_fan_out") is True
                if re.fullmatch(r"[\w.+]{1,32}", version := str(peft_config.get("peft_version"))):
                    peft["peft_version"] = version
            _write_files(again, spec, files, trained_sha256=saved.trained_sha256, peft=peft)
            for name in names:
                if (once / name).read_bytes() != (again / name).read_bytes():
                    raise ConfigError("adapter", name, "does not follow from the run's settings and these tensors")
        except (ConfigError, LookupError, TypeError, ValueError) as error:  # ConfigError: a ValueError
            bound = f"is not what its run saves ({str(error).replace(str(once), str(folder))})"
            raise ConfigError("adapter", str(folder), bound) from error
        return compute_adapter_digest(once), saved.trained_sha256


def write_task_model(model: TaskModel, folder: Path, *, private_to: str | None = None) -> None:
    """Write the adapter's files into an existing folder."""
    tensors = {name: parameter.detach().cpu().numpy() for name, parameter in model.collect_adapter_parameters().items()}
    head = {name.removeprefix(_HEAD): tensors.pop(name) for name in list(tensors) if name.startswith(_HEAD)}
    head |= {name: constant.cpu().numpy() for name, constant in model.named_buffers(recurse=False)}
    offsets = {name: tensors.pop(name) for name in list(tensors) if name.endswith(OFFSET)}
    files, peft = {"head": head} if model.task.has_head else {}, dict[str, Any]()
    if model.spec.lora.kind != NO_ADAPTER:
        scales = {name: values.cpu().numpy() for name, _, values in iter_peft_scales(model.base)}
        files |= {"adapter_model": tensors | scales} | ({"offsets": offsets} if offsets else {})
        # The base's public id if it has one, so that others can load it; otherwise the user's path.
        peft["base_model_name_or_path"] = find_public_location(model.spec.model)
        peft["fan_in_fan_out"] = model.base.peft_config["default"].fan_in_fan_out
    trained = Adapter.from_task_model(model).digest()
    _write_files(folder, model.spec, files, trained_sha256=trained, peft=peft, private_to=private_to)


def _write_files(
    folder: Path,
    spec: TaskModelSpec,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    *,
    trained_sha256: str,
    peft: Mapping[str, Any],
    private_to: str | None = None,
) -> None:
    """Write the adapter's files from the model's settings and the tensors in each safetensors file.

    `peft` has the keys of adapter_config.json that do not follow from them.
    """
    for file, those in tensors.items():
        # safetensors' own "format" entry tells PEFT that these are for torch.
        save_file(dict(those), folder / f"{file}.safetensors", metadata={"format": "pt"})
    base, files = spec.model, {}
    if endings := TENSOR_FILES[spec.lora.kind]:
        ending = endings["adapter_model"][0]
        full = [name.removesuffix(ending) for name in sorted(tensors["adapter_model"]) if name.endswith(ending)]
        modules = [name.removeprefix("base_model.model.") for name in full]
        predicts, transposed = get_task(spec.task).predicts_tokens, peft["fan_in_fan_out"]
        config = make_peft_config(spec.lora, modules, predicts_tokens=predicts, transposed=transposed).to_dict()
        config |= {"revision": base.revision, "inference_mode": True, **peft}
        files[_FOR_PEFT] = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    # The initial adapter's digest stays, but not its local folder.
    pinned = replace(base, sha256=base.sha256 or hash_model(base), cache_dir=None, adapter=None)
    settings = asdict(replace(spec, model=pinned))
    files[_SETTINGS] = {"schema_version": RUN_SCHEMA, **settings, "trained_sha256": trained_sha256}
    if private_to is not None:
        files[_SETTINGS][PRIVATE_TO] = private_to
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

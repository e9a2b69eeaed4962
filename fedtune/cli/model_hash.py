"""`fedtune model-hash`: the hash that identifies a base model in policies, federations and runs."""

from __future__ import annotations

import sys
from typing import Annotated

from fedtune.cli.command import Argument, AsJson, Option
from fedtune.spec import NOT_GIVEN, ConfigError


def model_hash(
    model: Annotated[str, Argument("MODEL", help="a folder, a GGUF file, or any other value of model.path")],
    files: Annotated[
        bool, Option(help="print only the lines that are hashed (`... --files | sha256sum` prints the hash)")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a base model's hash, as used in policies, federations and run settings, and the files that it covers.

      fedtune model-hash models/minilm            a folder with safetensors, or with one GGUF file
      fedtune model-hash Small-Q4_1.gguf          a GGUF file; sha256sum prints the same hash
      fedtune model-hash package:MODULE/FOLDER    a model in an installed Python package

    fedtune never loads other files of the folder. A model that sites refuse is refused here with the same reason.
    """
    if files and as_json:
        raise ConfigError("--json", NOT_GIVEN, "cannot be combined with --files")
    # transformers takes seconds to import, and rich would slow down --help
    from fedtune.model.base_model import hash_model
    from fedtune.model.manifest import build_manifest
    from fedtune.model.source import find_model_folder, resolve_model
    from fedtune.show.terminal_tables import print_json

    spec = resolve_model(model)
    manifest = None if spec.is_built_in else build_manifest(find_model_folder(spec), gguf_file=spec.gguf_file)
    digest = hash_model(spec) if manifest is None else manifest.sha256
    covered = () if manifest is None else manifest.files
    if as_json:
        print_json({"sha256": digest, "files": dict(covered)})
    elif files and manifest is not None:
        sys.stdout.write(manifest.text)
    else:
        sys.stdout.write(f"{digest}\n")
        sys.stdout.write("\nHashed files:\n" if covered else "")
        for name, one in covered:
            sys.stdout.write(f"  {one}  {name}\n")

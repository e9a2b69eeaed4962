"""`fedtune model-hash`: the hash by which a policy, a federation and a run name a base model."""

from __future__ import annotations

import sys
from typing import Annotated

from fedtune.cli.command import Argument, Option, single


def model_hash(
    model: Annotated[str, Argument("MODEL", help="a folder, a GGUF file, or what model.path may be")],
    files: Annotated[
        bool, Option(names=("--files",), help="print just what the hash is of (`... --files | sha256sum` prints it)")
    ] = False,
) -> None:
    """Print the hash by which a policy, a federation and a run's settings name a base model, and the files it covers.

      fedtune model-hash models/minilm            a folder with safetensors, or with one GGUF file
      fedtune model-hash Small-Q4_1.gguf          a GGUF file; its hash is the one that sha256sum prints
      fedtune model-hash package:MODULE/FOLDER    a model in an installed Python package

    Files that are not listed are never loaded. A model that a site would refuse is refused here, with the reason.
    """
    # transformers takes seconds to import
    from fedtune.model.base import model_sha256
    from fedtune.model.manifest import manifest_of
    from fedtune.model.source import locate, model_folder
    from fedtune.model.spec import RANDOM

    spec = locate(model)
    if spec.path.startswith(RANDOM):
        sys.stdout.write(f"{model_sha256(spec)}\n")
        return
    manifest = manifest_of(model_folder(spec), gguf_file=spec.gguf_file)
    if files:
        sys.stdout.write(manifest.text)
        return
    sys.stdout.write(f"{manifest.sha256}\n\nIt covers:\n")
    for name, digest in manifest.files:
        sys.stdout.write(f"  {digest}  {name}\n")


app = single(model_hash)

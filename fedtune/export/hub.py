"""Upload of an export to the Hugging Face hub, or to a compatible server (`HF_ENDPOINT`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fedtune.model.hf_logging import get_first_line
from fedtune.report.from_run import build_run_report, read_run
from fedtune.report.page.translations import load_catalog
from fedtune.runs.lineage import UNKNOWN, walk_lineage
from fedtune.spec import NOT_GIVEN, ConfigError, RunError
from fedtune.tasks.saved import SavedAdapter
from fedtune.version import __version__

_TAKEN = "already exists with files or another visibility: choose a new name"
_REFUSALS = {
    401: "requires a login to the hub: run `hf auth login`, or set HF_TOKEN",
    403: "cannot be created with your token: use a token with write access to its owner",
    409: _TAKEN,
}


def require_pushable(adapter: Path, repository: str, *, public: bool, without_guarantee: bool) -> list[str]:
    """Check that a finished run's model may be uploaded.

    Args:
        adapter: the adapter's folder, inside its run's folder.
        repository: OWNER/NAME on the hub.
        public: whether the repository is public.
        without_guarantee: also accept a model without a privacy guarantee, in a private repository.

    Returns:
        The reasons why the model has no privacy guarantee; empty if it has a guarantee.

    Raises:
        ConfigError: the name is not OWNER/NAME, the adapter is private to a site, or no guarantee covers the model.
    """
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII) is None:
        raise ConfigError("push", repository, "must be OWNER/NAME, with letters, digits, dots, dashes and underscores")
    SavedAdapter.read(adapter)  # refuses personalized adapters
    run = adapter.absolute().parent
    verdict, words, result = build_run_report(run).verdict, load_catalog("en"), read_run(run).result
    reasons = []
    if verdict.state == "no_guarantee":
        reasons += [words.code("reason", code).unescape() for code in verdict.reasons]
    if any(debt["epsilon"] in (None, UNKNOWN) for debt in walk_lineage(result and result.provenance.start_adapter)):
        reasons.append("The privacy loss of an adapter or base model in its lineage is unbounded or unknown.")
    if reasons and public:
        raise ConfigError("public", NOT_GIVEN, f"requires a model with a privacy guarantee. {' '.join(reasons)}")
    if reasons and not without_guarantee:
        remedy = f"{' '.join(reasons)} For a private repository, add --without-guarantee if its records allow it"
        raise ConfigError("push", repository, "no privacy guarantee covers this model", remedy=remedy)
    return reasons


def push(folder: Path, files: Sequence[Path], repository: str, *, public: bool) -> str:
    """Upload the listed files of a folder to a new or empty repository.

    Authentication is by huggingface_hub's token.  All files are uploaded in a single commit; a failed upload leaves an
    empty repository, which the next attempt reuses.

    Returns:
        The URL of the repository.

    Raises:
        ConfigError: the hub refuses the login, the token or the name, or `HF_HUB_OFFLINE` is set.
        RunError: the hub cannot be reached, or the upload fails.
    """
    hub = HfApi(library_name="fedtune", library_version=__version__)
    try:
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        # An existing repository keeps its visibility, and a server may ignore the requested visibility: check it.
        made = hub.model_info(repository)
        if made.private == public or {one.rfilename for one in made.siblings or ()} - {".gitattributes"}:
            raise ConfigError("push", repository, _TAKEN)
        # upload_folder may split a large folder into several commits; this is a single commit of the listed files.
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        hub.create_commit(repository, added, commit_message=f"Upload a model with fedtune {__version__}")
    except ConfigError:
        raise
    except OfflineModeIsEnabled:
        bound = "requires access to the hub, but HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE"
        raise ConfigError("push", repository, bound) from None
    except Exception as error:  # raised by several libraries; their texts contain no records
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in _REFUSALS:
            raise ConfigError("push", repository, _REFUSALS[status]) from error
        raise RunError(f"nothing was uploaded to {repository} at {hub.endpoint} ({get_first_line(error)})") from error
    return str(address)

"""Whether a site's own files are as they should be: kit, policy, base models and data, and whose they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedtune.data.records import SEVERAL_USERS, iter_records
from fedtune.deploy.doctor.check import SOON_DAYS, Check, PrivateLog, failed, from_error, ok, warning
from fedtune.deploy.files import name_of, own_group
from fedtune.deploy.kits.kit import Kit
from fedtune.deploy.kits.models import installed_bytes, is_made_here, licence_files, model_place, verify_model
from fedtune.privacy.mechanism import Unit
from fedtune.privacy.policy import AT_ONCE, Dataset, Policy
from fedtune.privacy.proposal import UNVERIFIED
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError, DataError
from fedtune.tasks import TASKS

FEW, MANY = 0.5, 2.0
"""True number of records (or users), as a share of the declared size, below or above which a person should look."""


def certificate(kit: Kit, now: datetime) -> Check:
    """Whether the site's certificate belongs to its key and to the authority, and for how long it is in force."""
    name = "certificate"
    try:
        found = kit.check_certificate(now)
    except ConfigError as error:
        fix = "Unzip the kit that was made from this folder's join_request.json, or send the lead that request again."
        return from_error(name, error, fix=fix)
    said = f"in force until {found.not_after:%Y-%m-%d}, {found.days_left(now)} days from now"
    if found.days_left(now) < SOON_DAYS:
        fix = f"Ask the lead for a new kit (`fedtune provision renew-site {kit.site}`), and unzip it here."
        return warning(name, said, fix=fix)
    return ok(name, f"belongs to this site's key; {said}")


def names(kit: Kit, policy: Policy) -> Check:
    """Whether kit and policy are one site's."""
    if kit.site == policy.site:
        return ok("site's name", f"{policy.site}, in kit and policy")
    found = f"the kit is for {kit.site}, the policy for {policy.site}"
    return failed("site's name", found, fix="Use the kit that was made for this policy's site.")


def lead(kit: Kit, policy: Policy) -> Check:
    """Whether the policy lets the federation's lead ask for anything."""
    name = "lead"
    if kit.lead in policy.allow.leads:
        return ok(name, f"the kit's lead {kit.lead[:16]}... is one of the policy's leads")
    line = ", ".join(f'"{key}"' for key in (*policy.allow.leads, kit.lead))
    found = f"the policy does not allow the kit's lead {kit.lead[:16]}...: all of its requests are refused"
    return failed(name, found, fix=f"If you know the key to be the lead's, write under [allow]: leads = [{line}]")


def replies(policy: Policy) -> Check:
    """Whether the time of a reply is hidden."""
    name, every_s = "time of replies", policy.releases.reply_after_s
    if every_s:
        return ok(name, f"answers leave at multiples of {every_s:g} s after their request")
    fix = "Set `reply_after_s` under [releases] in site.toml to more seconds than a round takes, such as 600."
    return warning(name, f"`reply_after_s` is 0: {AT_ONCE}", fix=fix)


def base_models(kit: Kit, policy: Policy) -> Iterator[Check]:
    """Whether each model that the policy allows lies in the store, unchanged; all of its files are read for it."""
    known = {model.sha256: model for model in kit.model}
    for sha256 in policy.allow.base_models:
        name = f"base model {known[sha256].name}" if sha256 in known else f"base model {sha256[:12]}"
        if sha256 == UNVERIFIED:
            found = "the policy accepts runs that do not say which model they train"
            yield warning(name, found, fix='Take "unverified" out of allow.base_models, except for a test federation.')
        elif sha256 not in known and not model_place(kit.folder, sha256).is_dir():
            found = "the policy allows it, and no run of this federation may name it"
            yield warning(name, found, fix="Take it out of allow.base_models, or ask the lead for it.")
        else:
            yield _installed(kit, sha256, name=name, licence=known[sha256].licence if sha256 in known else "")
    for model in kit.model:
        if model.sha256 not in policy.allow.base_models:
            found = f"runs may name it, and the policy does not allow it (SHA-256 {model.sha256})"
            yield ok(f"base model {model.name}", found)
    if not policy.allow.base_models:
        found = "the policy allows none: every request is refused"
        fix = "Put the SHA-256 of the models that you agree to into allow.base_models in site.toml."
        yield failed("base models", found, fix=fix)


def _installed(kit: Kit, sha256: str, *, name: str, licence: str) -> Check:
    place = model_place(kit.folder, sha256)
    if not place.is_dir():
        if is_made_here(sha256):
            return ok(name, "a tiny made-up model for tests, of which nothing needs to be installed")
        fix = (
            "Get its files and run `fedtune site doctor ... --import-model PATH`, with PATH their folder or GGUF file."
        )
        return failed(name, f"is not installed (SHA-256 {sha256})", fix=fix)
    try:
        verify_model(kit.folder, sha256)
    except (ConfigError, OSError) as error:
        why = "its files cannot be read" if isinstance(error, OSError) else error.bound
        fix = "Import it again with `fedtune site doctor ... --import-model PATH`, and find out what changed it."
        return failed(name, f"in {place}: {why}", fix=fix)
    papers = ", ".join(licence_files(kit.folder, sha256)) or "no licence file came with it"
    if not licence:
        fix = "Take it out of allow.base_models, or ask the lead to put it into the federation."
        return warning(name, "installed and unchanged, and no run of this federation may name it", fix=fix)
    return ok(name, f"installed and unchanged; licence {licence} ({papers})")


def largest_model_bytes(kit: Kit, policy: Policy) -> int | None:
    """Size of the largest installed base model; None where none is installed."""
    sizes = []
    for sha256 in policy.allow.base_models:
        try:
            sizes.append(installed_bytes(kit.folder, sha256))
        except (ConfigError, OSError):
            continue
    return max(sizes, default=None)


def data_sets(policy: Policy, folder: Path, log: PrivateLog) -> Iterator[Check]:
    """Whether each data set of the policy can be trained on; every record is read."""
    for dataset in policy.dataset:
        yield _data(dataset, folder, policy, log=log)


def _data(dataset: Dataset, folder: Path, policy: Policy, *, log: PrivateLog) -> Check:
    tasks, unit = policy.allow.tasks, policy.population.unit
    name, block = f"data {dataset.id}", f"[[dataset]] {dataset.id} in site.toml"
    if not dataset.path:
        return failed(name, "has no file", fix=f"Set `path` in {block}.")
    path = folder / dataset.path
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "its file is not there, or this account may not look"
        return failed(name, found, fix=f"Set `path` in {block} to one .jsonl or .csv file, plain or with .gz behind.")
    lacking = _roles_lacking(dataset.columns, tasks)
    if lacking is None:
        asked = " or ".join(f"{', '.join(TASKS[task].roles)} ({task})" for task in tasks if task in TASKS)
        fix = f"Set `columns` in {block} so that each role has its column: {asked or 'of a task in allow.tasks'}."
        return failed(name, "its columns have not the roles of any task that the policy allows", fix=fix)
    try:
        count = _count(path, dataset, unit)
    except DataError as error:
        return _unreadable(error, dataset, name=name, block=block, log=log)
    if not count:
        return failed(name, "holds no record", fix=f"Set `path` in {block} to the file with the records.")
    return _sized(name, count / dataset.declared_size, units=f"{unit}s", lacking=lacking, block=block)


def _count(path: Path, dataset: Dataset, unit: Unit) -> int:
    """The true number of privacy units; reads every record."""
    records = iter_records(path, dataset.columns)
    return sum(1 for _ in records) if unit == "record" else len({record.fields["user"] for record in records})


def _roles_lacking(columns: Mapping[str, str], tasks: tuple[str, ...]) -> str | None:
    """Tasks that `columns` does not serve, in words, empty for none; None where it serves no task at all."""
    lacking = [task for task in tasks if task not in TASKS or not set(TASKS[task].roles) <= set(columns)]
    return None if len(lacking) == len(tasks) else ", ".join(lacking)


def _unreadable(error: DataError, dataset: Dataset, *, name: str, block: str, log: PrivateLog) -> Check:
    """A file that cannot be read, without the error's own words.

    They say in which line it is, which may be the last one and so the number of records, and which columns there are,
    which in a file without a header are the first record.
    """
    where = log.keep(f"{name}: {error}")
    if error.value == SEVERAL_USERS:
        fix = "Leave out records of several people, or decide who owns them: each record has one id, without , ; or |."
        return failed(name, f"a record names several users; runs leave such records out{where}", fix=fix)
    # The key names the column, where it is about one, by the name that the policy has for it.
    column = next((f"column {column!r}" for column in dataset.columns.values() if repr(column) in error.key), "")
    if error.value == "absent":
        fix = f"Name a column that the file has in `columns` of {block}; a CSV file begins with a header."
        return failed(name, f"{column} is not in every record{where}", fix=fix)
    found = f"a record cannot be read{f' at {column}' if column else ''}{where}"
    fix = "Mend or take out that record: each must be a whole JSON object or CSV row, in UTF-8, without blank values."
    return failed(name, found, fix=fix)


def _sized(name: str, share: float, *, units: str, lacking: str, block: str) -> Check:
    """The true number of records, or of users, beside the declared size, in words alone."""
    if share < FEW:
        fix = f"See whether the file is whole; otherwise declare a smaller size in {block}."
        return warning(name, f"every record can be read; far fewer {units} than the declared size", fix=fix)
    if share > MANY:
        fix = f"See whether it is the right file; otherwise declare a larger size in {block}."
        return warning(name, f"every record can be read; far more {units} than the declared size", fix=fix)
    found = f"every record can be read; enough {units} for the declared size"
    if lacking:
        fix = f"Add the roles to `columns` in {block}, or take the task out of allow.tasks."
        return warning(name, f"{found}; its columns have not the roles of task {lacking}", fix=fix)
    return ok(name, found)


def unforeseen(name: str, error: Exception, log: PrivateLog) -> Check:
    """A check that itself went wrong; the error's text may hold anything, so it is not shown."""
    import traceback

    where = log.keep(f"{name}: {''.join(traceback.format_exception(error))}")
    found = f"could not be looked at ({type(error).__name__}){where}"
    return failed(name, found, fix="Report this as a bug, without the log's text unless you have read it.", exit_code=1)


_NAME = "files"
_ROOT = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A file or folder.

    Attributes:
        what: it is, in words.
        written: whether the site's process writes it.
        shown: what to call it in a command, where its path is not to be shown; None: its path.
    """

    what: str
    path: Path
    written: bool = False
    shown: str | None = None


def owners(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[Check]:
    """One line for each file or folder that is in the wrong hands; one in all where none is.

    Args:
        kit: the kit's folder; the account that its connection key belongs to is the one of the site's process.
        site_toml: the policy.
        files: what the policy names; None where it cannot be read.
    """
    key = kit / "connection_key.pem"
    account = key.stat().st_uid if key.exists() else os.geteuid()
    wrong = [check for place in _places(kit, site_toml, files) for check in _wrong(place, account)]
    yield from wrong
    if account != os.geteuid():
        found = f"the site's process runs as account {name_of(account)}, and this is {name_of(os.geteuid())}"
        fix = f"Run the doctor as {name_of(account)}, for instance with `sudo -u {name_of(account)}`."
        yield failed(f"{_NAME}: account", found, fix=fix)
    elif not wrong:
        yield ok(_NAME, f"those of account {name_of(account)} are its own, and no other account but root changes any")


def _places(kit: Path, site_toml: Path, files: SiteFiles | None) -> Iterator[_Place]:
    yield _Place(what="policy", path=site_toml)
    yield _Place(what="policy's folder", path=site_toml.absolute().parent)
    yield _Place(what="kit", path=kit, written=True)
    yield from (_Place(what=name, path=kit / name) for name in ("kit.toml", "ca.pem", "site.pem", "models"))
    yield _Place(what="connection key", path=kit / "connection_key.pem", written=True)
    state = kit / "state"
    yield _Place(what="state", path=state, written=True)
    yield from (
        _Place(what=f"state/{path.relative_to(state)}", path=path, written=True) for path in sorted(_within(state))
    )
    if files is None:
        return
    yield _Place(what="ledger", path=files.ledger, written=True)
    yield _Place(what="ledger's folder", path=files.ledger.absolute().parent, written=True)
    lock = files.ledger.with_name(f"{files.ledger.name}.serving")
    yield _Place(what="ledger's lock", path=lock, written=True)
    yield _Place(what="site key", path=files.site_key, written=True)
    if files.anchor is not None:
        yield _Place(what="anchor", path=files.anchor, written=True)
        yield _Place(what="anchor's folder", path=files.anchor.absolute().parent, written=True)
    for dataset in files.policy.dataset:
        if dataset.path:
            shown = f"the file that `path` of [[dataset]] {dataset.id} names"
            yield _Place(what=f"data {dataset.id}", path=site_toml.parent / dataset.path, shown=shown)


def _within(folder: Path) -> Iterator[Path]:
    """Files and folders in `folder`, no link followed; those that may not be looked at are left out."""
    for base, folders, names in os.walk(folder):
        yield from (Path(base) / name for name in (*folders, *names))


def _wrong(place: _Place, account: int) -> Iterator[Check]:
    try:
        found = place.path.stat()
    except OSError:
        return  # that it is missing, or closed to this account, another line says
    name, shown = f"{_NAME}: {place.what}", place.shown or str(place.path)
    if place.shown is None and not _in_right_hands(place, found, account):
        owner, own = name_of(found.st_uid), name_of(account)
        said = f"{shown} belongs to account {owner}, and the site's process runs as {own}"
        yield failed(name, said, fix=f"Run `chown {own}: {shown}`.")
        return
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    who = "".join(_others(found, account))
    if who and not sticky:
        said = {"o": "every account", "g": f"everyone in group {found.st_gid}"}[who[-1]]
        command = f"chmod {','.join(f'{one}-w' for one in who)}"
        fix = f"Run `{command} {shown}`." if place.shown is None else f"Run `{command}` on {shown}."
        yield failed(name, f"{shown} can be changed by {said}", fix=fix)


def _others(found: os.stat_result, account: int) -> Iterator[str]:
    """Who else may write, as chmod calls them."""
    own = own_group(account)
    if found.st_mode & stat.S_IWGRP and found.st_gid not in (own if own is not None else os.getegid(), _ROOT):
        yield "g"
    if found.st_mode & stat.S_IWOTH:
        yield "o"


def _in_right_hands(place: _Place, found: os.stat_result, account: int) -> bool:
    """Whether the account, or root for it, has the file; root may also own a folder that the account may write into."""
    if found.st_uid == account:
        return True
    open_to = stat.S_ISDIR(found.st_mode) and os.access(place.path, os.W_OK)
    return found.st_uid == _ROOT and (not place.written or open_to)

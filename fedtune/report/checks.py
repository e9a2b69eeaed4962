"""The checks of `fedtune report verify` and their results."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedtune.codec import MAX_BYTES, read_bounded_file, require
from fedtune.config import RunConfig, parse, read_saved_config
from fedtune.federation.run_folder import RunFolder
from fedtune.formatting import group_hex, pluralize
from fedtune.model.adapter_files import CARD, LABEL
from fedtune.privacy.durable import hash_files
from fedtune.report import signing
from fedtune.report.derive import dpia_fields
from fedtune.report.facts import LedgerFacts, RunFacts, SiteFacts
from fedtune.report.model import Problem, Report
from fedtune.report.verify_report import problems
from fedtune.runs.lineage import is_counted
from fedtune.spec import REPORT_SCHEMA, ConfigError, RunError
from fedtune.version import __version__

_CALIBRATED, _STEP = 1e-3, 1e-4
"""Relative tolerances for the noise multiplier that another fedtune version calibrated: below ours, and above ours."""
SIGNED_ADAPTER = "signed adapter"  # the check that real sites signed the final adapter
START = "start adapter"  # the check of who vouches for the epsilon of the start adapter


State = Literal["passed", "failed", "missing", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check, as a sentence; `name` is the subject of the check, or the name of a rendered file.

    State "missing" means that a requested or required comparison could not be made, which leaves the report as a whole
    unverified. Every comparison is required for a report about real sites.
    """

    name: str
    state: State
    text: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustedValues:
    """Trusted values from other sources, which the report must match; None: the caller has no such value.

    Attributes:
        key: public key that must have signed the report.
        site_keys: site -> its public key.
        revoked: site -> the time at which the lead revoked it.
        config_sha256: expected SHA-256 digest of the run's settings.
        model: folder with the run's model, or with an export of the model.
    """

    key: str | None = None
    site_keys: Mapping[str, str] | None = None
    revoked: Mapping[str, str] = field(default_factory=dict)
    config_sha256: str | None = None
    model: Path | None = None


def check_report(path: Path, report: Report, known: TrustedValues) -> tuple[Check, ...]:
    """Run all checks on a report that was read from `path`.

    Settings, model, model card, page and label are compared with the report if they are in the same folder.
    """
    facts, folder = report.facts, path.parent
    of_run = isinstance(facts, RunFacts) and RunFolder(folder).config.is_file()
    found = [
        Check("schema", "passed", f"The report has schema version {REPORT_SCHEMA}."),
        _check_signature(report, known.key),
        *_check_figures(report),
    ]
    if isinstance(facts, RunFacts):
        found += _check_statements(facts, folder)
        found.append(_check_site_keys(facts, known.site_keys, known.revoked))
        found += check_start(facts, known.site_keys)
        config = read_saved_config(folder) if of_run else None
        found.append(_check_configuration(facts, known.config_sha256, config))
        found += _check_model_files(facts, known.model, RunFolder(folder).adapter, config)
    if all(check.state != "failed" for check in found):
        found += _check_rendered_files(folder, report, of_run=of_run)
    return tuple(found)


def _choose_unchecked_state(report: RunFacts | LedgerFacts, *asked: object) -> State:
    """Return the state of a skipped comparison: "missing" if it was `asked` for or the sites are real."""
    return "skipped" if report.simulated and not any(asked) else "missing"


def _check_signature(report: Report, key: str | None) -> Check:
    try:
        signer = signing.verify_report_signature(report, expected_key=key)
    except RunError as error:
        return Check("signature", "failed", f"{str(error)[0].upper()}{str(error)[1:]}.")
    if signer is not None and key is not None:
        return Check("signature", "passed", f"The report is signed with the key {group_hex(key)} and was not changed.")
    text = "The report is not signed: anybody could have changed the values that cannot be recomputed."
    if signer is not None:
        text = f"The signature matches the key in the file, {group_hex(signer)}, but this key was not checked: anybody"
        text += " can sign with a key of their own. Pass the key that you trust with --key."
    return Check("signature", _choose_unchecked_state(report.facts), text)


def _check_figures(report: Report) -> Iterator[Check]:
    found = problems(report)
    of_verdict = tuple(problem for problem in found if ".verdict." in f".{problem.where}")
    others = tuple(problem for problem in found if problem not in of_verdict)
    events = sum(charge.count for site in report.sites for row in site.mechanisms for charge in row.charges)
    again = f"recomputed from the {events:,} mechanisms that {pluralize(len(report.sites), 'site')} ran"
    right, wrong = f"Each epsilon, {again}, matches the report.", pluralize(len(others), "figure")
    for name, those, if_right, if_wrong in (
        ("figures", others, right, f"{wrong} differed from the values {again}:"),
        ("verdict", of_verdict, "Each verdict follows from its figures.", "The verdict contradicts the figures:"),
    ):
        yield Check(name, "failed" if those else "passed", if_wrong if those else if_right, those)


def _check_statements(facts: RunFacts, folder: Path) -> Iterator[Check]:
    """Compare the lifetime figures in the run's report with the signed site reports they come from, if these are
    available.
    """
    if not (joined := [site for site in facts.sites if site.statement]):
        return
    read = [signing.read_report(str(path))[1] for path in sorted(RunFolder(folder).site_reports.glob("*.json"))]
    own = {report.facts.site: report for report in read if isinstance(report.facts, LedgerFacts)}
    names = ", ".join(f"{site.site} ({site.statement.date or 'undated'})" for site in joined if site.statement)
    absent = [site.site for site in joined if site.site not in own]
    found = tuple(
        Problem(f"sites.{site.site}.statement", "figures", "none like these in a report that the site signed")
        for site in joined
        if site.site in own and not _is_source_of_statement(own[site.site], site, facts)
    )
    if found:
        yield Check("taken", "failed", "The sites' own reports contain other figures:", found)
    elif absent:
        text = f"The figures over all runs of {names} were not compared with the reports that these sites signed."
        yield Check("taken", _choose_unchecked_state(facts), f"{text} Put these reports into site_reports/.")
    else:
        yield Check("taken", "passed", f"The figures over all runs match the reports that the sites signed: {names}.")


def _is_source_of_statement(report: Report, site: SiteFacts, facts: RunFacts) -> bool:
    """Return True if a site's report is consistent and signed by the site, and is quoted in the run's report."""
    from fedtune.report.from_run import extract_statement

    try:
        signing.verify_report_signature(report, expected_key=site.receipt.site_key if site.receipt else "")
    except RunError:
        return False
    return not problems(report) and extract_statement(report, run=facts.run, plan=facts.plan) == site.statement


def _check_site_keys(facts: RunFacts, keys: Mapping[str, str] | None, revoked: Mapping[str, str]) -> Check:
    """Compare the keys that signed the receipts with the roster's public keys: anybody can sign with a key of their
    own. A revoked site is named only, because a site may leave after a run.
    """
    held, name = {site.site: site.receipt.site_key for site in facts.sites if site.receipt}, "site keys"
    if facts.simulated:
        text = "One machine held all keys, so they do not identify real sites."
        return Check(name, _choose_unchecked_state(facts, keys), text)
    if keys is None:
        text = "The keys that signed the receipts were not compared with a roster: pass --roster."
        return Check(name, "missing", text)
    left = "".join(f" {one} was revoked at {revoked[one]}." for one in facts.declared_sizes if one in revoked)
    found = [
        Problem(f"sites.{site.site}", held.get(site.site, "no receipt"), keys.get(site.site, "no such site"))
        for site in facts.sites
        if site.site not in keys or held.get(site.site, keys[site.site]) != keys[site.site]
    ]
    if found:
        text = f"{left.lstrip()} Some receipts are signed with keys that are not in the roster:"
        return Check(name, "failed", text.lstrip(), tuple(found))
    if silent := [site.site for site in facts.sites if not site.final]:
        text = f"{', '.join(silent)} did not sign a final receipt, so the report counts the whole plan there.{left}"
        return Check(name, "missing", text)
    return Check(name, "passed", f"Each receipt is signed with the site's key in the roster.{left}")


def check_start(facts: RunFacts, keys: Mapping[str, str] | None) -> Iterator[Check]:
    """Check that listed sites signed the receipts from which the epsilon of a run's start follows, if it has one.

    The keys are those in the signed settings.  A lead with unchanged software reads them from the receipts, so receipts
    that anybody else signed are found.
    """
    start = facts.provenance.start_adapter
    if facts.simulated or start is None or start.epsilon is None or not is_counted(dataclasses.asdict(start)):
        return
    try:
        signers = facts.parse_sent_settings()["privacy"].get("start_keys")
    except ConfigError:
        signers = None
    word = "The epsilon of the training before this run is the lead's word"
    if not signers:
        yield Check(START, "missing", f"{word}: receipts of real sites do not prove all of it.")
    elif keys is None:
        text = f"{word}, because the keys that signed for it were not compared with a roster: pass --roster."
        yield Check(START, "missing", text)
    elif strangers := sorted({*signers} - {*keys.values()}):
        found = tuple(Problem("sent.privacy.start_keys", key, "no such site") for key in strangers)
        yield Check(START, "missing", f"{word}: it was signed with keys that are not in the roster.", found)
    else:
        yield Check(START, "passed", "The epsilon of the training before this run was signed with keys in the roster.")


def _check_model_files(facts: RunFacts, model: Path | None, own: Path, config: RunConfig | None) -> Iterator[Check]:
    """Compare the files in the model's folder with the report's file list, by name and SHA-256; an extra file is an
    error.  An adapter must have exactly the content that a run with these settings saves, and real sites must have
    signed its tensors.
    """
    if not (folder := model or own).is_dir():
        if facts.files:
            text = f"The model was not compared with the {pluralize(len(facts.files), 'file')} that the report lists."
            yield Check("files", _choose_unchecked_state(facts, model), text)
        return
    try:
        there = hash_files(folder, besides=(CARD, LABEL))
    except ConfigError as error:
        yield Check("files", "failed", f"{error}.")
        return
    folders = defaultdict[str, dict[str, str]](dict)
    for name, digest in facts.files.items():
        top, _, below = name.partition("/")
        folders[top][below] = digest
    # An export may have been renamed since.
    named = there if model and there in folders.values() else folders.get(folder.name, folders[own.name])
    match = f"The {pluralize(len(there), 'file')} in {folder} match the report."
    found = [
        Problem(f"{folder.name}/{name}", named.get(name, "no such file"), there.get(name, "no such file"))
        for name in sorted({*named, *there})
        if named.get(name) != there.get(name)
    ]
    if found:
        yield Check("files", "failed", f"The model in {folder} differs from the report's model:", tuple(found))
    elif there == folders[own.name]:
        try:
            checked = facts.files and (config or not facts.simulated)
            trained = _verify_adapter_folder(facts, folder, config) if checked else ""
        except ValueError as error:  # ConfigError: a ValueError
            yield Check("files", "failed", f"{error}.")
            return
        yield Check("files", "passed", match)
        if facts.files and not facts.simulated:
            yield _check_signed_adapter(facts, trained)
    else:
        text = f"{match} The lead states that this export was made from the adapter; sites did not sign it."
        yield Check("files", _choose_unchecked_state(facts), text)


def _verify_adapter_folder(facts: RunFacts, folder: Path, config: RunConfig | None) -> str:
    """Verify that an adapter's folder is what the run saves, and return the digest of its trained tensors.

    The run's settings are those that real sites received, or in a simulation those of its folder.  The location of the
    base, which sites do not receive, is the lead's word.

    Raises:
        ValueError: the folder has other files, or the report does not contain the settings that the sites received.
    """
    from fedtune.tasks.saved import SavedAdapter, verify_adapter  # it imports torch, which takes seconds

    base = config.model if config else SavedAdapter.read(folder).spec.model
    if config is None or facts.deployed:
        try:
            config = parse({**facts.parse_sent_settings(), "name": facts.name})
        except (ValueError, TypeError):
            raise ValueError("The report does not contain the settings that the sites received") from None
    place = {key: getattr(base, key) for key in ("path", "revision", "public_id")}
    spec = config.task_model()
    sha256 = spec.model.sha256 or facts.provenance.model_sha256
    model = dataclasses.replace(spec.model, **place, sha256=sha256)
    found, trained = verify_adapter(folder, dataclasses.replace(spec, model=model))
    require("adapter", str(folder), found == facts.adapter_digest, "changed while it was read")
    return trained


def _check_signed_adapter(facts: RunFacts, trained_sha256: str) -> Check:
    """Check that each charged real site signed the adapter with these trained tensors (`Adapter.digest`) as final."""
    signed, others = facts.find_signed_adapter()
    wrong = ""
    if others or not signed:
        again = "resume the run, which sends its final adapter to the sites again"
        wrong = f"{', '.join(others) or 'No site'} did not sign that this adapter is the final one: {again}."
    elif trained_sha256 != signed:
        wrong = f"The sites signed the final adapter {signed}, but this adapter's tensors have {trained_sha256}."
    right = "Each charged site signed that it received this adapter as the final one."
    return Check(SIGNED_ADAPTER, "failed" if wrong else "passed", wrong or right)


def _check_rendered_files(folder: Path, report: Report, *, of_run: bool) -> Iterator[Check]:
    """Compare page, label, model card and registry entry beside a report with what fedtune renders from the report."""
    from fedtune.report.page.render import render, render_label
    from fedtune.report.page.translations import LANGUAGES
    from fedtune.report.registry_entry import REGISTRY, read_fields_by_people, registry_entry_to_json

    for name, draw in (("report.html", render), (LABEL, render_label)):
        drawn = (draw(report, language=language).encode() for language in LANGUAGES)
        yield from _compare_rendered_file(name, drawn, folder, report)
    if (entry := folder / REGISTRY).is_file():
        written = registry_entry_to_json(report, read_fields_by_people(read_bounded_file(entry, key=REGISTRY))).encode()
        yield from _compare_rendered_file(REGISTRY, [written], folder, report)
    if of_run and any((RunFolder(folder).adapter / name).is_file() for name in (CARD, LABEL)):
        from fedtune.report.model_card import render_adapter_card

        for name, data in render_adapter_card(folder, report).items():
            yield from _compare_rendered_file(name, [data], folder, report)


def _compare_rendered_file(name: str, rendered: Iterable[bytes], folder: Path, report: Report) -> Iterator[Check]:
    """Compare a file, if it exists, with its possible contents: equal reports give equal bytes."""
    if not (file := folder / name).is_file():
        return
    content = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
    if content in rendered:
        yield Check(name, "passed", "The file matches the report byte for byte.")
    elif report.facts.provenance.fedtune_version == __version__:
        text = f"The file differs from the one that fedtune renders: write it again with fedtune report {folder}."
        yield Check(name, "failed", text)
    else:
        text = f"The file was not compared: check it with the report's fedtune version, since {__version__} may differ."
        yield Check(name, _choose_unchecked_state(report.facts), text)


def find_settings_problems(facts: RunFacts, config: RunConfig) -> Iterator[Problem]:
    """Yield every value in a run's report that contradicts the run's settings.

    Guarantee: if there is no problem, every number in the plan, and therefore every mechanism, follows from the
    settings, and the report's statements on data, model and settings match them. The configuration digest shows that
    these are the run's own settings. The origin of an exported base model is not part of the settings and is not
    checked.
    """
    if config.digest() != facts.provenance.config_sha256:
        yield Problem("provenance.config_sha256", facts.provenance.config_sha256, config.digest())
        return
    plan, said, noise = config.plan(), facts.plan, facts.plan.noise_multiplier
    # Calibrated noise may differ between versions of fedtune; within one version, it does not.
    more = _STEP * max(1.01, noise / 10) if facts.provenance.fedtune_version != __version__ else 0.0
    searched = config.privacy.noise_multiplier is None and noise > 0
    if searched and -_CALIBRATED * noise <= noise - plan.noise_multiplier <= more:
        plan = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, noise_multiplier=noise)).plan()
    made, run = facts.provenance, facts.run
    if facts.deployed:
        from fedtune.report.from_run import collect_sent_settings

        run = collect_sent_settings(config, plan, model_sha256=config.model.sha256 or str(made.model_sha256)).run_id()
    started = config.model.adapter_sha256, config.privacy.start, config.public.train_file is not None
    of_facts = dpia_fields.derive_facts_from_settings(config, plan)
    of_provenance = dpia_fields.derive_provenance(config)
    for where, is_so, asked in (
        *((f"plan.{key.name}", getattr(said, key.name), getattr(plan, key.name)) for key in dataclasses.fields(plan)),
        *((key, getattr(facts, key), asked) for key, asked in of_facts.items()),
        *((f"provenance.{key}", getattr(made, key), asked) for key, asked in of_provenance.items()),
        ("seeded_noise", facts.seeded_noise, facts.seeded_noise or config.runtime.seeded_noise),
        *dpia_fields.compare_start(made.start_adapter, *started),
        ("sites", facts.declared_sizes, dict(config.declared_sizes())),
        ("provenance.model_sha256", made.model_sha256, config.model.sha256 or made.model_sha256),
        ("run", facts.run, run),
    ):
        if is_so != asked:
            yield Problem(where, is_so, asked)


def _check_configuration(facts: RunFacts, sha256: str | None, config: RunConfig | None) -> Check:
    """Compare the report with the run's settings: their digest, and the training plan that follows from them."""
    name, said = "configuration", facts.provenance.config_sha256
    found = [Problem("provenance.config_sha256", said, sha256)] if sha256 not in (None, said) else []
    found += find_settings_problems(facts, config) if config is not None else ()
    if found:
        return Check(name, "failed", "The run's settings contradict the report:", tuple(found))
    if config is not None:
        text = "Noise, sampling rate, clip norm, steps, rounds and epsilon match the run's config.yaml."
        return Check(name, "passed", text)
    first = "" if sha256 is None else f"The configuration's digest is {sha256}, as expected. "
    text = "Noise, sampling rate and steps were not checked: config.yaml is not in the report's folder."
    return Check(name, _choose_unchecked_state(facts, sha256), f"{first}{text}")

"""A public stage before a run: trained once by the lead, reused, and reported in all outputs of the run."""

import gzip
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import fedtune
from fedtune.api.compose import compose_run
from fedtune.api.public import run_public_stage
from fedtune.config import read_saved_config
from fedtune.runs.environment import build_start_lineage
from fedtune.show.run_progress import Display
from fedtune.spec import ConfigError

from ..api.test_public import make_tiny_settings as make_settings
from ..cli import snapshots
from ..conftest import REPOSITORY, fail_where, list_tiny_overrides, run_command
from .test_resume import Stop


@pytest.fixture(scope="module")
def public_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions with labels that no other file of the run contains."""
    path, labels = tmp_path_factory.mktemp("public") / "public.jsonl", compose_run(["experiment=debug"]).data.labels
    path.write_text("".join(json.dumps({"text": f"Question {n}?", "label": labels[n]}) + "\n" for n in range(30)))
    return path


def stop_after_a_round(progress: fedtune.Progress) -> None:
    if progress.round is not None:
        raise Stop


@pytest.fixture(scope="module")
def run(public_questions: Path, tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    """A run whose public stage was interrupted, and which was itself interrupted later."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = make_settings(folder, **{"public.train_file": public_questions, "training.ignore_weak_signal": True})
    with pytest.raises(Stop):
        fedtune.simulate("debug", overrides, progress=stop_after_a_round)
    assert [path.name for path in folder.iterdir()] == ["run-public"]
    progress = list[fedtune.Progress]()

    def stop_in_the_run(event: fedtune.Progress) -> None:
        progress.append(event)
        if (folder / "run").exists():
            stop_after_a_round(event)

    with pytest.raises(Stop):
        fedtune.simulate("debug", overrides, progress=stop_in_the_run)
    assert [event.done for event in progress if event.round] == [2, 1], "the stage's second round, then the run's first"
    with pytest.raises(ValueError, match="name = 'run': is taken"):
        fedtune.simulate("debug", overrides)
    written = (folder / "run-public" / "run.json").stat().st_mtime_ns
    finished = fedtune.simulate(settings={"resume": folder / "run"})
    assert (folder / "run-public" / "run.json").stat().st_mtime_ns == written
    return finished


def test_public_stage_is_a_lead_run_that_starts_the_main_run(run: fedtune.Run, public_questions: Path) -> None:
    stage = fedtune.load(run.folder.parent / "run-public")
    assert (stage.privacy.epsilon, [*stage.privacy.sites]) == (None, ["lead"])
    data = stage.config.data
    assert (data.train_file, data.declared_sizes) == (str(public_questions), 30)
    assert re.fullmatch("banking77-public-[0-9a-f]{12}", data.dataset)
    assert stage.config.training.compute_peak_rates(clipped=False) == (0.0033, 0.0033)
    assert run.config.training.compute_peak_rates(clipped=True) == (0.0033, 0.0033)
    # The run starts from it, and every report names its training data.
    start = run.result.provenance.start_adapter
    assert (start["from"], start["public"], start["epsilon"], start["head"]) == ("run-public", True, None, True)
    assert run.result.final.metrics_before == stage.metrics
    report = json.loads((run.folder / "report.json").read_text())
    assert {item["code"]: item["status"] for item in report["assumptions"]}["start_adapter_public"] == "assumed"
    statement = "without privacy on records that the lead declares to be public"
    assert statement in (run.folder / "adapter" / "README.md").read_text()
    page = " ".join((run.folder / "report.html").read_text().split())
    assert page.count("without privacy protection, on records that the lead declares to be public") == 1
    assert run_command("report", "verify", str(run.folder)).code == 0


def test_finished_public_stage_is_reused(run: fedtune.Run, public_questions: Path, tmp_path: Path) -> None:
    shutil.copytree(run.folder.parent / "run-public", tmp_path / "run-public")
    words = list_tiny_overrides(f"public.train_file='{public_questions}'", "federation.num_rounds=1", into=tmp_path)
    other = run_command("simulate", *words).message
    assert "run-public has a different configuration (federation.num_rounds was 2, is 1); choose" in other
    outcome = run_command("simulate", *words, "public.num_rounds=2")
    assert "Public stage" not in outcome.printed
    assert "of run-public; it was trained without privacy on records declared public" in outcome.out
    assert read_saved_config(tmp_path / "run").model.adapter_sha256 == run.config.model.adapter_sha256


def test_public_stage_survives_lost_checkpoints_but_not_changed_records(
    run: fedtune.Run, public_questions: Path, tmp_path: Path
) -> None:
    stage = shutil.copytree(run.folder.parent / "run-public", tmp_path / "run-public")
    shutil.rmtree(stage / "checkpoints")
    written = (stage / "run.json").stat().st_mtime_ns
    file = Path(shutil.copy(public_questions, tmp_path / "public.jsonl"))
    model = replace(run.config.model, adapter=None, adapter_sha256=None)
    privacy = replace(run.config.privacy, **dict.fromkeys(run.config.privacy.start))
    config = replace(run.config, resume=None, model=model, privacy=privacy)
    config = replace(config, tracking=replace(config.tracking, output_dir=str(tmp_path)))
    resumed = run_public_stage(config, lambda stage, folder: pytest.fail("the stage is finished"))
    assert resumed.model.adapter == str(stage)
    assert (stage / "run.json").stat().st_mtime_ns == written
    file.write_text(public_questions.read_text().replace("Question 1?", "Question A?"))
    config = replace(config, public=replace(config.public, train_file=str(file)))
    with pytest.raises(ConfigError, match=r"run-public has a different configuration .*data.dataset was"):
        run_public_stage(config, lambda stage, folder: None)


def test_only_the_configured_stage_counts_as_a_public_start(run: fedtune.Run, public_questions: Path) -> None:
    assert build_start_lineage(run.config)["public"] is True
    private = replace(run.config, model=replace(run.config.model, adapter=str(run.folder)))
    with pytest.raises(
        ConfigError, match=r"model.adapter = .*: must be null with public.train_file: it was trained on other"
    ):
        build_start_lineage(private)
    other = replace(run.config, public=replace(run.config.public, train_file="other.csv"))
    with pytest.raises(ConfigError, match="it was trained on other records"):
        build_start_lineage(other)


def test_interrupted_public_stage_explains_how_to_resume(
    public_questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_where(monkeypatch, Display, "on_round_finished", lambda *_: True, KeyboardInterrupt())
    words = list_tiny_overrides(f"public.train_file={public_questions}", into=tmp_path, name="one")
    (tmp_path / "one").mkdir()
    assert "is taken" in run_command("simulate", *words).message, "it must be refused before the stage trains"
    (tmp_path / "one").rmdir()
    outcome = run_command("simulate", *words)
    assert outcome.code == 1
    output = " ".join(outcome.out.split())
    assert "Public stage: the lead alone trains on" in output
    assert f"Continue with: fedtune simulate {words[0]}" in output
    assert output.endswith("public.jsonl"), "the suggestion must not repeat the name"
    assert [path.name for path in tmp_path.iterdir()] == ["one-public"]


@snapshots.parametrize_mistakes("mistakes-public")
def test_invalid_public_stage_settings_are_refused(public_questions: Path, tmp_path: Path, typed: str) -> None:
    sites = REPOSITORY / "simulations" / "data" / "banking77" / "train.jsonl.gz"
    copy = tmp_path / "copy.jsonl"  # uncompressed, and in another order
    copy.write_bytes(b"\n".join(reversed(gzip.decompress(sites.read_bytes()).splitlines())))
    (owing := tmp_path / "owing.jsonl").write_bytes(public_questions.read_bytes())
    owing.with_name("owing.jsonl.card.json").touch()
    files = {"SITES": sites, "COPY": copy, "PUBLIC": public_questions, "OWING": owing}
    words = shlex.split(re.sub("[A-Z]{4,}", lambda match: str(files[match[0]]), typed))
    base = (
        ["name=other"]
        if "--renew" in words
        else list_tiny_overrides(f"data.train_file='{sites}'", into=tmp_path / "runs")
    )
    message = run_command(
        *(words[:1] if "audit" in words else ["simulate"]), *base, *words[words[0] == "audit" :]
    ).failed()
    for name, file in files.items():
        message = message.replace(str(file), name)
    snapshots.check_message("mistakes-public", typed, message)
    assert not (tmp_path / "runs").exists()

"""`fedtune generate` and `fedtune evaluate` on finished runs."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.model.adapter_files import compute_adapter_digest

from ..conftest import REPOSITORY, edit_config, edit_json, run_command, simulate
from ..forked import Forked
from . import snapshots

LANGUAGE_MODEL = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.declared_sizes=40")


@pytest.fixture(scope="module")
def runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier (`intents`), and two language models of one base (`tables`, `others`)."""
    into = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run, into / "intents")
    for name, seed in (("tables", "seed=0"), ("others", "seed=3")):
        short = ("data.max_length=64", "federation.num_rounds=1", "training.learning_rate=0.2")
        simulate(*LANGUAGE_MODEL, *short, "runtime.seeded_noise=true", seed, into=into, name=name)
    return into


@pytest.fixture(scope="module")
def chats(runs: Path) -> Path:
    """The language-model run, with settings as if it had been tuned on conversations."""
    folder = runs.with_name("conversations") / "chats"  # an error message lists the runs in `runs`
    shutil.copytree(runs / "tables", folder)
    chats = {"columns": {"messages": "messages"}, "chat_template": "plain", "prompt_template": "{prompt}"}
    edit_config(folder, data=chats)
    return folder


def test_generate_prints_answers_of_several_adapters(runs: Path) -> None:
    options = ("--prompt", "name[The Eagle]", "--max-new-tokens", "12", "--json")
    both = run_command("generate", str(runs / "tables"), "--base", "--adapter", f"more={runs / 'others'}", *options)
    answers = json.loads(both.out)["answers"]
    assert list(answers) == ["base", "tables", "more"]
    assert len(set(answers.values())) == 3
    for name, run in (("tables", "tables"), ("more", "others")):
        alone = json.loads(run_command("generate", str(runs / run), *options).out)["answers"]
        assert alone == {run: answers[name]}, "independent of the other models in memory"
    titled = run_command("generate", str(runs / "tables"), "--base", *options[:-1])
    assert re.findall(r"^\[(\w+)\]$", titled.out, re.MULTILINE) == ["base", "tables"]


def test_sampled_answers_repeat_with_the_same_seed(runs: Path) -> None:
    options = ("generate", str(runs / "tables"), "--prompt", "name[The Eagle]", "--max-new-tokens", "12")
    outcome = run_command(*options)
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(run_command(*options, "--json").out)
    assert (result["prompt"], list(result["answers"])) == ("name[The Eagle]", ["tables"])
    assert 0 < len(result["answers"]["tables"]) <= 12
    assert outcome.out == "".join(char for char in result["answers"]["tables"] if char.isprintable()) + "\n"
    first, again, other = (run_command(*options, "--temperature", "1", "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_prints_the_three_most_likely_labels(runs: Path) -> None:
    options = ("generate", str(runs / "intents"), "--prompt", "where is my card")
    labels = json.loads(run_command(*options, "--json").out)["answers"]["intents"]
    assert len(labels) == 3
    assert 1 > labels[0]["probability"] > labels[1]["probability"] > labels[2]["probability"] > 0
    out = run_command(*options).printed
    assert out.startswith(f"{labels[0]['label']} {labels[0]['probability']:.3f} ({labels[1]['label']} ")
    folder = run_command("generate", str(runs / "intents/adapter"), *options[2:])
    assert folder.printed == out, "the adapter's folder is accepted instead of the run"


def test_generate_answers_each_line_of_a_prompt_or_record_file(runs: Path, tmp_path: Path) -> None:
    def generate(*words: str, run: str = "intents") -> Any:
        out = run_command("generate", str(runs / run), "--file", *words, "--json").printed
        return [json.loads(line) for line in out.strip().split("\n")]

    prompts, records = tmp_path / "prompts.txt", tmp_path / "tables.csv"
    odd = "where\x0c is\u2028my\x1c ca\x85rd"  # line ends only for Python's splitlines
    prompts.write_bytes(f"{odd}\r\nlost\n".encode())
    assert [line["fields"]["text"] for line in generate(str(prompts))] == [odd, "lost"]
    prompts.write_text("\N{ZERO WIDTH NO-BREAK SPACE}where is my card\n\nlost\n", encoding="utf-8")
    first, _ = run_command("generate", str(runs / "intents"), "--file", str(prompts)).out.splitlines()
    assert first == run_command("generate", str(runs / "intents"), "--prompt", "where is my card").out.strip()
    answers = generate(str(prompts), "--base")
    assert [(line["line"], line["fields"]["text"]) for line in answers] == [(1, "where is my card"), (3, "lost")]
    assert list(answers[0]["answers"]) == ["base", "intents"]
    # A record's own answer is not part of the prompt.
    records.write_text("facts\nname[The Eagle]\n")
    (line,) = generate(str(records), "--columns", "{prompt: facts}", "--max-new-tokens", "10", run="tables")
    options = ("--prompt", "name[The Eagle]", "--max-new-tokens", "10", "--json")
    assert line["answers"] == json.loads(run_command("generate", str(runs / "tables"), *options).out)["answers"]


def test_conversation_in_a_file_needs_no_final_answer(chats: Path, tmp_path: Path) -> None:
    question, reply = {"role": "user", "content": "name[The Eagle]"}, {"role": "assistant", "content": "no"}
    file = tmp_path / "asked.jsonl"

    def answer(*turns: dict[str, str]) -> Any:
        file.write_text(json.dumps({"messages": turns}) + "\n")
        return run_command("generate", str(chats), "--file", str(file), "--max-new-tokens", "6", "--json")

    without_reply, with_reply = answer(question), answer(question, reply)
    assert (without_reply.code, without_reply.err) == (0, "")
    assert json.loads(without_reply.out) == json.loads(with_reply.out)
    assert json.loads(without_reply.out)["fields"] == {"messages": json.dumps([question], separators=(",", ":"))}
    without_user = answer({"role": "system", "content": "be kind"})
    assert (without_user.code, "no user turn" in without_user.message) == (2, True)


@pytest.mark.parametrize("command", [("generate", "--file"), ("evaluate", "--data")])
def test_missing_column_error_suggests_the_columns_option(command: tuple[str, str], runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\na,card_arrival\nb,card_arrival\n")
    outcome = run_command(command[0], str(runs / "intents"), command[1], str(rows))
    assert (outcome.code, outcome.out) == (2, "")
    expected = "is missing (role text); choose another with --columns '{text: COLUMN}', one of 'body', 'label'"
    assert outcome.message.count(expected) == 1
    assert "data.columns" not in outcome.message


@snapshots.parametrize_mistakes("mistakes-generate")
def test_invalid_generate_requests_are_refused_without_output(
    typed: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    outcome = run_command("generate", *shlex.split(typed))
    snapshots.check_message("mistakes-generate", typed, outcome.failed())
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("intents", "--prompt", "\udce9"), r"^--prompt = .*: must be UTF-8$"),
        (("tables", "--prompt", "a" * 9000), r"^--prompt = '9\d\d\d tokens': must have at most \d+"),
        (("tables", "--base", "--prompt", "a" * 9000), "must have at most"),
        (("intents", "--file", b"\xff\xfe"), "^--file = "),
        (("intents", "--file", b"\n \n"), "^--file = "),
    ],
)
def test_unprintable_or_oversized_prompts_are_refused(
    words: Any, message: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    file = tmp_path / "prompts.txt"
    file.write_bytes(words[-1] if isinstance(words[-1], bytes) else b"")
    outcome = run_command("generate", *(str(file) if isinstance(word, bytes) else word for word in words))
    assert re.search(message, outcome.failed())
    assert outcome.out == ""


def test_generate_refuses_damaged_audited_and_unfinished_runs(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "intents", tmp_path / "run")
    options = ("generate", str(tmp_path / "run"), "--prompt", "a")
    (tmp_path / "run/AUDIT.txt").write_text("")
    assert "is an audit" in run_command(*options).message
    (tmp_path / "run/AUDIT.txt").unlink()
    tensors = tmp_path / "run/adapter/adapter_model.safetensors"
    whole = tensors.read_bytes()
    for damaged, message in (
        (whole[:-1], "has a damaged"),
        (whole[:-4] + b"\0\0\0@", "do not match the digest"),
    ):
        tensors.write_bytes(damaged)
        assert "does not match adapter_digest" in run_command(*options).failed()
        edit_json(tmp_path / "run/run.json", adapter_digest=compute_adapter_digest(tmp_path / "run/adapter"))
        assert message in run_command(*options).failed()
    shutil.rmtree(tmp_path / "run/adapter")
    assert "resume the run first" in run_command(*options).message


@pytest.mark.nightly
def test_adapter_with_different_shapes_is_refused(runs: Path, tmp_path: Path) -> None:
    wider = simulate(*LANGUAGE_MODEL, "lora.rank=6", "lora.alpha=12", "federation.num_rounds=1", into=tmp_path)
    message = run_command("generate", str(runs / "tables"), "--prompt", "a", "--adapter", f"wide={wider}").failed()
    assert re.search(
        r"is incomplete or does not match the run's model: .* has shape \(6, \d+\), not the model's \(4, ", message
    )


@pytest.mark.nightly
def test_keyboard_interrupt_ends_a_streamed_answer(runs: Path) -> None:
    words = ("generate", str(runs / "tables"), "--prompt", "name[The Eagle]", "--max-new-tokens", "100000")
    command = [sys.executable, "-m", "fedtune", *words, "--temperature", "9"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1), "the answer is streamed"
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert rest.endswith(b"\n")
    assert error == b"fedtune: interrupted\n"


def test_evaluate_compares_scores_with_the_base_model(runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\n" + "where is my card,card_arrival\nlost it,lost_or_stolen_card\n" * 10)
    options = ("evaluate", str(runs / "intents"), "--data", str(rows), "--columns", "{text: body}")
    outcome = run_command(*options)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"^ +metric +base +tuned +difference +95 % interval +tuned is *$", outcome.out, re.MULTILINE)
    result = json.loads(run_command(*options, "--json").out)
    assert (result["records"], result["unit"], result["units"], result["prompts"]) == (20, "record", 20, 0)
    assert set(result["scores"]) == set(result["beside_base"]) == {"accuracy", "macro_f1", "auroc", "ece", "loss"}
    for name, score in result["beside_base"].items():
        assert score["tuned"]["value"] == result["scores"][name]
        assert score["difference"]["value"] == pytest.approx(score["tuned"]["value"] - score["base"]["value"])
        assert score["difference"]["low"] <= score["difference"]["high"]
        assert re.search(rf"{name} +{score['base']['value']:.4f} +{score['tuned']['value']:.4f}", outcome.out)
        assert score["verdict"] in outcome.out
    assert result["constant_answer"] == {"accuracy": 0.5}
    assert "the best constant answer: accuracy" in " ".join(outcome.out.split())
    # Before training, the head is zero: every label is as likely as any other.
    assert result["beside_base"]["loss"]["base"]["value"] == pytest.approx(4.3438, abs=1e-4)
    trained_on = "trained on records of this file: these scores do not measure performance on new records"
    assert trained_on not in " ".join(outcome.out.split())
    run = Path(shutil.copytree(runs / "intents", tmp_path / "run"))
    edit_config(run, data={"train_file": str(rows), "columns": {"text": "body", "label": "label"}})
    assert trained_on in " ".join(run_command("evaluate", str(run), "--data", str(rows)).printed.split())


def test_evaluate_scores_generated_text_only_on_request(runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"mr": f"name[{place % 3}]", "ref": f"{place % 3} is a pub"} for place in range(9)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("evaluate", str(runs / "tables"), "--data", str(rows), "--json")
    assert set(json.loads(run_command(*options).out)["scores"]) == {"loss", "perplexity"}
    result = json.loads(run_command(*options, "--generate", "2").out)
    assert set(result["scores"]) == {"loss", "perplexity", "bleu", "rouge_l"}
    assert (result["records"], result["prompts"]) == (9, 2)
    assert {score["verdict"] for score in result["beside_base"].values()} == {"cannot be told apart"}, "too few records"
    outcome = run_command("evaluate", str(runs / "intents"), "--data", str(rows), "--generate", "2")
    assert outcome.message == "--generate = 2: requires a task that generates text; classification does not"


@pytest.mark.nightly
def test_evaluate_resamples_users_for_user_level_runs(tmp_path: Path) -> None:
    run = simulate("experiment=debug_users", "privacy.unit=user", into=tmp_path)
    rows = [f"{user},message {number}" for user in range(12) for number in range(2)]
    for header, unit in (("user,text", ("user", 12)), ("person,text", ("record", 24))):
        (tmp_path / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
        result = json.loads(run_command("evaluate", str(run), "--data", str(tmp_path / "rows.csv"), "--json").printed)
        assert (result["unit"], result["units"], result["records"]) == (*unit, 24)

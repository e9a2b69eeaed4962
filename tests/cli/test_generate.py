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
    folder = runs.with_name("conversations") / "chats"  # a message names what lies in `runs`
    shutil.copytree(runs / "tables", folder)
    chats = {"columns": {"messages": "messages"}, "chat_template": "plain", "prompt_template": "{prompt}"}
    edit_config(folder, data=chats)
    return folder


def test_generate_prints_answers_of_several_adapters(runs: Path) -> None:
    asked = ("--prompt", "name[The Eagle]", "--max-new-tokens", "12", "--json")
    both = run_command("generate", str(runs / "tables"), "--base", "--adapter", f"more={runs / 'others'}", *asked)
    answers = json.loads(both.out)["answers"]
    assert list(answers) == ["base", "tables", "more"]
    assert len(set(answers.values())) == 3
    for name, own in (("tables", "tables"), ("more", "others")):
        alone = json.loads(run_command("generate", str(runs / own), *asked).out)["answers"]
        assert alone == {own: answers[name]}, "whatever else is in memory"
    titled = run_command("generate", str(runs / "tables"), "--base", *asked[:-1])
    assert re.findall(r"^\[(\w+)\]$", titled.out, re.MULTILINE) == ["base", "tables"]


def test_sampled_answers_repeat_with_the_same_seed(runs: Path) -> None:
    asked = ("generate", str(runs / "tables"), "--prompt", "name[The Eagle]", "--max-new-tokens", "12")
    outcome = run_command(*asked)
    assert (outcome.code, outcome.err) == (0, "")
    told = json.loads(run_command(*asked, "--json").out)
    assert (told["prompt"], list(told["answers"])) == ("name[The Eagle]", ["tables"])
    assert 0 < len(told["answers"]["tables"]) <= 12
    assert outcome.out == "".join(one for one in told["answers"]["tables"] if one.isprintable()) + "\n"
    first, again, other = (run_command(*asked, "--temperature", "1", "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_prints_the_three_most_likely_labels(runs: Path) -> None:
    asked = ("generate", str(runs / "intents"), "--prompt", "where is my card")
    told = json.loads(run_command(*asked, "--json").out)["answers"]["intents"]
    assert len(told) == 3
    assert 1 > told[0]["probability"] > told[1]["probability"] > told[2]["probability"] > 0
    out = run_command(*asked).printed
    assert out.startswith(f"{told[0]['label']} {told[0]['probability']:.3f} ({told[1]['label']} ")
    folder = run_command("generate", str(runs / "intents/adapter"), *asked[2:])
    assert folder.printed == out, "the adapter's folder stands for its run"


def test_generate_answers_each_line_of_a_prompt_or_record_file(runs: Path, tmp_path: Path) -> None:
    def lines(*words: str, run: str = "intents") -> Any:
        out = run_command("generate", str(runs / run), "--file", *words, "--json").printed
        return [json.loads(line) for line in out.strip().split("\n")]

    prompts, records = tmp_path / "prompts.txt", tmp_path / "tables.csv"
    odd = "where\x0c is\u2028my\x1c ca\x85rd"  # ends of lines for Python, and for no other
    prompts.write_bytes(f"{odd}\r\nlost\n".encode())
    assert [line["fields"]["text"] for line in lines(str(prompts))] == [odd, "lost"]
    prompts.write_text("\N{ZERO WIDTH NO-BREAK SPACE}where is my card\n\nlost\n", encoding="utf-8")
    first, _ = run_command("generate", str(runs / "intents"), "--file", str(prompts)).out.splitlines()
    assert first == run_command("generate", str(runs / "intents"), "--prompt", "where is my card").out.strip()
    told = lines(str(prompts), "--base")
    assert [(line["line"], line["fields"]["text"]) for line in told] == [(1, "where is my card"), (3, "lost")]
    assert list(told[0]["answers"]) == ["base", "intents"]
    # Records are asked without their answers.
    records.write_text("facts\nname[The Eagle]\n")
    (line,) = lines(str(records), "--columns", "{prompt: facts}", "--max-new-tokens", "10", run="tables")
    asked = ("--prompt", "name[The Eagle]", "--max-new-tokens", "10", "--json")
    assert line["answers"] == json.loads(run_command("generate", str(runs / "tables"), *asked).out)["answers"]


def test_conversation_in_a_file_needs_no_final_answer(chats: Path, tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "name[The Eagle]"}, {"role": "assistant", "content": "no"}
    file = tmp_path / "asked.jsonl"

    def answer(*turns: dict[str, str]) -> Any:
        file.write_text(json.dumps({"messages": turns}) + "\n")
        return run_command("generate", str(chats), "--file", str(file), "--max-new-tokens", "6", "--json")

    alone, whole = answer(asked), answer(asked, answered)
    assert (alone.code, alone.err) == (0, "")
    assert json.loads(alone.out) == json.loads(whole.out)
    assert json.loads(alone.out)["fields"] == {"messages": json.dumps([asked], separators=(",", ":"))}
    nobody = answer({"role": "system", "content": "be kind"})
    assert (nobody.code, "no user turn" in nobody.message) == (2, True)


@pytest.mark.parametrize("asks", [("generate", "--file"), ("evaluate", "--data")])
def test_missing_column_error_suggests_the_columns_option(asks: tuple[str, str], runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\na,card_arrival\nb,card_arrival\n")
    outcome = run_command(asks[0], str(runs / "intents"), asks[1], str(rows))
    assert (outcome.code, outcome.out) == (2, "")
    wanted = "is missing (role text); choose another with --columns '{text: COLUMN}', one of 'body', 'label'"
    assert outcome.message.count(wanted) == 1
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
    asked = ("generate", str(tmp_path / "run"), "--prompt", "a")
    (tmp_path / "run/AUDIT.txt").write_text("")
    assert "is an audit" in run_command(*asked).message
    (tmp_path / "run/AUDIT.txt").unlink()
    tensors = tmp_path / "run/adapter/adapter_model.safetensors"
    whole = tensors.read_bytes()
    for damaged, told in (
        (whole[:-1], "has a damaged"),
        (whole[:-4] + b"\0\0\0@", "do not match the digest"),
    ):
        tensors.write_bytes(damaged)
        assert "does not match adapter_digest" in run_command(*asked).failed()
        edit_json(tmp_path / "run/run.json", adapter_digest=compute_adapter_digest(tmp_path / "run/adapter"))
        assert told in run_command(*asked).failed()
    shutil.rmtree(tmp_path / "run/adapter")
    assert "resume the run first" in run_command(*asked).message


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
    started = [sys.executable, "-m", "fedtune", *words, "--temperature", "9"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Forked(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(1), "the answer comes while it is written"
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert rest.endswith(b"\n")
    assert said == b"fedtune: interrupted\n"


def test_evaluate_compares_scores_with_the_base_model(runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("body,label\n" + "where is my card,card_arrival\nlost it,lost_or_stolen_card\n" * 10)
    asked = ("evaluate", str(runs / "intents"), "--data", str(rows), "--columns", "{text: body}")
    outcome = run_command(*asked)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.search(r"^ +metric +base +tuned +difference +95 % interval +tuned is *$", outcome.out, re.MULTILINE)
    told = json.loads(run_command(*asked, "--json").out)
    assert (told["records"], told["unit"], told["units"], told["prompts"]) == (20, "record", 20, 0)
    assert set(told["scores"]) == set(told["beside_base"]) == {"accuracy", "macro_f1", "auroc", "ece", "loss"}
    for name, one in told["beside_base"].items():
        assert one["tuned"]["value"] == told["scores"][name]
        assert one["difference"]["value"] == pytest.approx(one["tuned"]["value"] - one["base"]["value"])
        assert one["difference"]["low"] <= one["difference"]["high"]
        assert re.search(rf"{name} +{one['base']['value']:.4f} +{one['tuned']['value']:.4f}", outcome.out)
        assert one["verdict"] in outcome.out
    assert told["constant_answer"] == {"accuracy": 0.5}
    assert "the best constant answer: accuracy" in " ".join(outcome.out.split())
    # Before training, the head is zero: every label is as likely as any other.
    assert told["beside_base"]["loss"]["base"]["value"] == pytest.approx(4.3438, abs=1e-4)
    trained_on = "trained on records of this file: these scores do not measure performance on new records"
    assert trained_on not in " ".join(outcome.out.split())
    run = Path(shutil.copytree(runs / "intents", tmp_path / "run"))
    edit_config(run, data={"train_file": str(rows), "columns": {"text": "body", "label": "label"}})
    assert trained_on in " ".join(run_command("evaluate", str(run), "--data", str(rows)).printed.split())


def test_evaluate_scores_generated_text_only_on_request(runs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"mr": f"name[{place % 3}]", "ref": f"{place % 3} is a pub"} for place in range(9)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("evaluate", str(runs / "tables"), "--data", str(rows), "--json")
    assert set(json.loads(run_command(*asked).out)["scores"]) == {"loss", "perplexity"}
    told = json.loads(run_command(*asked, "--generate", "2").out)
    assert set(told["scores"]) == {"loss", "perplexity", "bleu", "rouge_l"}
    assert (told["records"], told["prompts"]) == (9, 2)
    assert {one["verdict"] for one in told["beside_base"].values()} == {"cannot be told apart"}, "9 are too few"
    refused = run_command("evaluate", str(runs / "intents"), "--data", str(rows), "--generate", "2")
    assert refused.message == "--generate = 2: requires a task that generates text; classification does not"


@pytest.mark.nightly
def test_evaluate_resamples_users_for_user_level_runs(tmp_path: Path) -> None:
    run = simulate("experiment=debug_users", "privacy.unit=user", into=tmp_path)
    rows = [f"{user},message {number}" for user in range(12) for number in range(2)]
    for header, unit in (("user,text", ("user", 12)), ("person,text", ("record", 24))):
        (tmp_path / "rows.csv").write_text("\n".join([header, *rows]) + "\n")
        told = json.loads(run_command("evaluate", str(run), "--data", str(tmp_path / "rows.csv"), "--json").printed)
        assert (told["unit"], told["units"], told["records"]) == (*unit, 24)

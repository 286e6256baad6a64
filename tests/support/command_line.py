"""Files of pairs for the command line, and its commands run here, in a process of their own, or interrupted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pfm.cli import app

WORDS = ["stone", "river", "lamp", "garden", "wind", "paper", "bridge", "cloud"]
FAST = ["--encoder", "surface", "--set", "residual=false", "--no-progress"]


def reply(good: bool, source: random.Random) -> str:
    """Write a reply: a good one is a sentence, a bad one shouts or mumbles."""
    text = " ".join(source.choices(WORDS, k=source.randint(4, 12)))
    return f"{text.capitalize()}." if good else text + source.choice(["!!!", "??", " lol"])


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def write_pairs(path: Path, *, right: float = 0.85, prompts: int = 60) -> Path:
    """Write three pairs a prompt, of which the share ``right`` prefers the good reply."""
    source = random.Random(0)
    rows = []
    for number in range(prompts * 3):
        sides = [reply(True, source), reply(False, source)]
        chosen, rejected = sides if source.random() < right else sides[::-1]
        rows.append({"prompt": f"Question {number // 3}?", "chosen": chosen, "rejected": rejected})
    return write_rows(path, rows)


def run(*arguments: object, code: int | None = 0, **env: str):
    """Run a command in this process, and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100", **env})
    if code is not None:
        assert result.exit_code == code, result.output + (str(result.exception) if result.exception else "")
    return result


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pfm", *map(str, arguments)]


def interrupt(arguments: list[object], cwd: Path, ready) -> subprocess.CompletedProcess[str]:
    """Start a command, send it SIGINT once ``ready()``, and wait for its end."""
    process = subprocess.Popen(command(*arguments), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"it ended before it could be interrupted: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

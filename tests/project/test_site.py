"""The documentation: every snippet runs, and the site builds without a warning."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import ROOT

DOCS = ROOT / "docs"
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.M | re.S)
RUN_ELSEWHERE = {"extending.md"}  # tests/project/test_extending.py
COMMANDS = {"command-line.md"}  # pages with commands alone
PAGES = sorted(
    path
    for folder in ("", "tutorials", "how-to", "explanation")
    for path in (DOCS / folder).glob("*.md")
    if ("```python" in path.read_text(encoding="utf-8") or path.name in COMMANDS) and path.name not in RUN_ELSEWHERE
)


def snippets(page: Path):
    """Give kind and code of each snippet that is to run."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found["reason"] is None and found["kind"] in ("python", "bash"):
            yield found["kind"], found["code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for kind, code in snippets(page):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
            continue
        for line in code.splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["pfm"]:
                call = "import sys; from pfm.cli import main; sys.exit(main())"
                run = subprocess.run(
                    [sys.executable, "-c", call, *command[1:]], capture_output=True, text=True, errors="replace"
                )
                assert run.returncode == 0, run.stderr[-3000:]


def test_pages_say_why_a_snippet_does_not_run():
    skipped = [found["reason"] for page in PAGES for found in FENCE.finditer(page.read_text(encoding="utf-8"))]
    assert all(reason is None or reason.startswith("needs ") for reason in skipped)
    assert sum(reason is None for reason in skipped) > 8


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs pip install 'preference-flow[docs]'")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the site needs pip install 'preference-flow[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    flows = (tmp_path / "site" / "reference" / "flows" / "index.html").read_text(encoding="utf-8")
    assert 'id="pfm.PreferenceFlow.transport"' in flows
    assert "Sphinx" not in flows
    assert ":meth:" not in flows


def options_of(command: list[str]) -> set[str]:
    """Give the long options that a command of ``pfm`` knows."""
    import typer.main

    from pfm.cli import app

    group = typer.main.get_command(app)
    return {option for parameter in group.commands[command[0]].params for option in parameter.opts}  # pyright: ignore


@pytest.mark.parametrize("path", ["docs/deploy/Dockerfile", "docs/deploy/pfm-serve.service"])
def test_deployments_use_options_and_files_that_exist(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    used = set(re.findall(r"--(?:upstream|host|config|token-env|port)\b", text))
    assert used
    assert used <= options_of(["serve"])
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split()), line


def test_the_service_is_one_that_systemd_accepts(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DOCS / "deploy" / "pfm-serve.service").read_text(encoding="utf-8")
    unit = tmp_path / "pfm-serve.service"
    unit.write_text(text.replace("/opt/pfm/bin/pfm", sys.executable), encoding="utf-8")
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert "pfm-serve.service" not in run.stderr, run.stderr

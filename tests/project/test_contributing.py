"""The examples of CONTRIBUTING.md, applied to a copy of the repository, where their tests and linters run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import ROOT

PAGE = ROOT / "CONTRIBUTING.md"
COPIED = ("benchmarks", "conf", "pfm", "tests")
BLOCK = re.compile(r"^`([\w./]+)`\n\n```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def apply_diff(text: str, diff: str) -> str:
    """Apply the hunks of a diff, between lines ``@@``: the old lines of each must stand at one place of the text.

    Raises:
        ValueError: the old lines of a hunk stand at none, or at several.
    """
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] or "\n" for line in lines if line[:1] != sign) for sign in "+-")
        if ("\n" + text).count("\n" + old) != 1:
            raise ValueError(f"these lines must stand at one place, not {text.count(old)}:\n{old}")
        text = ("\n" + text).replace("\n" + old, "\n" + new)[1:]
    return text


def test_a_diff_whose_lines_stand_nowhere_or_twice_is_refused():
    assert apply_diff("a\nb\nc\n", "-a\n+x\n@@\n b\n+y\n") == "x\nb\ny\nc\n"
    for diff in ("-d\n", " a\n"):
        with pytest.raises(ValueError, match="must stand at one place"):
            apply_diff("a\nb\na\n", diff)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Copy the repository and apply all blocks of the page; give the copy and the paths that changed."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    page = PAGE.read_text(encoding="utf-8")
    blocks = BLOCK.findall(page.partition("## Five worked examples")[2])
    for path, kind, content in blocks:
        target = copy / path
        if kind != "diff":
            assert not target.exists(), f"{path} is there already"
        target.write_text(apply_diff(target.read_text("utf-8"), content) if kind == "diff" else content, "utf-8")
    return copy, [path for path, _, _ in blocks]


def run(copy: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_has_one_example_of_each_part(changed):
    page = PAGE.read_text(encoding="utf-8")
    examples = page.partition("## Five worked examples")[2]
    parts = re.split(r"^### ", examples, flags=re.MULTILINE)[1:]
    assert [part.partition("\n")[0] for part in parts] == [
        "A coupling", "A preference model", "An encoder", "A decoder", "A benchmark task",
    ]  # fmt: skip
    assert all(re.search(r"^`tests/\w+/test_\w+\.py`$", part, re.MULTILINE) for part in parts)
    assert len(BLOCK.findall(examples)) == examples.count("\n```\n")  # no block without its path


def test_the_examples_pass_their_tests_in_a_copy(changed):
    copy, paths = changed
    tests = [path for path in paths if path.startswith("tests/")]
    marginals = "tests/flow/test_couplings.py::test_every_coupling_has_the_same_marginals"
    every = [f"{marginals}[ranked-{source}]" for source in ("reference", "rejected")]
    run(copy, "pytest", "-q", "-p", "no:cacheprovider", *tests, *every)


def test_the_examples_are_clean(changed):
    copy, paths = changed
    sources = sorted({path for path in paths if path.endswith(".py")})
    run(copy, "ruff", "check", "--no-cache", *sources)
    run(copy, "ruff", "format", "--no-cache", "--check", *sources)

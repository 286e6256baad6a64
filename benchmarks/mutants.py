"""Change the library's core one expression at a time and see whether the tests beside it notice: ``make mutants``.

Mutmut makes the changes and runs, for each, the tests that reach the changed function, in a process of its own. Every
area of :data:`AREAS` has a workspace under ``runs/mutants``, a copy of the repository in which only its modules are
changed. A run that was stopped goes on where it was: what was judged stays judged until the function is edited, and
after an edit of the tests the survivors are tried again.

``python -m benchmarks.mutants [area ...]`` runs areas and writes ``runs/mutants/report.md``, the table of survivors;
with ``--report`` it writes the table of what was run so far. All mutants take days: ``--sample 100`` runs a simple
random sample of that many of each area, the same in every run, so that the share noticed has an interval.
``docs/mutants.md`` says which survivors change nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "mutants"
COPIED = ("pfm", "tests", "benchmarks", "conf", "pyproject.toml", "README.md")

STUDIES = "tests/benchmarks/test_simulation_studies.py"

# Each area: the modules that are changed, and the tests that must notice.
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fields": (("pfm/flow/fields.py",), ("tests/flow/test_fields.py",)),
    "couplings": (
        ("pfm/flow/coupled.py", "pfm/flow/couplings.py", "pfm/flow/transported.py"),
        ("tests/flow/test_couplings.py", "tests/flow/test_fields.py"),
    ),
    "transport": (("pfm/flow/integration.py",), ("tests/flow/test_transport.py", "tests/flow/test_registry.py")),
    "fitting": (("pfm/flow/fitting.py",), ("tests/flow/test_fitting.py",)),
    "statistics": (("pfm/statistics.py",), ("tests/test_statistics.py", STUDIES)),
    "confirmation": (("pfm/_internal/significance.py",), ("tests/internal/test_confirmation.py", STUDIES)),
    "training": (
        ("pfm/flow/problem.py", "pfm/flow/training.py"), ("tests/flow/test_training.py", "tests/flow/test_fields.py"),
    ),
    "win": (("pfm/flow/win.py",), ("tests/flow/test_win.py",)),
    "flow": (
        ("pfm/flow/model.py", "pfm/flow/passes.py", "pfm/flow/preference_flow.py"),
        tuple(f"tests/flow/test_{name}.py" for name in ("flow", "flow_parts", "preference_flow", "modes", "card")),
    ),
    "evaluation": (("pfm/evaluation/evaluation.py",), ("tests/evaluation/test_evaluation.py",)),
    "preferences": (("pfm/preferences/*.py",), ("tests/preferences", "tests/data/test_votes.py")),
}  # fmt: skip

# Not changed: the words of errors and warnings, and what only speaks to a type checker.
LEFT_ALONE = (r"\braise \w", r"warnings\.warn\(", r"\bcast\(", r"^\s*assert ")

NOTICED = ("killed", "timeout", "segfault", "suspicious")

# Mutmut's own first step, alone: write the mutants of a workspace, of which a sample is drawn.
GENERATE = """
from pathlib import Path
import mutmut.__main__ as m
m.set_mutant_under_test("mutant_generation")
Path("mutants").mkdir(exist_ok=True)
m.copy_src_dir()
m.copy_also_copy_files()
m.setup_source_paths()
m.create_mutants(1)
"""


def settings(area: str) -> str:
    """Return the lines of mutmut's settings for an area, to be added to its copy of pyproject.toml."""
    modules, tests = AREAS[area]
    return "\n".join([
        "", "[tool.mutmut]", 'source_paths = ["pfm"]', f"only_mutate = {json.dumps(modules)}",
        f"pytest_add_cli_args_test_selection = {json.dumps(tests)}",
        'pytest_add_cli_args = ["-p", "no:cacheprovider"]',
        f"also_copy = {json.dumps([name for name in COPIED if name not in ('pfm', 'tests')])}",
        f"do_not_mutate_patterns = {json.dumps(LEFT_ALONE)}",
        'process_isolation = "forkserver"',  # torch does not stand forks of a process that ran the tests
        "timeout_constant = 120.0", "timeout_multiplier = 6.0", "use_git_change_detection = false",
        'on_dependency_change = "ignore"', "",
    ])  # fmt: skip


def without_decorators(source: str) -> str:
    """Write decorators as calls after the function, for mutmut leaves decorated functions alone.

    >>> print(without_decorators("@cache\\ndef f():\\n    return 1\\n"), end="")
    def f():
        return 1
    f = cache(f)
    """
    lines = source.splitlines()
    bodies = [node.body for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.ClassDef)]
    edits: list[tuple[int, int, int, list[str]]] = []
    for body in bodies:
        functions = [node for node in body if isinstance(node, ast.FunctionDef)]
        names = Counter(node.name for node in functions)
        for node in functions:
            words = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not words or names[node.name] > 1 or words in (["staticmethod"], ["classmethod"]):
                continue
            calls = [f"{' ' * node.col_offset}{node.name} = {word}({node.name})" for word in reversed(words)]
            edits.append((node.decorator_list[0].lineno - 1, node.lineno - 1, node.end_lineno or node.lineno, calls))
    for first, start, stop, calls in sorted(edits, reverse=True):
        lines[stop:stop] = calls
        del lines[first:start]
    return "\n".join(lines) + "\n"


def prepare(area: str) -> Path:
    """Bring the workspace of an area up to date; files that are as they were keep their times."""
    home = WORK / area
    modules = {path for pattern in AREAS[area][0] for path in ROOT.glob(pattern)}
    wanted: set[Path] = set()
    for name in COPIED:
        whole = ROOT / name
        for path in [whole] if whole.is_file() else sorted(whole.rglob("*")):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            content = path.read_bytes()
            if path in modules:
                content = without_decorators(content.decode()).encode()
            if name == "pyproject.toml":
                content += settings(area).encode()
            target = home / path.relative_to(ROOT)
            wanted.add(target)
            if not target.is_file() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    for name in COPIED:  # mutmut copies tests over those of an earlier run: what is gone goes there too
        for path in (home / name).rglob("*.py"):
            if path not in wanted:
                path.unlink()
                (home / "mutants" / path.relative_to(home)).unlink(missing_ok=True)
    for name in ("shared",):
        if (ROOT / name).exists() and not (home / name).exists():
            (home / name).symlink_to((ROOT / name).resolve())
    return home


def run(area: str, processes: int, sample: int | None = None) -> None:
    """Judge the mutants of an area, or a sample, that are not judged yet; survivors again if the tests were edited."""
    home = prepare(area)
    if sample is not None:
        subprocess.run([sys.executable, "-c", GENERATE], cwd=home, check=True, stdout=subprocess.DEVNULL)
        drawn = sampled(area, sample)
        (home / "sample.json").write_text(json.dumps(sorted(drawn)))
    tests = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((home / "tests").rglob("*.py")))).hexdigest()
    mark = home / "tests.sha256"
    if mark.exists() and mark.read_text() != tests:
        again = [name for _, name, status, _ in judged(area) if status in ("survived", "no tests")]
        if again:
            mutmut(home, processes, again)
    mark.write_text(tests)
    if sample is None:
        mutmut(home, processes, [])
    elif left := [name for _, name, status, _ in judged(area) if name in drawn and status == "not checked"]:
        mutmut(home, processes, left)


def sampled(area: str, count: int) -> set[str]:
    """Draw a simple random sample of an area's mutants, the same for the same mutants."""
    names = sorted(name for _, name, _, _ in judged(area))
    return set(random.Random(0).sample(names, min(count, len(names))))


def mutmut(home: Path, processes: int, names: list[str]) -> None:
    """Run mutmut in a workspace, on all mutants that are not judged or on those named."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes), *names]
    if shutil.which("nice"):
        command = ["nice", "-n", "10", *command]
    found = subprocess.run(command, cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if found.returncode:
        raise SystemExit(f"mutmut failed in {home}: its output above says why")


def judged(area: str) -> Iterator[tuple[str, str, str, str]]:
    """Return each mutant of an area: its module, its name, its status and, of one that was not noticed, the change."""
    from mutmut.configuration import reset_config  # pyright: ignore[reportMissingImports]
    from mutmut.mutation.data import SourceFileMutationData  # pyright: ignore[reportMissingImports]
    from mutmut.mutation.diff_apply import get_diff_for_mutant  # pyright: ignore[reportMissingImports]
    from mutmut.stats import status_by_exit_code  # pyright: ignore[reportMissingImports]

    home, before = WORK / area, Path.cwd()
    if not (home / "mutants").is_dir():
        return
    os.chdir(home)
    try:
        reset_config()
        for path in sorted(path for pattern in AREAS[area][0] for path in Path().glob(pattern)):
            data: Any = SourceFileMutationData(path=path)
            data.load()
            for name, code in data.exit_code_by_key.items():
                status = status_by_exit_code[code]
                told = status in NOTICED or status == "not checked"
                yield str(path), name, status, "" if told else change(get_diff_for_mutant(name))
    finally:
        os.chdir(before)


def change(diff: str) -> str:
    """Write a unified diff of one mutant as "was → is", in one line."""
    sides = {"-": "", "+": ""}
    for line in diff.splitlines():
        if line[:1] in sides and not line.startswith(("---", "+++")):
            sides[line[0]] += " " + line[1:].strip()
    return " → ".join(f"`{sides[side].strip().replace('|', chr(92) + '|')}`" for side in "-+")


def write_report() -> str:
    """Write how many mutants each module had and which survived, as Markdown."""
    counts: dict[str, Counter[str]] = {}
    survivors = []
    for area in AREAS:
        for module, name, status, was_and_is in judged(area):
            counts.setdefault(module, Counter())[status] += 1
            if was_and_is:
                place = re.sub(r"^x_|^xǁ", "", name.rpartition(".")[2]).replace("ǁ", ".")
                survivors.append(f"| `{module}` | `{place.partition('__mutmut_')[0]}` | {status} | {was_and_is} |")
    lines = ["| module | mutants | run | noticed | share noticed |", "|---|---|---|---|---|"]
    for module, count in counts.items():
        seen = sum(count[status] for status in NOTICED)
        ran = count.total() - count["not checked"]
        share = f"{seen / ran:.1%}" if ran else "–"
        lines.append(f"| `{module}` | {count.total()} | {ran} | {seen} | {share} |")
    lines += ["", "| area | random sample | noticed | share noticed, 95% interval |", "|---|---|---|---|"]
    for area in AREAS:
        if (WORK / area / "sample.json").is_file():
            drawn = set(json.loads((WORK / area / "sample.json").read_text()))
            states = [status for _, name, status, _ in judged(area) if name in drawn and status != "not checked"]
            seen = sum(status in NOTICED for status in states)
            lines.append(f"| {area} | {len(states)} of {len(drawn)} | {seen} | {share_of(seen, len(states))} |")
    lines += ["", "| module | function | status | change |", "|---|---|---|---|", *survivors, ""]
    return "\n".join(lines)


def share_of(seen: int, ran: int) -> str:
    """Write a share of a random sample with its 95% interval (Wilson 1927).

    >>> share_of(90, 100)
    '90.0% [82.6, 94.5]'
    """
    if not ran:
        return "–"
    from scipy.stats import binomtest

    low, high = binomtest(seen, ran).proportion_ci(method="wilson")
    return f"{seen / ran:.1%} [{low:.1%}, {high:.1%}]".replace("%,", ",").replace("%]", "]")


def main() -> None:
    """Run the areas that are named, or all, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("areas", nargs="*", metavar="area", help=f"some of {', '.join(AREAS)}; default: all")
    parser.add_argument("--processes", type=int, default=1, help="mutants that are tried at the same time")
    parser.add_argument("--sample", type=int, metavar="N", help="run a random sample of N mutants of each area")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what was run")
    asked = parser.parse_args()
    unknown = sorted(set(asked.areas) - set(AREAS))
    if unknown:
        parser.error(f"no area is named {', '.join(unknown)}: they are {', '.join(AREAS)}")
    try:
        for area in [] if asked.report else asked.areas or AREAS:
            run(area, asked.processes, asked.sample)
    finally:
        WORK.mkdir(parents=True, exist_ok=True)
        (WORK / "report.md").write_text(write_report())
        print(f"the table of survivors is in {WORK / 'report.md'}")


if __name__ == "__main__":
    main()

"""The page of the paper's experiments: what it says of runs, of what is missing, and of sweeps that fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from support.places import ROOT

from benchmarks.core.bench import Bench
from benchmarks.core.data import MissingDataError
from benchmarks.core.runs import Run
from benchmarks.core.schemas import composed
from benchmarks.paper import __main__, task
from benchmarks.paper.known import EXPERIMENTS
from benchmarks.paper.page import as_html, markdown, page, save, sections
from benchmarks.tasks import load_task

BENCH = Bench("minilm", "truncate", 0, False)


def run(kind: str, label: str, seed: int, value: float, folder: Path, **others: float) -> Run:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    settings = {"task": {"name": "mnist"}, "method": {"name": label, "label": label, "family": "none"}, "seed": seed}
    metrics = {"kind": kind, "score": value, "settings": settings, "environment": {"code": "x"}, "key": label,
               "figures": {"right": figure(value), **{n: figure(v) for n, v in others.items()}}}  # fmt: skip
    return Run(folder, metrics)


def settings(tmp_path: Path, *more: str) -> Any:
    given = ("task=paper", f"task.folder={tmp_path}", f"task.page={tmp_path}/page/paper.md", *more)
    return composed(*given).task


def test_the_page_joins_seeds_and_names_what_is_missing(tmp_path: Path) -> None:
    runs = [run("images", "flow", seed, value, tmp_path, diversity=0.8, calls=1.0)
            for seed, value in enumerate((0.95, 0.97, 0.99))]  # fmt: skip
    runs.append(run("images", "a <b> | c", 0, 0.5, tmp_path))
    text = page(runs)
    assert "| flow | 3 | 0.970 ± 0.050 | 0.8 | 1 |" in text
    assert r"| a <b> \| c | 1 | 0.500, one seed | – | – |" in text
    assert text.count("**missing**") == 2
    for experiment in EXPERIMENTS:
        assert all(f"| {figure} | {place} |" in text for _, figure, place in experiment.figures)
    written = as_html(sections(runs))
    assert "<td>a &lt;b&gt; | c</td>" in written
    assert "<script" not in written
    assert markdown(sections([])).count("**missing**") == 3


def test_settings_are_composed_within_a_run_too() -> None:
    """The page compares runs with the files of their methods while Hydra runs the task that writes it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert composed("task=line", "method=images/noise_best").method.name == "noise_best"
        assert GlobalHydra.instance().hydra is before
        assert compose("config", ["task=line"]).task.name == "line"
    assert not GlobalHydra.instance().is_initialized()


def test_the_command_writes_both_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert __main__.main([str(tmp_path / "empty"), str(tmp_path / "none"), "--out", str(tmp_path / "a" / "p.md")]) == 0
    assert capsys.readouterr().out.count("**missing**") == 3
    assert (tmp_path / "a" / "p.html").read_text(encoding="utf-8").count("Ours: missing") == 3
    with pytest.raises(SystemExit):
        __main__.main([str(tmp_path), "--out", str(tmp_path / "p.html")])
    assert "--out is the page in Markdown" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.json").write_text("{", encoding="utf-8")
    assert __main__.main([str(tmp_path / "empty")]) == 2


def test_without_sweeps_the_page_is_written_and_what_is_missing_told(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"paper\.md lacks pbrl, mnist, imdb.*experiment=pbrl"):
        load_task(settings(tmp_path, "task.sweep=false"), 0).run(None, BENCH)
    assert (tmp_path / "page" / "paper.html").is_file()
    with pytest.raises(ValueError, match="name pbrl, mnist, imdb: got 'laws'"):
        load_task(settings(tmp_path, "task.experiments=[laws]"), 0).run(None, BENCH)


@pytest.mark.parametrize(("code", "error"), [(1, RuntimeError), (2, MissingDataError), (130, KeyboardInterrupt)])
def test_a_failed_sweep_is_told_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[BaseException]
) -> None:
    """In place of the sweeps a process that ends with the exit status in question."""
    asked: list[list[str]] = []
    true = task.subprocess.run

    def other(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return true([sys.executable, "-S", "-c", f"raise SystemExit({code})"], **options)

    monkeypatch.setattr(task.subprocess, "run", other)
    overrides = '+task.overrides.mnist=["task=digits","seed=0"]'
    with pytest.raises(error):
        load_task(settings(tmp_path, overrides, f"task.autoencoder={tmp_path}/ae"), 0).run(None, BENCH)
    if code == 130:
        assert len(asked) == 1  # Ctrl-C stops at once
        return
    assert [command[2] for command in asked] == ["benchmarks", "benchmarks", "benchmarks.text_autoencoder"]
    assert asked[1][-2:] == ["task=digits", "seed=0"]
    assert f"out={tmp_path}/mnist" in asked[1]
    assert f"exit status {code}" in (tmp_path / "page" / "paper.md").read_text(encoding="utf-8")


def test_pictures_lie_within_the_html_page(tmp_path: Path) -> None:
    runs = [run("images", "flow", 0, 0.9, tmp_path, **{f"x{n}.{name}": n / 10 for n in (1, 2)
                for name in ("right", "diversity", "moved")})]  # fmt: skip
    runs[0].metrics["about"] = {"chosen": "x1"}
    import numpy as np

    shown = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "images.npz", before=shown, after=shown)
    text = save(runs, tmp_path / "out" / "page.md")
    assert "![Images](paper-mnist-frontier.png)" in text
    assert (tmp_path / "out" / "page.html").read_text(encoding="utf-8").count('src="data:image/png;base64,') == 2

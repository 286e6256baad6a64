"""One page of the three experiments of Preference Flow Matching (arXiv 2405.19806): control, images, text.

Puts the figures of finished runs beside what is known of the paper's set-up, and names what is missing and the command
that makes it.

    python -m benchmarks.paper runs/pbrl runs/mnist runs/imdb
    python -m benchmarks.paper runs/mnist --out page.md      # the other two are named as missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acquisition.report import student_interval
from benchmarks.core.runs import Run, collect
from benchmarks.core.tables import markdown_table

__all__ = ["main", "page"]


@dataclass(frozen=True)
class _Experiment:
    title: str
    kind: str
    measured: str
    known: str
    command: str


EXPERIMENTS = (
    _Experiment(
        "Control",
        "control",
        "the task's score",
        "Theirs: offline control from preferences on D4RL's tasks. In the public code both branches of the labeller "
        "swap chosen and rejected, so that its labels are noise, and copies of simulators restart silently. No figure "
        "of theirs is comparable.",
        "python -m benchmarks -m experiment=pbrl",
    ),
    _Experiment(
        "Images",
        "images",
        "mean probability of the right digit by a judge that took no part in the labels; docs/studies/images.md has "
        "diversity and realism, which some methods pay with",
        "Theirs: a conditional GAN of perceptrons on MNIST, the best and the worst of about ten draws as a pair, and "
        "the LeNet that labels as the judge. The generator's weights are lost; its draws had .84 by that LeNet.",
        "python -m benchmarks -m experiment=mnist",
    ),
    _Experiment(
        "Text",
        "text_autoencoder",
        "win rate of an independent judge against an independent sentence, at the setting chosen for a cosine of .55; "
        "docs/studies/text_autoencoder.md has content and fluency",
        "Theirs: positive sentiment on IMDB, moved in the latent of a pretrained bottleneck autoencoder of the T5 "
        "family. Texts, decoder and judge differ from ours, so the figures are not comparable.",
        "python -m benchmarks.text_autoencoder && python -m benchmarks -m experiment=imdb",
    ),
)


def page(runs: Sequence[Run]) -> str:
    """Write the page in Markdown."""
    lines = ["# The experiments of Preference Flow Matching", ""]
    for experiment in EXPERIMENTS:
        lines += [f"## {experiment.title}", "", experiment.known, ""]
        some = [run for run in runs if run.kind == experiment.kind]
        if not some:
            lines += [f"Ours: **missing**, no such run in these folders. `{experiment.command}`", ""]
            continue
        lines += [f"Ours ({experiment.measured}; ± is half of Student's 95% interval over seeds):", ""]
        for task in sorted({run.task for run in some}):
            rows = _rows([run for run in some if run.task == task])
            lines += [*markdown_table([[task, "seeds", "measured"], *rows]), ""]
    return "\n".join(lines)


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each method, best first; for text one for each family that a run compares."""
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.kind == "text_autoencoder":
            values_of_run = {
                name.removeprefix("chosen ").removesuffix(" at 0.55.win"): figure["value"]
                for name, figure in run.metrics["figures"].items()
                if figure and (name.endswith(" at 0.55.win") or name in ("encode and decode.win",))
            }
        else:
            values_of_run = {run.label: run.metrics["score"]}
        for name, value in values_of_run.items():
            values.setdefault(name.removesuffix(".win"), []).append(value)
    ordered = sorted(values.items(), key=lambda item: -sum(item[1]) / len(item[1]))
    return [[name, str(len(found)), _told(found)] for name, found in ordered]


def _told(values: Sequence[float]) -> str:
    mean, half = student_interval(values)
    decimals = 3 if abs(mean) < 10 else 1
    interval = f" ± {half:.{decimals}f}" if len(values) > 1 else ", one seed"
    return f"{mean:.{decimals}f}{interval}".replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; those that do not exist are missing")
    parser.add_argument("--out", type=Path, help="file to write as well")
    options = parser.parse_args(arguments)
    try:
        there = [folder for folder in options.runs if folder.is_dir()]
        text = page(collect(there, None)) if there else page([])
        if options.out is not None:
            options.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

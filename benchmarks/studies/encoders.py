"""Which encoder: python -m benchmarks -m experiment=encoders, then python -m benchmarks.studies.encoders runs/encoders.

The same reward with the same prompts held out, on one encoder after the other. Tasks that choose among candidates and
tasks that compare two outputs share one measure, the share of the gap from a random choice to the oracle's that is
closed; points are of the judge's score, or of comparisons won. ``--speed`` measures what an answer costs instead.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.measures import ChoiceTable, SeedBootstrap
from benchmarks.core.runs import Run, collect
from benchmarks.core.tables import markdown_table
from benchmarks.preference.measures import PredictionTable
from pfm.statistics import Bootstrap, Estimate

__all__ = ["Task", "main", "milliseconds", "read", "refinement", "table"]

Array = NDArray[np.float64]
BASE = "minilm+surface"
TOKENS = 256
WORDS = [
    "the", "answer", "depends", "on", "what", "you", "need", "because", "every", "method", "has", "its", "own", "cost",
    "and", "people", "often", "choose", "one", "that", "looks", "simple", "at", "first", "while", "better", "way",
    "would", "take", "less", "time", "in", "end", "however", "it", "is", "worth", "second", "look",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One task on every encoder: per prompt what is gained on a random choice, and the oracle's gain.

    ``units`` are prompts of comparisons, and prompts of every seed of choices, as the bootstrap resamples them.
    """

    name: str
    gained: dict[str, Array]
    gap: Array
    bootstrap: Bootstrap
    percent: bool
    count: Array  # of items or comparisons a unit
    seeds: dict[str, int]

    def closed(self, encoder: str) -> Estimate | None:
        """Estimate the share of the gap closed."""
        return self.bootstrap.ratio(self.gained[encoder], self.gap)

    def points(self, encoder: str) -> Estimate | None:
        """Estimate the gain in score over the base encoder, paired."""
        return self.bootstrap.ratio(self.gained[encoder] - self.gained[BASE], self.count)


def read(runs: Sequence[Run]) -> list[Task]:
    """Join the runs of each task: the seeds that all encoders have.

    Raises:
        ValueError: a task lacks runs of the base encoder, or encoders saw different items.
    """
    by_task: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        by_task[run.task][run.metrics["settings"]["encoder"]][run.seed] = run
    return [_task(name, by_encoder) for name, by_encoder in sorted(by_task.items())]


def _task(name: str, runs: dict[str, dict[int, Run]]) -> Task:
    if BASE not in runs:
        raise ValueError(f"{name} has no runs of {BASE}, to which the others are compared")
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in runs.values())))
    if not seeds:
        raise ValueError(f"{name} has no seed that all encoders have: {', '.join(runs)}")
    found = {encoder: _gaps([of_seed[seed] for seed in seeds]) for encoder, of_seed in runs.items()}
    _, gap, owner, count = found[BASE]
    for encoder, other in found.items():
        if not (np.array_equal(other[1], gap) and np.array_equal(other[2], owner)):
            raise ValueError(f"{name}: {encoder} and {BASE} were not measured on the same items")
    bootstrap = SeedBootstrap(owner) if runs[BASE][seeds[0]].kind == "selection" else Bootstrap(len(gap))
    percent = bool(runs[BASE][seeds[0]].metrics["about"].get("percent", True))
    return Task(
        name, {encoder: each[0] for encoder, each in found.items()}, gap, bootstrap, percent, count,
        {encoder: len(seeds) for encoder in runs},
    )  # fmt: skip


def _gaps(runs: Sequence[Run]) -> tuple[Array, Array, NDArray[np.int64], Array]:
    """Return what was gained, the oracle's gain, the seed (of comparisons the prompt) and the weight of each unit."""
    if runs[0].kind == "selection":
        tables = [ChoiceTable.load(run.arrays) for run in runs]
        gained, gap = (np.concatenate(parts) for parts in zip(*(each.gap() for each in tables), strict=True))
        return gained, gap, np.repeat(np.arange(len(runs)), [each.prompts for each in tables]), np.ones(len(gap))
    joined = PredictionTable.join([PredictionTable.load(run.arrays) for run in runs])
    gained, gap, count = (
        np.bincount(joined.owner, values).astype(np.float64) for values in (*joined.gap(), np.ones(len(joined.owner)))
    )
    return gained, gap, np.arange(len(gap)), count


def over_seeds(runs: Sequence[Run]) -> list[str]:
    """Write the share of the gap closed as its mean over seeds, with the interval of Student's t.

    For shuffled labels: every seed draws its own, and a fit's luck with them is shared by all prompts.
    """
    from scipy.stats import t

    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in runs:
        gained, gap, _, _ = _gaps([run])
        shares[run.task, run.metrics["settings"]["encoder"]].append(float(gained.sum() / gap.sum()))
    rows = [["task", "encoder", "gap closed, mean over seeds", "seeds"]]
    for (task, encoder), found in sorted(shares.items()):
        mean, spread = float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else np.inf
        half = float(t.ppf(0.975, max(len(found) - 1, 1))) * spread / len(found) ** 0.5
        rows.append([task, encoder, _written(Estimate(mean, mean - half, mean + half)), str(len(found))])
    return markdown_table(rows)


def table(tasks: Sequence[Task], encoders: Sequence[str]) -> list[str]:
    """Write the tables in Markdown: share of the gap closed, and points gained on the base."""
    closed = [["encoder", *(task.name for task in tasks)]]
    points = [["minus " + BASE, *(task.name for task in tasks), "mean of those in percent"]]
    for encoder in encoders:
        of_task = [task for task in tasks if encoder in task.gained]
        closed.append([encoder, *(_written(task.closed(encoder) if task in of_task else None) for task in tasks)])
        if encoder != BASE:
            gains = [task.points(encoder) if task in of_task else None for task in tasks]
            pairs = list(zip(tasks, gains, strict=True))
            mean = _mean([gain for task, gain in pairs if gain is not None and task.percent])
            points.append(
                [encoder, *(_written(gain, percent=task.percent, signed=True) for task, gain in pairs),
                 _written(mean, signed=True)]
            )  # fmt: skip
    lines = [*markdown_table(closed), "", *markdown_table(points), ""]
    seeds = {task.name: max(task.seeds.values()) for task in tasks}
    return [*lines, "Seeds: " + ", ".join(f"{name} {count}" for name, count in seeds.items())]


def _mean(estimates: Sequence[Estimate]) -> Estimate | None:
    """Average independent estimates; half-widths add in squares."""
    if not estimates:
        return None
    n, value = len(estimates), float(np.mean([each.value for each in estimates]))
    below = float(np.sqrt(sum((each.value - each.low) ** 2 for each in estimates))) / n
    above = float(np.sqrt(sum((each.high - each.value) ** 2 for each in estimates))) / n
    return Estimate(value, value - below, value + above)


def _written(estimate: Estimate | None, *, percent: bool = True, signed: bool = False) -> str:
    return "–" if estimate is None else estimate.text(percent=percent, signed=signed, decimals=1 if percent else 3)


# -- what an answer costs ----------------------------------------------------------------------------------------------


def milliseconds(names: Sequence[str], *, answers: int = 8, repeats: int = 5, seed: int = 0) -> dict[str, Estimate]:
    """Measure milliseconds of processor time an answer of 256 tokens, median and range of the repeats.

    All encoders see the same fresh answers in turn, uncached, in one thread of this process.
    """
    import torch

    from pfm.encoders import Encoder, encoder_from_name

    torch.set_num_threads(1)
    encoders: dict[str, Encoder] = {
        name: encoder_from_name(name, cache=False, long_texts="truncate", device="cpu") for name in names
    }
    rng = random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):  # the first loads and warms up
        texts = _answers(rng, answers)
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            began = time.process_time()
            encoders[name].encode(texts)
            taken[name].append(1000 * (time.process_time() - began) / answers)
    return {name: Estimate(float(np.median(each[1:])), min(each[1:]), max(each[1:])) for name, each in taken.items()}


def refinement(names: Sequence[str], *, answers: int = 8, repeats: int = 5, seed: int = 0) -> dict[str, Estimate]:
    """Measure milliseconds of processor time to encode, judge and choose among fresh answers of 256 tokens to a prompt.

    That is what ``pfm serve`` adds in its own process, beside HTTP. The flow is fitted on the example preferences.
    """
    from importlib.resources import files

    import torch

    import pfm
    from pfm.encoders import encoder_from_name

    torch.set_num_threads(1)
    pairs = pfm.PreferencePairs.from_jsonl(str(files("pfm") / "assets" / "preferences.jsonl"))
    refiners = {}
    for name in names:
        encoded = pairs.encode(encoder_from_name(name), progress=False)
        flow = pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False), progress=False)
        refiners[name] = pfm.wrap(None, flow, encoder=encoder_from_name(name, cache=False, device="cpu"), n=answers)
    rng = random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        texts = _answers(rng, answers)
        for name, refiner in refiners.items():
            began = time.process_time()
            refiner.refine([texts], [pairs.prompts[0]], progress=False)
            taken[name].append(1000 * (time.process_time() - began))
    return {name: Estimate(float(np.median(each[1:])), min(each[1:]), max(each[1:])) for name, each in taken.items()}


def _answers(rng: random.Random, count: int) -> list[str]:
    """Write answers of about 256 tokens out of common words and marks."""

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=15)).capitalize() + "."

    return [" ".join(sentence() for _ in range(TOKENS // 16)) for _ in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or with ``--speed`` what an answer costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--speed", action="store_true", help="measure milliseconds an answer of 256 tokens")
    parser.add_argument("--over-seeds", action="store_true", help="intervals over seeds, for shuffled labels")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    names = [BASE, "static+surface", "static-mean+surface", "surface", "static+minilm+surface"]
    if given.speed:
        rows = [["encoder", "ms an answer", "range", f"{BASE} / it"]]
        found = milliseconds(["minilm", "static", "static-mean", *names], repeats=given.repeats)
        for name, each in found.items():
            ratio = found[BASE].value / each.value
            rows.append([name, f"{each.value:.2f}", f"{each.low:.2f} to {each.high:.2f}", f"{ratio:.0f}"])
        print("\n".join(markdown_table(rows)))
        for name, each in refinement(["static+surface"], repeats=given.repeats).items():
            print(f"a refinement of 8 answers with {name}: {each.value:.1f} ms, {each.low:.1f} to {each.high:.1f}")
        return
    if not given.runs:
        parser.error("give the folder of the runs, or --speed")
    report: Callable[[str], None] = print
    if given.over_seeds:
        report("\n".join(over_seeds(collect(given.runs))))
        return
    report("\n".join(table(read(collect(given.runs)), names)))


if __name__ == "__main__":
    main()

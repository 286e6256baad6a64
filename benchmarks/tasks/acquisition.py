"""Which pair to label next: how well is chosen, at equal numbers of labels, by what the labels taught."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.acquisition.config import AcquisitionConfig
from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.config import AlpacaConfig, ArgumentsConfig, CaptionsConfig
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.methods.acquisition import Acquirer
from benchmarks.selection.selection import Selection, candidate_vectors, one_hot
from benchmarks.tasks import load_task
from pfm.acquisition import LaplacePosterior
from pfm.statistics import Bootstrap, Estimate, win_share

__all__ = ["Acquisition", "load"]

DATA = {"alpaca": AlpacaConfig, "arguments": ArgumentsConfig, "captions": CaptionsConfig}


@dataclass(frozen=True)
class Acquisition:
    """A loaded task: choices of other prompts judge what the labels asked for have taught."""

    selection: Selection
    config: AcquisitionConfig
    seed: int

    def run(self, method: object, bench: Bench) -> Outcome:
        """Let a method ask for labels round by round, and measure best of n by a linear reward fitted on them.

        The learner is the same for every method: :class:`pfm.acquisition.LaplacePosterior`, its prior by the evidence.

        Raises:
            TypeError: the method requests no labels.
        """
        if not isinstance(method, Acquirer):
            raise UnsuitableMethodError(f"{type(method).__name__} asks for no labels, which this task needs")
        marks = [time.perf_counter()]
        every = self.selection.train.encode(bench.encoder, context=False, progress=bench.progress)
        vectors = candidate_vectors(self.selection.items, bench.encoder, progress=bench.progress)
        marks.append(time.perf_counter())
        # The pool is the same for every method of a seed; a pair's order must tell nothing.
        drawn = np.random.default_rng([self.seed, 7]).permutation(len(every))[: self.config.pool]
        pool = every.select(torch.from_numpy(np.sort(drawn)))
        answers = pool.shuffle_labels(self.seed) if method.shuffled else pool
        outputs = torch.cat([pool.chosen, pool.rejected]).flatten(1)
        known = torch.zeros(0, dtype=torch.long)
        open_ = torch.ones(len(pool), dtype=torch.bool)
        points = sorted({min(count, len(pool)) for count in self.config.labels})
        scores, wins, notes = [], [], []
        for point in points:
            while len(known) < point:
                left = open_.nonzero().flatten()
                labelled = answers.select(known) if len(known) else None
                count = min(max(self.config.batch, len(known) // 4), point - len(known))
                asked = left[method.ask(pool.select(left), count, labelled, outputs, self.seed * 1000 + len(known))]
                open_[asked] = False
                known = torch.cat([known, asked])
            model = LaplacePosterior().fit(answers.select(known), outputs)
            notes.append(model.precision)
            best = model.reward(vectors.flatten(0, 1)).view(vectors.shape[:2]).argmax(1)
            table = self.selection.table(one_hot(best.tolist(), vectors.shape[1]))
            scores.append(table.score())
            win = np.where(table.changed, win_share(table.scores, table.scores[:, :1]), 0.5)
            wins.append(table.by_prompt(win))
        marks.append(time.perf_counter())
        score, win = np.stack(scores), np.stack(wins)
        bootstrap = Bootstrap(score.shape[1])
        area = bootstrap.mean(win.mean(0))
        figures: dict[str, Estimate | None] = {"win": area, "score": bootstrap.mean(score.mean(0))}
        figures |= {f"win_at_{point}": bootstrap.mean(row) for point, row in zip(points, win, strict=True)}

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, labels=np.array(points), score=score, win=win)

        return Outcome(
            kind="acquisition",
            score=area.value,
            figures=figures,
            seconds=dict(zip(("encode", "ask"), np.diff(marks).round(3).tolist(), strict=True)),
            about=self._about(points, pool, score),
            notes={"precisions": notes, "mean_score": score.mean(1).tolist(), "mean_win": win.mean(1).tolist()},
            save=save,
        )

    def _about(self, points: list[int], pool: Any, score: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "data": self.config.data,
            "judge": self.selection.judge,
            "labels": points,
            "pool": len(pool),
            "test_prompts": score.shape[1],
            "test_items": len(self.selection.items),
        }


def load(config: AcquisitionConfig, seed: int) -> Acquisition:
    """Load the data's own task; its labels are hidden until they are requested.

    Raises:
        ValueError: the data are of no such task.
    """
    if config.data not in DATA:
        raise ValueError(f"task.data must be one of {', '.join(DATA)}: got {config.data!r}")
    inner = replace(DATA[config.data](name=config.data, limit=config.limit), **config.options)
    selection = load_task(inner, seed)
    assert isinstance(selection, Selection)
    return Acquisition(selection, config, seed)

"""Tasks of one kind: a method learns who beats whom, and says how probable it is on prompts it has not seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.preference.measures import PredictionTable
from pfm import EncodedPairs
from pfm.encoders import Encoder
from pfm.statistics import Bootstrap, Estimate

__all__ = ["Comparer", "Comparison", "Comparisons", "deal_folds"]


@dataclass(frozen=True)
class Comparison:
    """Holds two outputs of one prompt and what was said of them.

    Attributes:
        group: name of the prompt.
        prompt: its text; None where there is none to read.
        first, second: the outputs.
        share: in [0, 1], how much was said for the first; a tie is 1/2.
        votes: how many have said it.
        part: name of a part of the data, on which accuracy is given too.
        unit: what is held out as a whole; None: the prompt.
        lesson: the share that a method learns from; None: ``share``, which is what it is measured against.
        taught: whether a method may learn from it at all.
    """

    group: str
    prompt: str | None
    first: str
    second: str
    share: float
    votes: float = 1.0
    part: str = ""
    unit: str | None = None
    lesson: float | None = None
    taught: bool = True


@runtime_checkable
class Comparer(Protocol):
    """Is what a method must be for these tasks."""

    def learn(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Learn from the training pairs; return what is worth noting, as JSON values."""
        ...

    def compare(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return the log-odds (B,) that y (B, D) is preferred to other (B, D) under contexts (B, C) or None."""
        ...


@dataclass(frozen=True)
class Comparisons:
    """A loaded task.

    Every prompt is held out once: the fit that predicts it has seen the other folds. The score is minus the log-loss.

    Attributes:
        rows: the comparisons; the two outputs of one differ.
        folds: how many parts the prompts are dealt into.
        seed: of how they are dealt.
        judge: who has compared.
        measured: figures of the data alone.
        order_term: the lessons are of one order, first shown first; give that as one more number of an output.
        about: what else to say of the data, as JSON values.
    """

    rows: list[Comparison]
    folds: int
    seed: int
    judge: str
    measured: dict[str, Estimate | None] = field(default_factory=dict)
    order_term: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def run(self, method: object, bench: Bench) -> Outcome:
        """Fit a method on all folds but one, for each of them, and measure its predictions of the one.

        Raises:
            TypeError: the method does not compare outputs. ValueError: its log-odds are not finite.
        """
        if not isinstance(method, Comparer):
            raise UnsuitableMethodError(f"{type(method).__name__} does not compare outputs, which this task needs")
        marks = [time.perf_counter()]
        encoded = _Encoded.of(self.rows, bench.encoder, order_term=self.order_term, progress=bench.progress)
        marks.append(time.perf_counter())
        fold = self.fold()
        taught = np.array([row.taught for row in self.rows])
        logit = np.zeros(len(self.rows))
        order: list[float] = []
        notes = []
        fitting = 0.0
        for number in range(int(fold.max()) + 1):
            tested = np.flatnonzero(fold == number)
            began = time.perf_counter()
            notes.append(method.learn(encoded.pairs(np.flatnonzero((fold != number) & taught)), bench))
            fitting += time.perf_counter() - began
            logit[tested] = method.compare(*encoded.shown_alike(tested)).detach().double().cpu().numpy()
            if self.order_term:
                order.append(float(method.compare(*encoded.against_itself(tested)).mean()))
        marks.append(time.perf_counter())
        if not np.isfinite(logit).all():
            raise ValueError(f"{type(method).__name__} gave {int((~np.isfinite(logit)).sum())} log-odds not finite")
        table = self.table(logit, fold)
        figures = table.measure(Bootstrap(table.prompts)) | self.measured
        if order:
            figures["order_term"] = Estimate(float(np.mean(order)), min(order), max(order))
        loss = figures["log_loss"]
        assert loss is not None
        marks.append(time.perf_counter())
        spent = {"encode": marks[1] - marks[0], "fit": fitting, "predict": marks[2] - marks[1] - fitting,
                 "measure": marks[3] - marks[2]}  # fmt: skip
        return Outcome(
            kind="preference",
            score=-loss.value,
            figures=figures,
            seconds={name: round(seconds, 3) for name, seconds in spent.items()},
            about={
                "judge": self.judge,
                "pairs": len(self.rows),
                "training_pairs": round(int(taught.sum()) * (1 - 1 / (int(fold.max()) + 1))),
                "prompts": table.prompts,
                "folds": int(fold.max()) + 1,
                "ties": float(np.mean([row.share == 0.5 for row in self.rows])),
                "measured": list(self.measured),
                **self.about,
            },
            notes={"folds": notes},
            save=table.save,
        )

    def fold(self) -> NDArray[np.int64]:
        """Return the fold (N,) of each comparison."""
        return deal_folds([row.unit or row.group for row in self.rows], self.folds, self.seed)

    def table(self, logit: NDArray[np.float64], fold: NDArray[np.int64]) -> PredictionTable:
        """Join comparisons and predictions (N,), without the texts."""
        return PredictionTable(
            group=np.array([row.group for row in self.rows]),
            part=np.array([row.part for row in self.rows]),
            share=np.array([row.share for row in self.rows]),
            logit=logit,
            fold=fold,
        )


def deal_folds(units: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """Deal units at random into folds of equal numbers of units: (N,) numbers from 0.

    Raises:
        ValueError: fewer than two folds, or fewer units than folds.
    """
    names = sorted(set(units))
    if folds < 2 or len(names) < folds:
        raise ValueError(f"task.folds must be between 2 and the {len(names)} prompts: got {folds}")
    place = np.random.default_rng(seed).permutation(len(names)) % folds
    of = dict(zip(names, place.tolist(), strict=True))
    return np.array([of[unit] for unit in units], dtype=np.int64)


@dataclass(frozen=True)
class _Encoded:
    """Holds the encoded outputs (M, D) once each, contexts (G, C) or None, and where each comparison's are.

    With an order term, outputs have one more number, which is 0. It is ``scale`` for an output that was shown first:
    the outputs' root mean square distance from their mean, so that a penalty on weights hardly touches it.
    """

    rows: list[Comparison]
    outputs: Tensor
    place: Tensor  # (N, 2)
    contexts: Tensor | None
    context: Tensor  # (N,)
    group: Tensor  # (N,)
    scale: float
    about: dict[str, Any]

    @classmethod
    def of(cls, rows: list[Comparison], encoder: Encoder, *, order_term: bool, progress: bool) -> _Encoded:
        places: dict[str, int] = {}
        place = [[places.setdefault(text, len(places)) for text in (row.first, row.second)] for row in rows]
        outputs = encoder.encode(list(places), progress=progress)
        scale = 0.0
        if order_term:
            scale = float((outputs - outputs.mean(0)).square().sum(1).mean().sqrt())
            outputs = torch.cat([outputs, torch.zeros(len(outputs), 1)], dim=1)
        contexts, numbers = None, dict[str, int]()
        if all(row.prompt is not None for row in rows):
            context = [numbers.setdefault(str(row.prompt), len(numbers)) for row in rows]
            contexts = encoder.encode_prompts(list(numbers), progress=progress)
        else:
            context = [0] * len(rows)
        groups: dict[str, int] = {}
        group = [groups.setdefault(row.unit or row.group, len(groups)) for row in rows]
        return cls(
            rows, outputs, torch.tensor(place), contexts, torch.tensor(context), torch.tensor(group), scale,
            encoder.describe(),
        )  # fmt: skip

    def pairs(self, index: NDArray[np.int64]) -> EncodedPairs:
        """Return the comparisons at ``index`` as labelled pairs, what was said more for as chosen."""
        rows = [self.rows[i] for i in index]
        share = torch.tensor([row.share if row.lesson is None else row.lesson for row in rows], dtype=torch.float64)
        first, second = self.place[torch.from_numpy(index)].T
        outputs = self.outputs
        if self.scale:
            # Shown first: a second table, which differs in the last number.
            ahead = outputs.clone()
            ahead[:, -1] = self.scale
            outputs = torch.cat([outputs, ahead])
            first = first + len(ahead)
        swapped = share < 0.5
        return EncodedPairs.from_table(
            outputs,
            torch.where(swapped, second, first),
            torch.where(swapped, first, second),
            contexts=self.contexts,
            context_index=None if self.contexts is None else self.context[torch.from_numpy(index)],
            weight=torch.tensor([row.votes for row in rows]),
            probability=torch.where(swapped, 1 - share, share).float(),
            group=self.group[torch.from_numpy(index)],
            encoder=self.about,
        )

    def shown_alike(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gather first and second outputs (B, D) and contexts, as if neither was shown first."""
        first, second = (self.outputs[part] for part in self.place[torch.from_numpy(index)].T)
        return self._between(first), self._between(second), self._context(index)

    def against_itself(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gather first outputs twice, shown first and second: what order alone is worth."""
        ahead = self.outputs[self.place[torch.from_numpy(index), 0]].clone()
        behind = ahead.clone()
        ahead[:, -1] = self.scale
        return ahead, behind, self._context(index)

    def _between(self, outputs: Tensor) -> Tensor:
        if self.scale:
            outputs = outputs.clone()
            outputs[:, -1] = self.scale / 2
        return outputs

    def _context(self, index: NDArray[np.int64]) -> Tensor | None:
        return None if self.contexts is None else self.contexts[self.context[torch.from_numpy(index)]]

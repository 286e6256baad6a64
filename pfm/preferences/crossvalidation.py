"""Penalised logistic regression on blocks of features, whose settings are chosen on prompts that were left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pfm.preferences.logistic import PairwiseLogistic
from pfm.preferences.newton import label_loss

__all__ = ["AVERAGED", "Block", "Search", "Setting", "deal_folds"]

PENALTIES = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # from strong to weak: each start is the last solution
FOLDS = 5
AVERAGED = 4
CV_PAIRS = 20_000

Setting = tuple[float, ...]
"""The penalty, and the scale of every block after the first; scale 0 leaves a block out."""

Block = Tensor | Callable[[Tensor], Tensor]
"""Rows (N, F) of features of chosen minus rejected; or what makes them, having seen the labels of a mask (N,) only."""


class Search:
    """Fits a pairwise regression in blocks of features at many settings, each on all folds but one in turn.

    The few settings of least log loss on left-out prompts are averaged: their mean predicts better than the best alone.
    A fold whose pairs all have weight 0 judges nothing.

    Args:
        blocks: the blocks of features; the first is always there.
        weight, probability: (N,) weights and soft labels.
        fold: (N,) the fold of each pair, by :func:`deal_folds`; all tensors are on one device.
    """

    def __init__(self, blocks: Sequence[Block], weight: Tensor, probability: Tensor, fold: Tensor) -> None:
        self.blocks = list(blocks)
        self.weight, self.probability, self.fold = weight, probability, fold
        # Whole folds thinned alike: every prompt stays in its fold.
        self._kept = (torch.arange(len(fold), device="cpu") % -(-len(fold) // CV_PAIRS) == 0).to(fold.device)
        self._loss: dict[Setting, float] = {}
        self._fits: dict[Setting, dict[int, Tensor]] = {}
        self._made: dict[tuple[int, int], Tensor] = {}

    def over(self, grid: Sequence[Sequence[float]], penalties: Sequence[float] = PENALTIES) -> None:
        """Fit at every penalty, for every row of scales in the grid."""
        folds = self.fold.unique().tolist()
        weight, probability = self.weight[self._kept], self.probability[self._kept]
        for scales in grid:
            for numbers in self._alike(scales, folds):
                rows = self._rows(scales, numbers[0], self._kept)
                out = torch.stack([self.fold[self._kept] == number for number in numbers])
                solver = PairwiseLogistic(rows, weight * ~out, probability)
                for penalty in penalties:
                    weights = solver.fit(penalty)
                    setting, score = (penalty, *scales), (rows @ weights.T).T
                    loss = (weight * out * label_loss(score, probability)).sum()
                    self._loss[setting] = self._loss.get(setting, 0.0) + float(loss)
                    self._fits.setdefault(setting, {}).update(zip(numbers, weights, strict=True))

    def _alike(self, scales: Sequence[float], folds: Sequence[int]) -> list[list[int]]:
        """Return the folds in groups whose rows at some scales are the same, and are fitted together."""
        used = [block for block, scale in zip(self.blocks, [1.0, *scales], strict=True) if scale]
        made = any(not isinstance(block, Tensor) for block in used)
        return [[number] for number in folds] if made else [list(folds)]

    def best(self, fits: Callable[[Setting], bool] = lambda setting: True) -> list[Setting]:
        """Return the settings to be averaged, the best first, among those that ``fits`` admits."""
        return sorted(filter(fits, self._loss), key=lambda setting: self._loss[setting])[:AVERAGED]

    def left_out(self, settings: Sequence[Setting]) -> Tensor:
        """Return the score differences (N,) of every pair by the mean of fits that did not see its prompt."""
        score = torch.zeros(len(self.fold), dtype=torch.float32, device=self.fold.device)
        for number in self.fold.unique().tolist():
            part = self.fold == number
            for setting in settings:
                rows = self._rows(setting[1:], number, part)
                score[part] += rows @ self._fits[setting][number] / len(settings)
        return score

    def weights(self, settings: Sequence[Setting], number: int) -> list[Tensor]:
        """Return the mean weights of each block of the fits that did not see fold ``number``."""
        return self._average([self._fits[setting][number] for setting in settings], settings)

    def refit(self, settings: Sequence[Setting]) -> list[Tensor]:
        """Fit the settings on all pairs; give the mean weights of each block."""
        every = torch.ones_like(self.fold, dtype=torch.bool)
        fits = [
            PairwiseLogistic(self._rows(scales, -1, every), self.weight, self.probability).fit(penalty, 100)
            for penalty, *scales in settings
        ]
        return self._average(fits, settings)

    def _rows(self, scales: Sequence[float], number: int, part: Tensor) -> Tensor:
        """Return the rows of ``part`` at some scales, made without the labels of fold ``number``."""
        rows = [self._block(0, number)[part]]
        rows += [self._block(place, number)[part] * scale for place, scale in enumerate(scales, 1) if scale]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def _block(self, place: int, number: int) -> Tensor:
        block = self.blocks[place]
        if isinstance(block, Tensor):
            return block
        if (place, number) not in self._made:
            self._made[place, number] = block(self.fold != number)
        return self._made[place, number]

    def _average(self, fits: list[Tensor], settings: Sequence[Setting]) -> list[Tensor]:
        sizes = [self._block(place, -1).shape[1] for place in range(len(self.blocks))]
        mean = [torch.zeros(size, dtype=torch.float32, device=self.fold.device) for size in sizes]
        for weights, (_, *scales) in zip(fits, settings, strict=True):
            at = 0
            for place, scale in enumerate([1.0, *scales]):
                if scale:
                    mean[place] += weights[at : at + sizes[place]] * scale / len(fits)
                    at += sizes[place]
        return mean


def deal_folds(group: Tensor, generator: torch.Generator) -> Tensor:
    """Deal the prompts (pairs, when there is one prompt) into folds; give each pair's fold (N,), on the CPU."""
    names, member = torch.unique(group, return_inverse=True)
    if len(names) < 2:
        names = member = torch.arange(len(group), device="cpu")
    place = torch.randperm(len(names), generator=generator, device="cpu") % min(FOLDS, max(len(names), 1))
    return place[member]

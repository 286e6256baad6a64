"""What a method may learn from: draws of the frozen generator, and the labelling judge's preferences among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.images.data import DIGITS, one_hot
from benchmarks.images.generator import Draws, Generator
from benchmarks.images.judges import Classifier
from benchmarks.images.reward import DigitReward
from pfm import EncodedPairs

__all__ = ["LABELS", "TARGETS", "Lesson", "log_odds"]

TARGETS = ("pairs", "sets", "extremes")
LABELS = ("given", "shuffled", "swapped")


def log_odds(judge: Classifier, images: Tensor, digits: Tensor) -> Tensor:
    """Return a judge's log-odds (N,) of the digits (N,), differentiable; no ties where probabilities round to one."""
    logits = judge(images)
    own = logits.gather(1, digits[:, None])
    others = logits.scatter(1, digits[:, None], -torch.inf)
    return own.squeeze(1) - others.logsumexp(1)


@dataclass(frozen=True)
class Lesson:
    """Holds sets of draws with the labelling judge's scores.

    Attributes:
        generator: frozen; a method may draw from it, and decode noise.
        labelling: the judge of preferences.
        draws: of S sets of n draws each, one digit a set.
        size: n. scores: (S * n,) log-odds of the right digit. seed: of the run.
        described: what the draws depend on, JSON values.
    """

    generator: Generator
    labelling: Classifier
    draws: Draws
    size: int
    scores: Tensor
    seed: int
    described: dict[str, Any]
    _rewards: dict[tuple[str, str], DigitReward] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def drawn(
        cls, generator: Generator, labelling: Classifier, sets: int, size: int, seed: int, described: dict[str, Any]
    ) -> Lesson:
        """Draw the sets of a seed, and have them scored."""
        draws = generator.draw((torch.arange(sets) % DIGITS).repeat_interleave(size), 1000 * seed + 11)
        lesson = cls(generator, labelling, draws, size, torch.zeros(0), seed, described)
        return cls(generator, labelling, draws, size, lesson.score(draws.images, draws.digits), seed, described)

    @torch.no_grad()
    def score(self, images: Tensor, digits: Tensor) -> Tensor:
        """Return the labelling judge's log-odds (N,) of the digits on images."""
        parts = zip(images.split(1000), digits.split(1000), strict=True)
        return torch.cat([log_odds(self.labelling, some, own) for some, own in parts])

    def pairs(self, y: Tensor, labels: str = "given", target: str = "pairs") -> EncodedPairs:
        """Make pairs of the draws' vectors or images y (S * n, \\*D); of two draws the one with the higher score wins.

        Args:
            y: the draws in a method's space.
            labels: "given", "shuffled" (scores change places among all draws), "swapped" (the lower score wins).
            target: "pairs", n / 2 of each set; "sets", one pair and the set with its scores; "extremes", the best and
                the worst.

        Raises:
            ValueError: other labels or targets.
        """
        for name, value, known in (("labels", labels, LABELS), ("target", target, TARGETS)):
            if value not in known:
                raise ValueError(f"method.{name} must be one of {', '.join(known)}: got {value!r}")
        scores = self.scores
        if labels == "shuffled":
            scores = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(self.seed + 77))]
        elif labels == "swapped":
            scores = -scores
        table = torch.arange(len(scores)).view(-1, self.size)
        if target == "extremes":
            of_set = scores.view(-1, self.size)
            rows = torch.arange(len(table))
            chosen, rejected = table[rows, of_set.argmax(1)], table[rows, of_set.argmin(1)]
        else:
            some = table[:, :2] if target == "sets" else table[:, : self.size // 2 * 2]
            first, second = some[:, ::2].flatten(), some[:, 1::2].flatten()
            wins = scores[first] > scores[second]
            chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
        number = chosen // self.size
        candidates = [(place, rows, scores[rows]) for place, rows in enumerate(table)] if target == "sets" else None
        return EncodedPairs.from_table(
            y, chosen, rejected,
            contexts=one_hot(self.draws.digits[:: self.size]), context_index=number, group=number,
            candidates=candidates,
        )  # fmt: skip

    def reward(self, space: str, y: Tensor, labels: str = "given") -> DigitReward:
        """Fit a reward on the pairs of the draws y in a space, once for all methods of this lesson."""
        key = space, labels
        if key not in self._rewards:
            self._rewards[key] = DigitReward(self.seed).fit(self.pairs(y, labels))
        return self._rewards[key]

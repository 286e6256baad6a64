"""b(y|x) from a preference model: the mean chance of y against opponents, cyclic preferences included.

What stays defined when preferences go round, and what does not:

- b(y|x) = E over y' ~ pi_ref of P(y > y' | x) is defined for any preference, and so are the winners' law
  p1 = 2 pi_ref b, the gate, one pass of a flow, and choosing the candidate that does best against the others;
- "the best output" is not: the candidate of highest b may lose to another candidate (it is the Borda winner, not a
  Condorcet winner, which need not exist), and b changes with the opponents;
- rounds of labels need not converge. Each round beats the one before, and under a reward every later round beats every
  earlier one by at least as much; with cycles it need not (:mod:`pfm.rounds`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pfm.confirmation import confirmed
from pfm.encoded import CandidateRows, EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, restored
from pfm.preferences.calibration import pair_scores, reliability
from pfm.win import confirmed_margin

__all__ = ["PreferenceWin", "candidate_wins", "rescored"]

DRAWS = 512  # reference draws that are kept
NEAREST = 64  # of them the opponents of an output under a context: those whose contexts are nearest
FLOOR = 1e-6  # of a probability, before its log-odds are taken
ROWS = 512


class PreferenceWin(nn.Module):
    """Gives logit b(y|x) by a fitted preference model, against reference draws that are kept with it.

    It stands where :class:`pfm.win.WinHead` does. Without contexts all draws are the opponents; with contexts, where
    pi_ref depends on x, the :data:`NEAREST` draws whose contexts are nearest.

    Args:
        model: the preference model.
        dimension, context_dimension: of outputs and contexts.
        draws: number of reference draws.
    """

    draws: Tensor
    draw_contexts: Tensor
    context_spread: Tensor
    margin: Tensor

    def __init__(self, model: PreferenceModel, dimension: int, context_dimension: int, draws: int) -> None:
        super().__init__()
        self.model = model
        for name, value in {
            "draws": torch.zeros(draws, dimension),
            "draw_contexts": torch.zeros(draws, context_dimension),
            "context_spread": torch.ones(context_dimension),
            "margin": torch.tensor(math.inf),
        }.items():
            self.register_buffer(name, value)

    @classmethod
    def made(
        cls, model: PreferenceModel, pairs: EncodedPairs, judging: EncodedPairs, seed: int = 0
    ) -> tuple[PreferenceWin, dict[str, Any]]:
        """Keep reference draws of ``pairs`` and set the guard on ``judging``; give this, and what was found.

        Of every pair one member, by a fair coin, is a draw of the reference.

        Raises:
            TypeError: not a preference model. ValueError: it was fitted on outputs of another size.
        """
        if not isinstance(model, PreferenceModel):
            raise TypeError(
                f"preference must be a pfm.preferences.PreferenceModel: got {type(model).__name__}; a subclass gives "
                "fit and embed"
            )
        if model.layout is None:
            raise RuntimeError(f"{type(model).__name__} is not fitted: call fit(pairs) first")
        for name, wanted in (("dimension", pairs.dimension), ("context_dimension", pairs.context_dimension)):
            has = getattr(model, name)
            if has != wanted and not (name == "context_dimension" and has == 0):
                raise ValueError(f"preference must have been fitted on {name} {wanted}: got {has}")
        model = copy.deepcopy(model)  # the caller's may be fitted anew, or moved
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(pairs), generator=generator)[:DRAWS]
        win = cls(model, pairs.dimension, pairs.context_dimension, len(index))
        win.draws.copy_(pairs.members(2 * index + torch.randint(2, (len(index),), generator=generator)))
        contexts = pairs.contexts_of(index)
        if contexts is not None:
            win.draw_contexts.copy_(contexts)
            win.context_spread.copy_(contexts.std(0, correction=0).clamp_min(1e-6))
        return win, win.judge(judging)

    def judge(self, pairs: EncodedPairs) -> dict[str, Any]:
        """Set the guard's margin on pairs that the model has not seen; give what they say of it, as JSON values.

        The margin is of the difference of b between two candidates that have only each other for opponents.
        """
        score = pair_scores(self.model, pairs)
        batch = pairs.gather(torch.arange(len(pairs)))
        gap = torch.tanh(score / 2)  # P - P'
        order = confirmed((2 * batch.probability - 1) * torch.sign(gap), pairs.group, batch.weight)
        self.margin.fill_(confirmed_margin(gap, batch.weight, batch.probability) if order else math.inf)
        found = reliability(score, batch.probability, batch.weight)
        return {
            "accuracy": found.accuracy,
            "log_loss": found.log_loss,
            "ece": found.ece,
            "z": order.z,
            "network_kept": None,
            "preference": type(self.model).__name__,
        }

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Give logit b (B,) of outputs y (B, D) under contexts (B, C) or None."""
        chances = [y.new_zeros(0)]
        for at in range(0, len(y), ROWS):
            rows = slice(at, at + ROWS)
            chances.append(self._chance(y[rows], None if context is None else context[rows]))
        return torch.logit(torch.cat(chances), eps=FLOOR)

    def _chance(self, y: Tensor, context: Tensor | None) -> Tensor:
        if context is None or context.shape[1] == 0:
            return self._mean(y, None, self.draws)
        scale = self.context_spread
        apart = torch.cdist(context / scale, self.draw_contexts / scale)
        near = apart.topk(min(NEAREST, len(self.draws)), dim=1, largest=False).indices
        if self.model.context_dimension == 0:  # every draw is embedded once
            theirs = self.model.embed(self.draws, None)
            chance = torch.sigmoid(self.model.embed(y, None).against_all(theirs))
            return chance.gather(1, near).mean(1)
        return self._mean(y, context, self.draws[near])

    def _mean(self, y: Tensor, context: Tensor | None, opponents: Tensor) -> Tensor:
        """Give the mean chance (B,) against opponents (M, D), or (B, M, D) under contexts (B, C)."""
        mine = self.model.embed(y, context)
        if opponents.ndim == 2:
            return torch.sigmoid(mine.against_all(self.model.embed(opponents, None))).mean(1)
        assert context is not None
        count = opponents.shape[1]
        flat = self.model.embed(opponents.flatten(0, 1), context.repeat_interleave(count, 0))
        theirs = Embedded(*(part.unflatten(0, (-1, count)) for part in (flat.reward, flat.planes)))
        return torch.sigmoid(mine[:, None].against(theirs)).mean(1)

    def describe(self) -> dict[str, Any]:
        """Give, as JSON values, all but the tensors."""
        return {"model": self.model.describe(), "draws": len(self.draws)}

    @classmethod
    def restored(cls, described: dict[str, Any], dimension: int, context_dimension: int) -> PreferenceWin:
        """Make what :meth:`describe` told of, its tensors still to be loaded."""
        return cls(restored(described["model"]), dimension, context_dimension, int(described["draws"]))


@torch.no_grad()
def candidate_wins(model: PreferenceModel, y: Any, context: Any = None) -> Tensor:
    """Give each candidate's mean chance (n,) against the other candidates y (n, \\*D) of one prompt, n >= 2."""
    chance = torch.sigmoid(model.table(y, context))
    count = len(chance)
    if count < 2:
        raise ValueError(f"y must hold at least two candidates, each other's opponents: got {count}")
    return (chance.sum(1) - chance.diagonal()) / (count - 1)


def rescored(pairs: EncodedPairs, model: PreferenceModel) -> EncodedPairs:
    """Score the candidate sets of pairs by each candidate's mean chance against the others of its set.

    With cycles "the best of m" is then the one that does best against all of the set, which no cycle makes ambiguous.
    Pairs without candidate sets are returned as they are.
    """
    if not pairs.candidates:
        return pairs
    found = pairs.select(torch.arange(len(pairs)))
    found.candidates = []
    for entry in pairs.candidates:
        context = pairs.context_rows(torch.tensor([entry.context_index]))
        scores = entry.scores
        if len(entry.rows) > 1:
            scores = candidate_wins(model, pairs.output_rows(entry.rows), context).cpu()
        found.candidates.append(CandidateRows(entry.context_index, entry.rows, scores))
    return found

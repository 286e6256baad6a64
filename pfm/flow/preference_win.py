"""b(y|x) from a preference model: the mean chance of y against opponents, cyclic preferences included.

What is defined for cyclic preferences, and what is not:

- b(y|x) = E over y' ~ pi_ref of P(y > y' | x) is defined for any preference, and so are the winners' distribution
  p1 = 2 pi_ref b, the gate, one pass of a flow, and choosing the candidate that does best against the others;
- "the best output" is not: the candidate of highest b may lose to another candidate (it is the Borda winner, not a
  Condorcet winner, which need not exist), and b changes with the opponents;
- rounds of labels need not converge. Each round beats the one before, and under a reward every later round beats every
  earlier one by at least as much; with cycles it need not (:mod:`pfm.flow.rounds`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pfm._internal.significance import confirmed
from pfm.data.batches import CandidateRows
from pfm.data.encoded import EncodedPairs
from pfm.flow.win import confirmed_margin
from pfm.preferences.base import Embedded, PreferenceModel, restored
from pfm.preferences.calibration import pair_scores, reliability
from pfm.preferences.context_mean import ContextMean

__all__ = ["PreferenceWin", "candidate_wins", "rescored"]

DRAWS = 512  # reference draws that are kept; with contexts both members of as many pairs
POOLED = 8.0  # draws of the context itself that all others together are worth
LEVELS = 3  # times that the contexts' levels are corrected
FITTED = 20_000  # pairs that the contexts' levels are fitted on
FLOOR = 1e-6  # of a probability, before its log-odds are taken
ROWS = 512


class PreferenceWin(nn.Module):
    """Gives logit b(y|x) by a fitted preference model, against reference draws that are kept with it.

    It stands where :class:`pfm.flow.win.WinHead` does. Without contexts all draws are the opponents. With contexts
    pi_ref depends on x, and few draws are of x itself. Each draw is then judged under its own context, and carried over
    to another by the difference of the contexts' levels: with a level m(x) in log-odds (:class:`ContextMean`), draw k
    answers y with s(y, y_k) - m(x) + m(x_k), so that the mean of b over the reference is one half under every context.
    Draws of the context itself, and of near ones, count for more than the others.

    Args:
        model: the preference model.
        dimension, context_dimension: of outputs and contexts.
        draws: number of reference draws.
        anchors: number of contexts that their levels are known by.
    """

    draws: Tensor
    draw_contexts: Tensor
    draw_levels: Tensor
    margin: Tensor

    def __init__(
        self, model: PreferenceModel, dimension: int, context_dimension: int, draws: int, anchors: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        for name, value in {
            "draws": torch.zeros(draws, dimension),
            "draw_contexts": torch.zeros(draws, context_dimension),
            "draw_levels": torch.zeros(draws),
            "margin": torch.tensor(math.inf),
        }.items():
            self.register_buffer(name, value)
        self.level = ContextMean(context_dimension, anchors)

    @classmethod
    def made(
        cls, model: PreferenceModel, pairs: EncodedPairs, judging: EncodedPairs, seed: int = 0
    ) -> tuple[PreferenceWin, dict[str, Any]]:
        """Keep reference draws of ``pairs``, and set the guard on ``judging``, on the CPU; return both.

        One member of every pair, picked uniformly at random, is a draw of the reference; with contexts both members
        are, with half the weight each, so that the draws of one context are balanced.

        Raises:
            TypeError: not a preference model. ValueError: it was fitted on outputs of another size.
        """
        if not isinstance(model, PreferenceModel):  # pyright: ignore[reportUnnecessaryIsInstance]
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
        model = copy.deepcopy(model).cpu()  # the caller's may be fitted anew, or moved
        pairs = pairs.to("cpu")
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(pairs), generator=generator, device="cpu")[:DRAWS]
        contexts = pairs.contexts_of(index)
        if contexts is None:
            win = cls(model, pairs.dimension, 0, len(index))
            member = torch.randint(2, (len(index),), generator=generator, device="cpu")
            win.draws.copy_(pairs.members(2 * index + member))
        else:
            win = cls(model, pairs.dimension, pairs.context_dimension, 2 * len(index))
            win.draws.copy_(torch.cat([pairs.members(2 * index), pairs.members(2 * index + 1)]))
            win.draw_contexts.copy_(contexts.repeat(2, 1))
            win._fit_levels(pairs, generator)
        return win, win.judge(judging)

    def judge(self, pairs: EncodedPairs) -> dict[str, Any]:
        """Set the guard's margin on pairs that the model has not seen; give what they say of it, as JSON values.

        The margin is of the difference of b between two candidates that have only each other for opponents.
        """
        score = pair_scores(self.model, pairs)
        batch = pairs.to("cpu").gather(torch.arange(len(pairs), device="cpu"))
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

    @torch.no_grad()
    def _fit_levels(self, pairs: EncodedPairs, generator: torch.Generator) -> None:
        """Fit the contexts' levels so that b of both members of the pairs is one half on the mean of every context."""
        index = torch.randperm(len(pairs), generator=generator, device="cpu")[:FITTED]
        batch, group = pairs.gather(index), pairs.group[index]
        assert batch.context is not None
        if not float(batch.weight.sum()) > 0:
            return
        context = batch.context if self.model.context_dimension else None
        chosen, rejected = (self.model.embed(side, context) for side in (batch.chosen, batch.rejected))
        # Log-odds are linear in the opponent's embedding: against the mean embedding they are the mean log-odds.
        share = (batch.weight / batch.weight.sum())[:, None]
        mean = Embedded(
            ((chosen.reward + rejected.reward)[:, None] / 2 * share).sum(0),
            ((chosen.planes + rejected.planes) / 2 * share).sum(0, keepdim=True),
        )
        value = (chosen.against(mean) + rejected.against(mean)) / 2
        for number in range(LEVELS + 1):
            level = self.level.fit(batch.context, value, batch.weight, group, torch.Generator().manual_seed(0))
            self.draw_levels.copy_(self.level(self.draw_contexts))
            if number == LEVELS:
                return
            b = [torch.sigmoid(self(side, batch.context)) for side in (batch.chosen, batch.rejected)]
            # A step of Newton's method towards a mean of one half, at the slope that b has there.
            value = level + 2 * (b[0] + b[1] - 1)

    def upgraded(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Complete the tensors of a flow saved before contexts had levels: there all have the same."""
        if f"{prefix}context_spread" not in tensors:
            return tensors
        ours = {f"{prefix}draw_levels": self.draw_levels}
        ours |= {f"{prefix}level.{name}": value for name, value in self.level.state_dict().items()}
        return ours | {name: value for name, value in tensors.items() if name != f"{prefix}context_spread"}

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return logit b (B,) of outputs y (B, D) under contexts (B, C) or None."""
        reads = self.model.context_dimension > 0
        theirs = self.model.embed(self.draws, self.draw_contexts if reads else None)
        chances = [y.new_zeros(0)]
        for at in range(0, len(y), ROWS):
            rows = slice(at, at + ROWS)
            chances.append(self._chance(y[rows], None if context is None else context[rows], theirs))
        return torch.logit(torch.cat(chances), eps=FLOOR)

    def _chance(self, y: Tensor, context: Tensor | None, theirs: Embedded) -> Tensor:
        """Return the mean chance (B,) against the draws' embeddings."""
        if context is None or context.shape[1] == 0:
            return torch.sigmoid(self.model.embed(y, None).against_all(theirs)).mean(1)
        mine = self.model.embed(y, context if self.model.context_dimension else None)
        score = mine.against_all(theirs) - self.level(context)[:, None] + self.draw_levels
        near = self.level.nearness(context, self.draw_contexts) + POOLED / len(self.draws)
        return (torch.sigmoid(score) * near).sum(1) / near.sum(1)

    def describe(self) -> dict[str, Any]:
        """Give, as JSON values, all but the tensors."""
        return {"model": self.model.describe(), "draws": len(self.draws), "anchors": len(self.level.anchors)}

    @classmethod
    def restored(cls, described: dict[str, Any], dimension: int, context_dimension: int) -> PreferenceWin:
        """Build from the result of :meth:`describe`; the tensors are loaded afterwards."""
        anchors = int(described.get("anchors", 0))
        return cls(restored(described["model"]), dimension, context_dimension, int(described["draws"]), anchors)


@torch.no_grad()
def candidate_wins(model: PreferenceModel, y: Any, context: Any = None) -> Tensor:
    """Return each candidate's mean chance (n,) against the other candidates y (n, \\*D) of one prompt, n >= 2."""
    chance = torch.sigmoid(model.table(y, context))
    count = len(chance)
    if count < 2:
        raise ValueError(f"y must hold at least two candidates, each other's opponents: got {count}")
    return (chance.sum(1) - chance.diagonal()) / (count - 1)


def rescored(pairs: EncodedPairs, model: PreferenceModel) -> EncodedPairs:
    """Score the candidate sets of pairs by each candidate's mean chance against the others of its set.

    With cycles "the best of m" is then the one that does best against all of the set, which no cycle makes ambiguous.
    Pairs without candidate sets are returned unchanged.
    """
    if not pairs.candidates:
        return pairs
    found = pairs.select(torch.arange(len(pairs), device="cpu"))
    found.candidates = []
    for entry in pairs.candidates:
        context = pairs.context_rows(torch.tensor([entry.context_index], device="cpu"))
        scores = entry.scores
        if len(entry.rows) > 1:
            scores = candidate_wins(model, pairs.output_rows(entry.rows), context)
        found.candidates.append(CandidateRows(entry.context_index, entry.rows, scores))
    return found

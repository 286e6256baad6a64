"""Ties: how often two outputs are judged equal, by the log-odds that a preference model gives them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfm._internal.checks import as_float_tensor, check_choice, check_finite, check_shape
from pfm.data.votes import check_counts

__all__ = ["TieModel"]


class TieModel:
    """Gives the probabilities of first, tie and second from log-odds s of any preference model.

    - "davidson" (Davidson 1970): proportional to exp(a s / 2), nu, exp(-a s / 2);
    - "rao-kupper" (Rao & Kupper 1967): P(first) = sigmoid(a s - h), P(second) = sigmoid(-a s - h), the rest a tie.

    A tie is half a win of either: P(first) + P(tie) / 2, which is also what a model fitted to shares of votes, ties
    half, estimates. In Davidson's model the likelihood's slope in the log-odds is exactly share - (P(first) +
    P(tie) / 2), so that half votes lose nothing there.

    Args:
        kind: "davidson" or "rao-kupper".

    Attributes:
        slope: a >= 0, how much of the log-odds is borne out.
        width: nu or h >= 0; 0 when nothing ties.
    """

    def __init__(self, kind: str = "davidson") -> None:
        check_choice("kind", kind, ("davidson", "rao-kupper"))
        self.kind = kind
        self.slope = 1.0
        self.width = 0.0

    def fit(self, score: Any, first: Any, second: Any, tie: Any = None) -> TieModel:
        """Fit slope and width by maximum likelihood, with log-odds of a model that did not see these votes.

        Half a vote for either side, on a pair as far apart as the usual one, is added: few votes make nothing certain.

        Args:
            score: (N,) log-odds that the first output is preferred.
            first, second, tie: (N,) votes.

        Raises:
            ValueError: shapes disagree, a value is not finite, a pair has no votes, or all votes are ties.
        """
        one, two, undecided = check_counts(first, second, tie)
        s = as_float_tensor("score", score).double()
        check_shape("score", s, (len(one),), "one a pair")
        check_finite("score", s)
        ties = float(undecided.sum())
        spread = float(s.abs().mean()) or 1.0
        # At scores of 0 both models have one width that gives ties their share; the search starts there.
        share = max(ties, 0.5) / float((one + two + undecided).sum() + 0.5)
        nu = 2 * share / (1 - share)
        begin = math.log(nu) if self.kind == "davidson" else math.log(max(math.log((1 + share) / (1 - share)), 1e-6))
        at = torch.tensor([0.1, begin], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([at], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)
        votes = torch.stack([one, undecided, two], 1)
        total = float(votes.sum())
        nothing = torch.zeros(1, dtype=torch.float64)

        def loss() -> Tensor:
            solver.zero_grad()
            log_width = at[1] if ties else torch.full((), -math.inf, dtype=torch.float64)
            each = _log_chances(self.kind, at[0] * s / spread, log_width)
            kept = torch.where(votes > 0, votes * each, 0.0).sum()
            guard = _log_chances(self.kind, nothing + at[0], log_width)[0, [0, 2]].sum() / 2
            value = -(kept + guard) / total
            value.backward()
            return value

        solver.step(loss)  # pyright: ignore[reportArgumentType]
        self.slope = max(float(at[0].detach()) / spread, 0.0)
        self.width = math.exp(float(at[1].detach())) if ties else 0.0
        return self

    def probabilities(self, score: Any) -> Tensor:
        """Return P(first), P(tie), P(second), (N, 3), for log-odds (N,)."""
        s = as_float_tensor("score", score)
        width = torch.tensor(self.width, dtype=torch.float64).log()
        return _log_chances(self.kind, self.slope * s.double(), width).exp().to(s.dtype)

    def win_probability(self, score: Any) -> Tensor:
        """Return P(first) + P(tie) / 2, (N,), for log-odds (N,): the b of a pair, a tie half."""
        chances = self.probabilities(score)
        return chances[:, 0] + chances[:, 1] / 2


def _log_chances(kind: str, score: Tensor, log_width: Tensor) -> Tensor:
    """Return log P(first), log P(tie), log P(second), (N, 3)."""
    if kind == "davidson":
        each = torch.stack([score / 2, log_width.expand_as(score), -score / 2], 1)
        return torch.log_softmax(each, 1)
    width = log_width.exp()
    first, second = logsigmoid(score - width), logsigmoid(-score - width)
    # 1 - P(first) - P(second) = (e^2h - 1) P(first) P(second).
    return torch.stack([first, torch.expm1(2 * width).log() + first + second, second], 1)

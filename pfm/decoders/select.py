"""Select one of the candidates that the generator has drawn."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pfm._internal.checks import check_choice, check_number, check_seed
from pfm.data.outputs import first_equal, same_output
from pfm.protocols import Decoder, Flow

__all__ = ["Decoder", "Judged", "Select", "Selection"]

RULES = ("win_probability", "alignment", "sample", "combined")
# Below this distance from 0 and 1 the log-odds of b say nothing that held-out pairs could confirm.
LOGIT_FLOOR = 1e-6


@dataclass(frozen=True)
class Selection:
    """The candidate that a decoder has settled on.

    Attributes:
        index: its place among the candidates, which ``added`` continues; 0 is the original.
        changed: whether its text differs from the original's.
        scores: one number a candidate by which the decoder judged, higher is better.
        reason: why the original was kept or changed, in one phrase.
        added: texts that the decoder itself has made, all of them usable candidates.
        added_probabilities: b(y|x) of each of them.
        added_tags: the name of the generator that made each of them; empty where there is only one.
        calls, usage: calls of the generator, and tokens by kind where they are known, that making them took.
        trace: what the decoder did, round by round, in JSON values; None if there are none.
        error: type and message of what failed while it did so, or None; the selection is sound all the same.
    """

    index: int
    changed: bool
    scores: list[float]
    reason: str
    added: tuple[str, ...] = ()
    added_probabilities: tuple[float, ...] = ()
    added_tags: tuple[str, ...] = ()
    calls: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    trace: list[dict[str, Any]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Judged:
    """The judged candidates of one prompt: what a decoder sees.

    Attributes:
        prompt: as it was given, text or messages.
        key: its text, from which anything random must be derived.
        candidates: n ≥ 1 texts; the first is the original.
        vectors: (n, D) their embeddings, finite.
        context: (C,) embedding of the prompt, or None when the flow takes no context.
        probabilities: (n,) float64, b(y|x) of each, in [0, 1].
        reasoning: "strip" where vectors and b are those of the answers after hidden reasoning, else "keep".
    """

    prompt: Any
    key: str
    candidates: list[str]
    vectors: torch.Tensor
    context: torch.Tensor | None
    probabilities: np.ndarray
    reasoning: str = "strip"


class Select:
    """Choose the best candidate, or sample one, with a guard that keeps the original when in doubt.

    ===================  ===========================================================================
    ``by``               score; the highest wins, a tie keeps the original, then the lowest index
    ===================  ===========================================================================
    ``win_probability``  b(y|x): best of n
    ``alignment``        how far the candidate lies along the flow's displacement
    ``combined``         mean of log-odds of b and alignment, each standardised over the candidates
    ``sample``           none: one is drawn with probability ∝ b(y|x)^strength
    ===================  ===========================================================================

    With n candidates from π_ref, drawing ∝ b is importance resampling to the winners' distribution p₁ = 2·π_ref·b,
    so the guard, which would distort it, does not apply to ``sample``. The draw depends on the seed and
    on the prompt's text alone: it is the same in any batch, and the same again tomorrow.

    Args:
        by: one of the above.
        margin: change the original only if b rises by at least this much (with a preference model: P − P' of the
            two outputs). None takes ``flow.guard_margin``, which is set on held-out pairs at the end of a fit;
            ``inf`` never changes; 0 lets alignment change the output whenever b does not fall; -1 switches the
            guard off.
        strength: exponent of b in ``sample``: 0 draws uniformly, 1 targets p₁, above 1 sharpens.
        seed: seed of ``sample``.

    Raises:
        ValueError: an unknown ``by``, a margin that is NaN, or a strength that is negative or not finite.

    >>> import numpy as np
    >>> select = Select(margin=0.1)
    >>> b = np.array([0.4, 0.7])
    >>> select.decode(None, ["a draft", "an answer"], torch.zeros(2, 1), None, b, "key").reason
    'changed: highest win probability, win probability +0.300'
    """

    def __init__(
        self,
        by: str = "win_probability",
        margin: float | None = None,
        *,
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        seed = check_seed(seed)
        check_choice("by", by, RULES)
        if margin is not None and math.isnan(margin):
            raise ValueError("margin must be a number or None (the flow's own guard margin), got nan")
        strength = check_number("strength", strength, least=0)
        if strength != 1 and by != "sample":
            warnings.warn(
                f"strength={strength} has no effect with by={by!r}: the highest score stays the highest; "
                'use by="sample"',
                stacklevel=2,
            )
        self.by = by
        self.margin = margin
        self.strength = strength
        self.seed = seed

    def __repr__(self) -> str:
        return f"Select(by={self.by!r}, margin={self.margin}, strength={self.strength}, seed={self.seed})"

    def decode(
        self,
        flow: Flow,
        candidates: Sequence[str],
        vectors: torch.Tensor,
        context: torch.Tensor | None,
        probabilities: np.ndarray,
        key: str,
    ) -> Selection:
        """Choose among the candidates of one prompt; see :meth:`Decoder.decode`."""
        if all(same_output(candidate, candidates[0]) for candidate in candidates):
            reason = "only one candidate" if len(candidates) == 1 else "all candidates are the same text"
            return Selection(0, False, probabilities.tolist(), f"kept the original: {reason}")
        if self.by == "sample":
            return self._sample(candidates, probabilities, key)

        scores = self._scores(flow, vectors, context, probabilities)
        # A repeated original counts as the original.
        best = first_equal(candidates, int(np.argmax(scores)))
        if best == 0:
            return Selection(0, False, scores.tolist(), f"kept the original: highest {self._score_name}")
        margin = flow.guard_margin if self.margin is None else self.margin
        gain = _gain(flow, vectors, context, probabilities, best)
        if gain >= margin:
            reason = f"changed: highest {self._score_name}, win probability {gain:+.3f}"
            return Selection(best, True, scores.tolist(), reason)
        if margin == math.inf:
            reason = "kept the original: the guard margin is infinite, no held-out gain was confirmed"
        else:
            reason = f"kept the original: win probability {gain:+.3f} is below the guard margin {margin:.3f}"
        return Selection(0, False, scores.tolist(), reason)

    @property
    def _score_name(self) -> str:
        return {"combined": "combined score"}.get(self.by, self.by.replace("_", " "))

    def _scores(
        self, flow: Flow, vectors: torch.Tensor, context: torch.Tensor | None, probabilities: np.ndarray
    ) -> np.ndarray:
        if self.by == "win_probability":
            return probabilities
        alignment = flow.alignment(vectors, context).detach().cpu().double().numpy()
        if self.by == "alignment":
            return alignment
        clipped = probabilities.clip(LOGIT_FLOOR, 1 - LOGIT_FLOOR)
        log_odds = np.log(clipped) - np.log1p(-clipped)
        return (_standardised(log_odds) + _standardised(alignment)) / 2

    def _sample(self, candidates: Sequence[str], probabilities: np.ndarray, key: str) -> Selection:
        weights = probabilities**self.strength
        total = weights.sum()
        if total == 0:
            return Selection(0, False, weights.tolist(), "kept the original: all win probabilities are 0")
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode(errors="surrogatepass")).digest()
        # 53 bits fill a double: a uniform number in [0, 1) without the cost of a generator for each prompt.
        uniform = (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
        drawn = int(np.searchsorted(np.cumsum(weights), uniform * total, side="right"))
        drawn = min(drawn, len(candidates) - 1)  # the last sum may fall short of the total by rounding
        index = first_equal(candidates, drawn)
        verb = "changed" if index else "kept the original"
        return Selection(
            index,
            index != 0,
            weights.tolist(),
            f"{verb}: drawn in proportion to win probability ({weights[drawn] / total:.3f})",
        )


def _gain(
    flow: Flow, vectors: torch.Tensor, context: torch.Tensor | None, probabilities: np.ndarray, best: int
) -> float:
    """Return by how much the best candidate beats the original, in the unit of the guard margin.

    With a preference model that is P - P' of these two. The difference of their mean chances against the other
    candidates, of which the original is one, would depend on how many there are.
    """
    model = getattr(flow, "preference", None)
    if model is None:
        return float(probabilities[best] - probabilities[0])
    return float(torch.tanh(model.score(vectors[best][None], vectors[0][None], context) / 2))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Shift to mean 0 and scale to standard deviation 1; all zero where the values do not differ."""
    deviation = values.std()
    if deviation <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return np.zeros_like(values)
    return (values - values.mean()) / deviation

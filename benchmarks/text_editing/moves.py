"""Where each method moves the drafts' embeddings: flows, the mean shift, and gradient ascent on b."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from pfm import EncodedPairs, FlowConfig, PreferenceFlow

__all__ = ["ascent", "fit_flows", "moves", "pair_rows", "preference_pairs", "shift"]

CANDIDATES = 8  # sentences of a set, of which the best one is a target
STRENGTHS = (1.0, 2.0, 4.0, 8.0)
ASCENT_STEP = 0.02  # of the unit sphere's radius
ASCENT_STEPS = (10, 20, 30, 40, 50, 60)


def preference_pairs(vectors: Tensor, scores: Tensor, seed: int, *, sets: bool) -> EncodedPairs:
    """Make pairs of sentences drawn at random, of which the one with the higher score is preferred.

    Args:
        vectors: (N, D). scores: (N,).
        seed: of the draw.
        sets: also give the sets of eight that targets beyond best of two are drawn from.
    """
    groups, chosen, rejected = pair_rows(scores, seed)
    number = torch.arange(len(groups)).repeat_interleave(CANDIDATES // 2)
    candidates = [(place, rows, scores[rows]) for place, rows in enumerate(groups)] if sets else None
    return EncodedPairs.from_table(vectors, chosen, rejected, group=number, candidates=candidates)


def pair_rows(scores: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sets of eight rows and pairs within them; return the sets (S, 8), and the pairs' chosen and rejected rows.

    Args:
        scores: (N,), the higher one of a pair is chosen. seed: of the draw.
    """
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    groups = order[: len(order) // CANDIDATES * CANDIDATES].view(-1, CANDIDATES)
    first, second = groups[:, ::2].flatten(), groups[:, 1::2].flatten()
    wins = scores[first] > scores[second]
    return groups, torch.where(wins, first, second), torch.where(wins, second, first)


def fit_flows(vectors: Tensor, scores: Tensor, base: FlowConfig, seed: int) -> dict[str, PreferenceFlow]:
    """Fit the flows that are compared, and two controls: shuffled scores, and negated scores."""

    def fit(scored: Tensor, best_of: int = 2, source: str = "reference") -> PreferenceFlow:
        pairs = preference_pairs(vectors, scored, seed, sets=best_of > 2)
        return PreferenceFlow.fit(pairs, base.replace(best_of=best_of, source=source, seed=seed), progress=False)

    shuffled = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(1000 + seed))]
    return {
        "flow": fit(scores),
        "flow best-of-8": fit(scores, best_of=8),
        "flow rejected": fit(scores, source="rejected"),
        "shuffled labels": fit(shuffled, best_of=8),
        "swapped labels": fit(-scores, best_of=8),
    }


def shift(pairs: EncodedPairs) -> Tensor:
    """Return the mean of y+ - y-, (D,)."""
    return (pairs.chosen - pairs.rejected).mean(0)


def ascent(rating: Callable[[Tensor], Tensor], y: Tensor) -> dict[float, Tensor]:
    """Climb log b on the unit sphere in steps of equal length; return the places by length of the path."""
    found: dict[float, Tensor] = {}
    for step in range(1, max(ASCENT_STEPS) + 1):
        y = y.detach().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(logsigmoid(rating(y)).sum(), y)
        y = normalize(y.detach() + ASCENT_STEP * normalize(slope, dim=1), dim=1)
        if step in ASCENT_STEPS:
            found[round(step * ASCENT_STEP, 3)] = y
    return found


def moves(flows: dict[str, PreferenceFlow], pairs: EncodedPairs, z: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the points (N, D) that each setting of each method moves z (N, D) to, on the unit sphere."""
    found = {"copy": z}
    for name in ("flow", "flow best-of-8", "flow rejected"):
        for strength in STRENGTHS[: 4 if name == "flow" else 3]:
            found[f"{name} x{strength:g}"] = flows[name].transport(z, strength=strength)
    for slope in (8.0, 32.0):
        found[f"flow best-of-8 gradient {slope:g}"] = flows["flow best-of-8"].transport(z, win_gradient=slope)
    for length, y in ascent(lambda rows: flows["flow"].win(rows, None), z).items():
        found[f"ascent {length:g}"] = y
    direction = shift(pairs)
    for strength in STRENGTHS:
        found[f"mean shift x{strength:g}"] = normalize(z + strength * direction, dim=1)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    found["permuted points"] = found["flow best-of-8 x2"][order]
    for strength in (2.0, 4.0):
        found[f"shuffled labels x{strength:g}"] = flows["shuffled labels"].transport(z, strength=strength)
    found["swapped labels x2"] = flows["swapped labels"].transport(z, strength=2.0)
    return found

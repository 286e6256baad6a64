"""What an edit is worth: wins against independent draws, content kept, fluency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pfm.statistics import Bootstrap, Estimate

__all__ = ["Perplexity", "best_of", "estimates", "read_out", "wins"]

Array = NDArray[np.float64]


def read_out(distances: Array, b: Array, b_before: Array, margin: float) -> NDArray[np.int64]:
    """Choose for each draft the edit nearest to its point among those that the guard on b allows.

    Args:
        distances: (N, k) of the edits' vectors from the point. b: (N, k) of the edits. b_before: (N,) of the drafts.
        margin: by which b must rise.

    Returns:
        (N,) place of the edit; -1 where no edit is allowed, so that the draft stays.
    """
    allowed = b >= b_before[:, None] + margin
    place = np.where(allowed, distances, np.inf).argmin(1)
    return np.where(allowed.any(1), place, -1)


def wins(scores: ArrayLike, draws: ArrayLike) -> Array:
    """Return for each score (N,) the share of draws (M,) below it, ties half."""
    ordered = np.sort(np.asarray(draws, np.float64))
    values = np.asarray(scores, np.float64)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def best_of(labels: Array, scores: Array, n: int, count: int, seed: int) -> Array:
    """Return the second judge's scores (count,) of the draw that the first judge likes best of n."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, len(labels), (count, n))
    return scores[groups[np.arange(count), labels[groups].argmax(1)]]


def estimates(
    scores: Array,
    before: Array,
    draws: Array,
    cosine: Array,
    same: NDArray[np.bool_],
    loss: Array | None,
    tokens: Array | None,
) -> dict[str, Estimate | None]:
    """Return the figures of one setting, with intervals over drafts.

    Args:
        scores, before: (N,) log-odds of the independent judge, of the edits and of the drafts.
        draws: (M,) of independent sentences.
        cosine: (N,) of edit and draft. same: (N,) whether they are the same text.
        loss, tokens: (N,) negative log-likelihood of the edits in nats, and their numbers of tokens.
    """
    bootstrap = Bootstrap(len(scores))
    found: dict[str, Estimate | None] = {
        "win": bootstrap.mean(wins(scores, draws), (0.0, 1.0)),
        "gain": bootstrap.mean(scores - before),
        "cosine": bootstrap.mean(cosine, (-1.0, 1.0)),
        "same": bootstrap.mean(same.astype(np.float64), (0.0, 1.0)),
    }
    if loss is not None and tokens is not None and (nats := bootstrap.ratio(loss, tokens)) is not None:
        found["perplexity"] = Estimate(*(float(np.exp(part)) for part in (nats.value, nats.low, nats.high)))
    return found


class Perplexity:
    """Measures texts by the base SmolLM2, which the editor's adapters are not part of.

    It is not independent of an editor that was trained from it: where one is, a text that it likes is likelier to be
    written.
    """

    def __init__(self, device: Any = "cpu") -> None:
        from pfm.decoders.editing.language_model import load_base

        self.model, self.tokenizer = load_base(device=device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> tuple[Array, Array]:
        """Return the negative log-likelihood (N,) of each text in nats, and its number of tokens (N,)."""
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        loss = np.zeros(len(rows))
        start = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            width = max(1, max(len(rows[place]) for place in places))
            given = torch.full((len(places), width), start, dtype=torch.long)
            wanted = torch.full((len(places), width), -100)
            for number, place in enumerate(places):
                ids = torch.tensor(rows[place], dtype=torch.long)
                given[number, 1 : len(ids)] = ids[:-1]
                wanted[number, : len(ids)] = ids
            loss[places] = self._loss(given, wanted).sum(1).cpu().numpy()
        return loss, np.array([float(len(row)) for row in rows])

    def _loss(self, given: Tensor, wanted: Tensor) -> Tensor:
        logits = self.model(input_ids=given.to(self.model.device), use_cache=False).logits.float()
        wanted = wanted.to(logits.device)
        flat: Callable[..., Tensor] = torch.nn.functional.cross_entropy
        return flat(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-100).view(wanted.shape)

"""The rival that needs no flow: the base model rewrites a draft, shown pairs of which one sentence is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfm import PreferenceFlow

__all__ = ["FewShot", "chosen_by_b", "cleaned", "examples", "few_shot_turns"]

ASKED = (
    "Rewrite this sentence from a review of a film so that people prefer it. Keep what it is about. Reply with the "
    "sentence alone.\n\nSentence: {text}"
)
NEAR = 0.7  # cosine with the draft that the careful choice asks for
MOST_TOKENS = 48


def examples(drafts: Tensor, chosen: Tensor, rejected: Tensor, count: int) -> list[list[int]]:
    """Choose for each draft the pairs to show, the best last: near the draft, and near each other.

    Args:
        drafts: (N, D) unit vectors. chosen, rejected: (P, D) unit vectors of the pairs.
        count: pairs a draft.

    Returns:
        the pairs' numbers with the largest sum of the cosines of draft and rejected, and of rejected and chosen.
    """
    closeness = drafts @ rejected.T + (chosen * rejected).sum(1)
    return closeness.topk(min(count, len(chosen)), dim=1).indices.flip(1).tolist()


def few_shot_turns(draft: str, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Write the conversation: each pair (rejected, chosen) as a request and its answer, then the draft."""
    turns: list[dict[str, str]] = []
    for rejected, chosen in pairs:
        turns += [{"role": "user", "content": ASKED.format(text=rejected)}, {"role": "assistant", "content": chosen}]
    return [*turns, {"role": "user", "content": ASKED.format(text=draft)}]


def cleaned(text: str) -> str:
    """Return the first line that says something, without what names it and without quotes around it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.removeprefix("Sentence:").strip().strip('"“”').strip()


class FewShot:
    """Draws rewrites of each draft, as many as the editor writes, and chooses among them by b.

    Args:
        shots: pairs that are shown. samples: rewrites a draft. seed: of the draws.
        generator: in place of the bundled SmolLM2, which the editor is made from.
    """

    def __init__(self, shots: int, samples: int, seed: int, generator: Any = None) -> None:
        from pfm.generators import bundled

        self.shots, self.samples = shots, samples
        self.generator = bundled(seed=seed, max_new_tokens=MOST_TOKENS) if generator is None else generator

    def __call__(
        self, drafts: Sequence[str], z: Tensor, pairs: Sequence[tuple[str, str]], chosen: Tensor, rejected: Tensor
    ) -> list[list[str]]:
        """Return the rewrites of each draft; a draw that fails, or says nothing, is the draft itself.

        Args:
            drafts: N texts, of vectors z (N, D). pairs: texts (rejected, chosen), of vectors (P, D) each.
        """
        shown = examples(z, chosen, rejected, self.shots)
        prompts = [few_shot_turns(draft, [pairs[n] for n in own]) for draft, own in zip(drafts, shown, strict=True)]
        written = []
        for draft, draw in zip(drafts, self.generator.draws(prompts, self.samples), strict=True):
            texts = [cleaned(text) or draft for text in draw.texts]
            written.append([*texts, *[draft] * (self.samples - len(texts))])
        return written


def chosen_by_b(flow: PreferenceFlow, z: Tensor, found: Tensor, margin: float) -> dict[str, NDArray[np.int64]]:
    """Return, for each way to choose, the place of the rewrite of each draft; -1 where the draft stays.

    Args:
        flow: gives b. z: (N, D) of the drafts. found: (N, k, D) of the rewrites.
        margin: by which b must rise, the guard's.
    """
    before = flow.win_probability(z).double()
    b = flow.win_probability(found.flatten(0, 1)).view(found.shape[:2]).double()
    allowed = b >= before[:, None] + margin
    near = torch.cosine_similarity(found, z[:, None], dim=2) >= NEAR
    places = {"few-shot, 1 call": torch.zeros(len(z), dtype=torch.long)}
    for name, open_ones in ((f"few-shot, best of {b.shape[1]} by b", allowed),
                            (f"few-shot, best of {b.shape[1]} by b, near", allowed & near)):  # fmt: skip
        best = torch.where(open_ones, b, -torch.inf).argmax(1)
        places[name] = torch.where(open_ones.any(1), best, -1)
    return {name: place.numpy() for name, place in places.items()}

"""An encoder that counts letters, and a flow that prefers one of them: selections worked out by hand."""

from __future__ import annotations

import torch

from pfm.refiner import wrap

DIMENSION = 6


class LetterEncoder:
    """Encode a text by the counts of a few letters and its length: small, deterministic, readable."""

    dimension = DIMENSION

    def __init__(self):
        self.encoded: list[list[str]] = []

    def encode(self, texts, *, progress=False):
        self.encoded.append(list(texts))
        rows = [[text.count(letter) for letter in "abcde"] + [len(text) / 10] for text in texts]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(texts), DIMENSION)

    def describe(self):
        return {"name": "letters", "revision": "1", "dimension": DIMENSION}


class LinearFlow:
    """Prefer texts with many "a"; with a context, prefer "a" only where the prompt holds a "b".

    b = sigmoid(2 · a · sign), and the displacement points along "c", so that alignment and b can disagree.
    """

    def __init__(self, context_dimension=None, guard_margin=0.0, encoder=None):
        self.guard_margin = guard_margin
        self.metadata = {"dimension": DIMENSION, "context_dimension": context_dimension, "encoder": encoder}
        self.calls = 0

    def win_probability(self, y, context=None):
        self.calls += 1
        assert y.isfinite().all()
        assert (context is None) == (not self.metadata["context_dimension"])
        sign = 1.0 if context is None else torch.where(context[:, 1] > 0, 1.0, -1.0)
        return torch.sigmoid(2 * y[:, 0] * sign - 2)

    def alignment(self, y, context=None):
        return y[:, 2]


def refine_one(candidates, flow=None, prompt="p", **options):
    refiner = wrap(None, flow or LinearFlow(), encoder=LetterEncoder(), **options)
    return refiner.refine([candidates], [prompt])[0]

"""Two judges of sentiment that share neither features nor reviews: one labels preferences, the other measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LabellingJudge", "WordJudge"]


class LabellingJudge:
    """Scores vectors by logistic regression on the embeddings of sentences of liked and disliked films.

    Args:
        vectors: (N, D). liked: (N,) booleans.
    """

    def __init__(self, vectors: Tensor, liked: Sequence[bool]) -> None:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=10, max_iter=500).fit(vectors.numpy(), np.asarray(liked))
        self.slope = torch.from_numpy(model.coef_[0]).float()
        self.offset = float(model.intercept_[0])

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the log-odds (N,) of "liked"."""
        return vectors @ self.slope + self.offset


class WordJudge:
    """Scores texts by logistic regression on their words and pairs of words, weighted by tf-idf.

    Args:
        texts: N sentences. liked: (N,) booleans.
    """

    def __init__(self, texts: Sequence[str], liked: Sequence[bool]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        words = r"(?u)\b\w+(?:'\w+)?\b"
        self.features = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, token_pattern=words)
        self.model = LogisticRegression(C=3, max_iter=500).fit(self.features.fit_transform(texts), np.asarray(liked))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the log-odds (N,) of "liked"."""
        return self.model.decision_function(self.features.transform(texts))

    def accuracy(self, texts: Sequence[str], liked: Sequence[bool]) -> float:
        """Return the share of sentences whose side it tells."""
        return float(np.mean((self(texts) > 0) == np.asarray(liked)))

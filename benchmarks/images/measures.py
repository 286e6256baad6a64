"""What a method's images are worth: the right digit by three judges, realism, diversity, and how far they moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.images.data import DIGITS, Part
from benchmarks.images.generator import Draws
from benchmarks.images.judges import Judges
from pfm.statistics import Bootstrap, Estimate, interval

__all__ = ["Measures", "Reference", "frechet_distance", "precision_recall", "within_digit_diversity"]

RESAMPLES = 200  # of the diversity's interval


@dataclass(frozen=True)
class Reference:
    """Holds what a method's images are compared with: the draws as they came, and real images.

    ``draws`` have equally many of each digit, one digit after the other.
    """

    draws: Draws
    real: Part


class Measures:
    """Measures images (N, 1, S, S) that a method made of N draws.

    Args:
        judges: the three classifiers. reference: the draws and real images. neighbours: k of precision and recall.
    """

    def __init__(self, judges: Judges, reference: Reference, neighbours: int) -> None:
        self.judges, self.reference, self.neighbours = judges, reference, neighbours
        features = judges.third.features(reference.real.images)
        self.scale = features.std(0).clamp_min(1e-6)
        self.real = features / self.scale
        draws = reference.draws
        self.before = judges.independent.right(draws.images, draws.digits)
        self.spread = _pair_distances(self._features(draws.images), draws.digits)

    def _features(self, images: Tensor) -> Tensor:
        return self.judges.third.features(images) / self.scale

    def choice(self, images: Tensor) -> dict[str, float]:
        """Return what a setting may be chosen by: no figure of the independent judge is among them."""
        draws, features = self.reference.draws, self._features(images)
        precision, _ = precision_recall(features, self.real, self.neighbours)
        spread = _pair_distances(features, draws.digits)
        return {
            "labelled": float(self.judges.labelling.right(images, draws.digits).mean()),
            "diversity": float(np.mean([d.sum() for d in spread]) / np.mean([d.sum() for d in self.spread])),
            "precision": precision,
        }

    def __call__(self, images: Tensor) -> dict[str, Estimate | None]:
        """Return every figure with its interval over draws; of sets of images those without an interval have None's.

        right, labelled, third: mean probability of the right digit by the independent judge, the labelling one and the
        one on gradients. correct: share of images that the independent judge takes for the right digit. gain: of
        ``right`` over the draws as they came. diversity: mean distance of two images of one digit in the third
        network's features, relative to the draws'. precision, recall: shares of outputs within the real images'
        support, and of real ones within the outputs'. frechet: distance of the two in these features, by normal
        distributions. moved: root mean square difference of a pixel.
        """
        draws = self.reference.draws
        images = self.judges.check("images", images)
        if len(images) != len(draws):
            raise ValueError(f"images must be as many as the draws, {len(draws)}: got {len(images)}")
        bootstrap = Bootstrap(len(draws))
        probabilities = self.judges.independent.probabilities(images)
        right = probabilities[torch.arange(len(draws)), draws.digits]
        features = self._features(images)
        precision, recall = precision_recall(features, self.real, self.neighbours)
        distance = frechet_distance(features, self.real)
        shares = {
            "right": right,
            "correct": (probabilities.argmax(1) == draws.digits).float(),
            "labelled": self.judges.labelling.right(images, draws.digits),
            "third": self.judges.third.right(images, draws.digits),
        }
        found: dict[str, Estimate | None] = {
            name: bootstrap.mean(values.double().numpy(), (0.0, 1.0)) for name, values in shares.items()
        }
        found["gain"] = bootstrap.mean((right - self.before).double().numpy())
        found["moved"] = bootstrap.mean((images - draws.images).flatten(1).square().mean(1).sqrt().double().numpy())
        found["diversity"] = within_digit_diversity(_pair_distances(features, draws.digits), self.spread)
        for name, value in (("precision", precision), ("recall", recall), ("frechet", distance)):
            found[name] = Estimate(value, value, value)
        return found


def _pair_distances(features: Tensor, digits: Tensor) -> list[NDArray[np.float64]]:
    """Return for each digit the distances (K, K) of its rows."""
    parts = [features[digits == digit] for digit in range(DIGITS)]
    return [torch.cdist(part, part).double().numpy() for part in parts if len(part) > 1]


def within_digit_diversity(
    ours: list[NDArray[np.float64]], theirs: list[NDArray[np.float64]], seed: int = 0
) -> Estimate | None:
    """Return the ratio of mean distances of two rows of one digit, ours to theirs, with an interval over rows.

    Args:
        ours, theirs: for each digit distances (K, K); row k of ours was made of row k of theirs, and the two are
            resampled together.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)

    def ratio(counts: list[NDArray[np.float64]]) -> float:
        top, bottom = (
            sum(float(c @ d @ c) / len(c) ** 2 for c, d in zip(counts, part, strict=True)) for part in (ours, theirs)
        )
        return top / max(bottom, 1e-12)

    def resampled() -> list[NDArray[np.float64]]:
        return [np.bincount(rng.integers(len(d), size=len(d)), minlength=len(d)).astype(np.float64) for d in ours]

    value = ratio([np.ones(len(d)) for d in ours])
    samples = np.array([ratio(resampled()) for _ in range(RESAMPLES)])
    # Resampled rows meet themselves at distance 0, in ours as in theirs: the ratio is free of that.
    return interval(value, samples, sum(len(d) for d in ours))


def precision_recall(ours: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return the shares of ours within the support of the real rows, and of the real rows within that of ours.

    A row is within a support where it lies in a ball around one of its rows that reaches to that row's k-th neighbour.

    Args:
        ours: (N, D). real: (M, D). neighbours: k, below N and M.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models" (2019).
    """
    if not 1 <= neighbours < min(len(ours), len(real)):
        raise ValueError(
            f"neighbours must lie in 1..{min(len(ours), len(real)) - 1}, below the number of images: got {neighbours}"
        )
    across = torch.cdist(ours, real)
    # The nearest row of a row is itself.
    reach, own = (torch.cdist(p, p).kthvalue(neighbours + 1, 1).values for p in (real, ours))
    return float((across <= reach).any(1).float().mean()), float((across <= own[:, None]).any(0).float().mean())


def frechet_distance(ours: Tensor, real: Tensor) -> float:
    """Return the squared Fréchet distance of two normal distributions with the rows' means and covariances.

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), in the features' unit squared (Heusel et al. 2017).
    """
    one, two = ours.double(), real.double()
    covariances = [part.T.cov() for part in (one, two)]
    # The eigenvalues of S S' are those of the symmetric matrix S^1/2 S' S^1/2.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0)
    means = (one.mean(0) - two.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * product.sqrt().sum())

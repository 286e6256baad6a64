"""Sentences of IMDB's reviews by what they are used for; no two uses share a review's sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.text_autoencoder.config import TextAutoencoderConfig
from benchmarks.text_autoencoder.training import Corpus
from benchmarks.text_editing.sentences import Sentence, of_films
from benchmarks.text_editing.task import halves

__all__ = ["Parts", "film_corpus", "halves_of_imdb", "parts_of"]


def halves_of_imdb() -> tuple[list[Sentence], list[Sentence]]:
    """Return the training sentences of IMDB in two halves that share no review."""
    return halves(of_films()["imdb"][0])


def film_corpus() -> Corpus:
    """Return all training sentences; the attribute is whether the review liked the film, of the first half alone.

    The independent judge learns from the second half, whose labels the autoencoder does not see.
    """
    first, second = halves_of_imdb()
    held_out = of_films()["imdb"][1]
    return Corpus(
        [s.text for s in (*first, *second)],
        [*(int(s.liked) for s in first), *(-1 for _ in second)],
        [s.text for s in held_out],
        [int(s.liked) for s in held_out],
    )


@dataclass(frozen=True)
class Parts:
    """Holds the sentences of a run.

    Attributes:
        labelled: what the labelling judge is fitted on, of the first half.
        reference: what preferences are drawn from, of the first half as well.
        other: what the independent judge is fitted on: the second half, and rt_polarity three times.
        validation, drafts, draws: of held-out reviews.
    """

    labelled: list[Sentence]
    reference: list[Sentence]
    other: list[Sentence]
    validation: list[Sentence]
    drafts: list[Sentence]
    draws: list[Sentence]


def parts_of(config: TextAutoencoderConfig, fits: Callable[[Sequence[str]], list[bool]], seed: int) -> Parts:
    """Choose the sentences of a seed; what is labelled, the reference and the draws are those of every seed.

    Args:
        config: the numbers of sentences. fits: returns which texts the autoencoder takes. seed: of the run.

    Raises:
        ValueError: there are too few sentences for these numbers.
    """
    first, second = halves_of_imdb()
    rng = np.random.default_rng(0)
    first = [first[place] for place in rng.permutation(len(first))]
    labelled, spare = first[: config.labelled], _fitting(first[config.labelled :], fits, config.reference)
    held_out = _fitting([of_films()["imdb"][1][n] for n in rng.permutation(len(of_films()["imdb"][1]))], fits, None)
    each = config.validation + config.drafts
    start = config.draws + seed * each
    found = Parts(
        labelled, spare, second + of_films()["rt_polarity"][0] * 3,
        held_out[start : start + config.validation], held_out[start + config.validation : start + each],
        held_out[: config.draws],
    )  # fmt: skip
    for name in ("labelled", "reference", "validation", "drafts", "draws"):
        if len(getattr(found, name)) < max(2, getattr(config, name)):
            raise ValueError(
                f"task.{name} must be at least 2 and is {getattr(config, name)}; seed {seed} finds "
                f"{len(getattr(found, name))} sentences: take fewer, or a smaller seed"
            )
    return found


def _fitting(
    sentences: list[Sentence], fits: Callable[[Sequence[str]], list[bool]], count: int | None
) -> list[Sentence]:
    some = sentences if count is None else sentences[: 4 * count]
    kept = [s for s, fit in zip(some, fits([s.text for s in some]), strict=True) if fit]
    return kept[:count]

"""What a selector is held against: simple rules, baselines fitted on other prompts, a control and the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pfm.evaluation.auditing.choices import Choices
from pfm.statistics import Array

__all__ = ["COSTS", "Method", "fitted_rules", "simple_rules"]

#: Columns of which less is better: the label of choosing the least, and the phrase.
COSTS = {
    "seconds": ("Fastest", "taking the fastest"),
    "cost": ("Cheapest", "taking the cheapest"),
    "tokens": ("Fewest tokens", "taking the one of fewest tokens"),
}
PAIRS = 200  # of a set that the fitted baselines learn from
ALL_COMPARED = 2000  # candidates of a set up to which all its pairs are listed before some are drawn
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
SHUFFLES = 4  # fits a fold on labels turned at random
HELD_OUT = 0.2  # of the training prompts, by which the penalty is chosen
MIN_PROMPTS = 10  # for the fitted baselines: folds of two prompts


@dataclass(frozen=True)
class Method:
    """A named way to pick: ``kind`` as in :class:`AuditRow`, ``phrase`` for sentences, weights (M,)."""

    name: str
    label: str
    kind: str
    phrase: str
    weights: Array


def simple_rules(choices: Choices) -> list[Method]:
    """Return what can be chosen without learning: at random, by place, by length, by each cost."""
    rules = [
        Method("random", "Random candidate", "rule", "choosing at random", choices.random()),
        Method("first", "First candidate", "rule", "taking the first", choices.at(np.zeros_like(choices.size))),
    ]
    if choices.length is not None:
        rules += [
            Method("longest", "Longest", "rule", "choosing the longest", choices.best(choices.length)),
            Method("shortest", "Shortest", "rule", "choosing the shortest", choices.best(-choices.length)),
        ]
    for column, cost in choices.costs.items():
        label, phrase = COSTS.get(column, (f"Least {column}", f"taking the least {column}"))
        rules.append(Method(f"least {column}", label, "rule", phrase, choices.best(-cost)))
    return rules


def fitted_rules(
    choices: Choices, encoder: Any, *, folds: int, seed: int, progress: bool
) -> tuple[list[Method], str | None]:
    """Fit the mean shift and Bradley–Terry under nested splits by prompt; or say why they are left out.

    Every prompt's candidates are scored by a model fitted on the other folds' prompts, whose penalty is chosen on
    prompts held out among those. The control is the mean of several fits on labels turned at random: each is a random
    direction, which may follow length either way, and only together they gain nothing.
    """
    import torch

    from pfm.encoders import as_encoder
    from pfm.encoders.base import EMPTY_TEXT

    if encoder is None:
        return [], "Mean shift and Bradley–Terry: not fitted, since no encoder was given"
    if choices.text is None:
        return [], "Mean shift and Bradley–Terry: not fitted, since the rows hold no texts"
    if choices.prompts < MIN_PROMPTS:
        return [], f"Mean shift and Bradley–Terry: not fitted on fewer than {MIN_PROMPTS} prompts"
    texts: dict[str, int] = {}
    rows = np.array([texts.setdefault(text if text.strip() else EMPTY_TEXT, len(texts)) for text in choices.text])
    vectors = torch.as_tensor(as_encoder(encoder).encode(list(texts), progress=progress)).float().flatten(1)
    fold = np.random.default_rng(seed).permutation(choices.prompts) % folds
    picked = {name: np.zeros(choices.score.size) for name in ("mean_shift", "bradley_terry", "shuffled")}
    bar = tqdm(total=folds, desc="Fitting baselines", unit="fold") if progress else tqdm(disable=True)
    with bar:
        for number, models in _fits(choices, rows, vectors, fold, seed):
            if models is None:
                return [], "Mean shift and Bradley–Terry: not fitted, since too few prompts have different scores"
            out = (fold == number)[choices.prompt][choices.owner]
            for name, several in models.items():
                for model in several:
                    reward = np.zeros(choices.score.size)
                    reward[out] = model.reward(vectors[rows[out]]).double().numpy()
                    picked[name] += out * choices.best(reward) / len(several)
            bar.update(1)
    labels = {
        "mean_shift": ("Mean shift", "fitted", "the mean shift"),
        "bradley_terry": ("Bradley–Terry", "fitted", "a Bradley–Terry reward"),
        "shuffled": ("Control: random labels", "control", "Bradley–Terry on shuffled labels"),
    }
    return [Method(name, *labels[name], weights) for name, weights in picked.items()], None


def _fits(
    choices: Choices, rows: NDArray[np.int64], vectors: Any, fold: NDArray[np.int64], seed: int
) -> Iterator[tuple[int, dict[str, list[Any]] | None]]:
    """Yield each fold with the models fitted on the others, None where those hold nothing to learn from."""
    import torch

    from pfm.data.encoded import EncodedPairs
    from pfm.preferences import BradleyTerry, MeanShift

    better, worse, weight, prompt = _pairs(choices, seed)
    for number in range(int(fold.max()) + 1):
        kept = fold[prompt] != number
        if len(np.unique(prompt[kept])) < 2:
            yield number, None
            return
        train = EncodedPairs.from_table(
            vectors, rows[better[kept]], rows[worse[kept]], weight=weight[kept], group=torch.from_numpy(prompt[kept])
        )
        penalty = _penalty(BradleyTerry, train, seed)
        shuffles = [train.shuffle_labels(seed + 1 + SHUFFLES * number + each) for each in range(SHUFFLES)]
        models = {
            "mean_shift": [MeanShift().fit(train)],
            "bradley_terry": [BradleyTerry(penalty).fit(train)],
            "shuffled": [BradleyTerry(penalty).fit(each) for each in shuffles],
        }
        yield number, models


def _penalty(kind: Any, train: Any, seed: int) -> float:
    """Choose the penalty that predicts held-out prompts of the training pairs best."""
    import torch

    from pfm.preferences.logistic import pairwise_log_loss

    part, held_out = train.split(HELD_OUT, seed)
    every = held_out.gather(torch.arange(len(held_out)))

    def loss(penalty: float) -> float:
        score = kind(penalty).fit(part).score(every.chosen, every.rejected)
        return pairwise_log_loss(score, every.weight, every.probability)

    return min(PENALTIES, key=loss)


def _pairs(choices: Choices, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, NDArray[np.int64]]:
    """Return the pairs of different scores: the better, the worse, a weight that makes sets equal, the prompt."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], Array, NDArray[np.int64]]] = []
    rng = np.random.default_rng(seed)
    for number, (start, size) in enumerate(zip(choices.start, choices.size, strict=True)):
        score = choices.score[start : start + size]
        if size <= ALL_COMPARED:
            better, worse = np.nonzero(score[:, None] > score[None, :])
        else:
            better, worse = rng.integers(size, size=(2, 4 * PAIRS))
            kept = score[better] > score[worse]
            better, worse = better[kept], worse[kept]
        if better.size > PAIRS:
            drawn = rng.choice(better.size, PAIRS, replace=False)
            better, worse = better[drawn], worse[drawn]
        weight = np.full(better.size, 1.0 / max(1, better.size))
        prompt = np.full(better.size, choices.prompt[number])
        found.append((start + better, start + worse, weight, prompt))
    better, worse, weight, prompt = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return better, worse, weight, prompt

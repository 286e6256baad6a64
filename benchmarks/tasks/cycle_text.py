"""Compare real texts by criteria that beat each other in turn: a preference that no reward can express.

Each text is of the kind of the criterion in which it stands out. Kind 1 beats kind 2, kind 2 beats kind 3, and kind 3
beats kind 1, in the manner of the cyclic sets on which the General Preference Model was measured (Zhang et al. 2024,
arXiv 2410.02197). Every prompt has equally many texts of each kind, so that no kind wins more often than another: the
best reward gives them all the same value, and is right at chance. A dominant kind, where there is one, beats
all three.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.comparisons import Comparison, Comparisons
from benchmarks.core.data import data_folder, read_jsonl
from benchmarks.preference.config import CycleTextConfig
from benchmarks.selection.selection import limited
from pfm.encoders import SurfaceEncoder

__all__ = ["kinds", "load"]


def load(config: CycleTextConfig, seed: int) -> Comparisons:
    """Find the texts that stand out, the same for every seed, and compare those of different kinds."""
    criteria = [*config.criteria, *([config.dominant] if config.dominant else [])]
    if len(config.criteria) != 3 or len(set(criteria)) != len(criteria):
        raise ValueError(f"task.criteria must be three features, and task.dominant another: got {', '.join(criteria)}")
    if config.texts not in _TEXTS:
        raise ValueError(f"task.texts must be one of {', '.join(_TEXTS)}: got {config.texts!r}")
    prompts, texts, features = _measured(config.texts, config.longest)
    of: dict[str, list[list[str]]] = defaultdict(lambda: [[] for _ in criteria])
    for prompt, text, kind in zip(prompts, texts, kinds(features, criteria, config.lead), strict=True):
        if kind >= 0:
            of[prompt][kind].append(text)
    whole = {prompt: found for prompt, found in of.items() if all(found)}
    kept = limited(whole, config.limit)
    names = {prompt: str(number) for number, prompt in enumerate(kept)}
    rng = np.random.default_rng(0)  # not the run's seed: the cached embeddings serve every run
    rows = []
    for prompt in kept:
        each = min(config.each, *(len(found) for found in whole[prompt]))
        members = [[found[i] for i in rng.permutation(len(found))[:each]] for found in whole[prompt]]
        for one, other in combinations(range(len(criteria)), 2):
            first, second = (one, other) if rng.random() < 0.5 else (other, one)
            rows += [
                Comparison(
                    names[prompt], prompt, a, b, float(_beats(first, second)),
                    part="dominant" if other == 3 else "cycle",
                )
                for a in members[first]
                for b in members[second]
            ]  # fmt: skip
    return Comparisons(
        rows, config.folds, seed, judge="the criteria, in turn", about={"criteria": criteria, "texts": config.texts}
    )


def kinds(features: NDArray[np.float64], criteria: Sequence[str], lead: float) -> NDArray[np.int64]:
    """Tell in which criterion each text stands out: the place of it (N,), or -1.

    Surface features (N, F) are standardised over all texts; the highest of the criteria must lead the next by ``lead``
    standard deviations.

    Raises:
        ValueError: a criterion is no surface feature.
    """
    names = SurfaceEncoder.feature_names
    for name in criteria:
        if name not in names:
            raise ValueError(f"task.criteria holds no surface feature {name!r}: {', '.join(names)}")
    values = features[:, [names.index(name) for name in criteria]]
    values = (values - values.mean(0)) / values.std(0).clip(1e-9)
    ordered = np.sort(values, axis=1)
    return np.where(ordered[:, -1] - ordered[:, -2] > lead, values.argmax(1), -1)


@cache
def _measured(source: str, longest: int) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Return the prompt of each text, the texts, and their surface features (N, F)."""
    found = [
        (prompt, text)
        for prompt, texts in sorted(_TEXTS[source]().items())
        for text in dict.fromkeys(texts)
        if len(text) <= longest
    ]
    prompts, texts = [prompt for prompt, _ in found], [text for _, text in found]
    return prompts, texts, SurfaceEncoder().encode(texts).double().numpy()


def _beats(first: int, second: int) -> bool:
    if 3 in (first, second):  # the dominant kind
        return first == 3
    return (second - first) % 3 == 1


def _alpaca() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in read_jsonl(data_folder("alpaca_eval") / "outputs.jsonl.xz"):
        texts[row["instruction"]] += [text for _, text in sorted(row["outputs"].items()) if text.strip()]
    return texts


def _arguments() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in read_jsonl(data_folder("ukp_convarg") / "arguments.jsonl.gz"):
        texts[f"{row['title']} {row['stance']}"].append(row["text"])
    return texts


def _imdb() -> dict[str, list[str]]:
    rows = read_jsonl(data_folder("imdb") / "train.jsonl.xz")
    return _hands([row["text"].replace("<br />", "\n") for row in rows])


def _critics() -> dict[str, list[str]]:
    return _hands([row["text"] for row in read_jsonl(data_folder("rt_polarity") / "rt_polarity.jsonl.gz")])


def _hands(texts: list[str]) -> dict[str, list[str]]:
    """Deal reviews into hands of :data:`_HAND`, in the place of answers to one prompt."""
    order = np.random.default_rng(0).permutation(len(texts))
    return {
        f"Reviews, hand {number}": [texts[place] for place in order[start : start + _HAND]]
        for number, start in enumerate(range(0, len(order), _HAND))
    }


_HAND = 60
_TEXTS = {"alpaca": _alpaca, "arguments": _arguments, "imdb": _imdb, "critics": _critics}

"""Scored candidates of unseen prompts with their b, for studies that replay draws in random order.

b is that of the ensemble of ``experiment=selection`` against draws of the reference, fitted on the training prompts of
a task's split. Beside the candidates stand two attackers that no generator here would draw: *padded*, the lowest-scored
answers of the prompt, repeated until they are twice as long as its longest; and *constant*, the training outputs of
other prompts with the highest b, the same for every prompt. A padded answer keeps the score of what it repeats, a
constant one has the lowest score of the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.config import AlpacaConfig, ArgumentsConfig, CaptionsConfig
from benchmarks.core.schemas import method_settings
from benchmarks.same_generator.config import SameGeneratorConfig
from benchmarks.selection.selection import Selection
from benchmarks.tasks import alpaca, arguments, captions, same_generator
from pfm import EncodedPairs
from pfm.encoders import Encoder, encoder_from_name
from pfm.flow.preference_win import PreferenceWin
from pfm.preferences import PreferenceEnsemble

__all__ = ["TASKS", "Pool", "ensemble", "load_pools", "study_options"]

Array = NDArray[np.float64]

ATTACKERS = 0.05  # of each kind, for one candidate
MOST_PAIRS = 8000  # that b is fitted on
TASKS: dict[str, Any] = {
    "arguments": lambda seed: arguments.load(
        ArgumentsConfig(name="arguments", candidates=8, draws=40, test_share=0.5), seed
    ),
    "alpaca": lambda seed: alpaca.load(
        AlpacaConfig(name="alpaca", candidates=16, draws=20, test_share=0.5, generators=53, limit=150), seed
    ),
    "captions": lambda seed: captions.load(
        CaptionsConfig(name="captions", candidates=64, draws=80, test_share=0.5), seed
    ),
    # Of sixteen samples, all are among a few draws of fifteen.
    "same_generator": lambda seed: same_generator.load(
        SameGeneratorConfig(name="same_generator", candidates=15, draws=8), seed
    ),
    "same_generator_sentiment": lambda seed: same_generator.load(
        SameGeneratorConfig(name="same_generator-sentiment", candidates=15, draws=8, part="sentiment"), seed
    ),
}
LABELS = ("given", "shuffled", "swapped")
READY = ("arguments", "alpaca", "captions")  # whose data need not be drawn first


@dataclass(frozen=True)
class Pool:
    """Holds the candidates of one prompt, and after them the attackers.

    Attributes:
        group: the prompt. log_odds: (M,) logit b. scores: (M,). lengths: (M,) characters.
        kind: (M,) 0 for a candidate, 1 padded, 2 constant.
    """

    group: str
    log_odds: Array
    scores: Array
    lengths: Array
    kind: NDArray[np.int64]

    def honest(self) -> Pool:
        """Return the pool without attackers."""
        real = self.kind == 0
        return Pool(self.group, self.log_odds[real], self.scores[real], self.lengths[real], self.kind[real])


def load_pools(task: str, seed: int, labels: str, out: Path) -> list[Pool]:
    """Read the pools of a task's split from ``out``, or make them and keep them there.

    Args:
        task: a name in ``TASKS``. seed: of the split and the fit.
        labels: "given", or for the controls "shuffled" or "swapped".
        out: folder.
    """
    path = out / f"{task}-{seed}-{labels}.npz"
    if not path.is_file():
        found = _made(TASKS[task](seed), seed, labels)
        out.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(pool, name) for pool in found]) for name in list(Pool.__annotations__)[1:]
        }
        groups = np.repeat([pool.group for pool in found], [len(pool.scores) for pool in found])
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, group=groups, **columns)
        partial.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in Pool.__annotations__}
    groups = values.pop("group")
    return [
        Pool(str(group), **{name: column[groups == group] for name, column in values.items()})
        for group in np.unique(groups)
    ]


def _made(task: Selection, seed: int, labels: str) -> list[Pool]:
    encoder = encoder_from_name("minilm+surface", long_texts="truncate")
    kept = np.random.default_rng([seed, 1]).permutation(len(task.train))[:MOST_PAIRS]
    train = task.train.select(sorted(kept.tolist())).encode(encoder, progress=False)
    if labels == "shuffled":
        train = train.shuffle_labels(seed)
    elif labels == "swapped":
        train = train.swap()
    win = _fitted(train)
    outputs = list(dict.fromkeys(task.train.chosen))
    found = []
    candidates: dict[str, tuple[str | None, dict[str, float]]] = {}
    for item in task.items:
        known = candidates.setdefault(item.group, (item.prompt, {}))[1]
        known.update(zip(item.candidates, item.scores.tolist(), strict=True))
    constants = _constants(win, encoder, outputs, [prompt for prompt, _ in candidates.values()])
    for group, (prompt, scored) in candidates.items():
        real, scores = list(scored), np.array(list(scored.values()))
        count = max(1, round(ATTACKERS * len(real)))
        longest = max(map(len, real))
        low = np.argsort(scores, kind="stable")[:count]
        padded = [" ".join([real[row]] * (1 + 2 * longest // max(len(real[row]), 1))) for row in low]
        fixed = [constants[row % len(constants)] for row in range(count)]
        texts = real + padded + fixed
        log_odds = _log_odds(win, encoder.encode(texts, progress=False), encoder, prompt)
        scores = np.concatenate([scores, scores[low], np.full(count, scores.min())])
        kind = np.repeat([0, 1, 2], [len(real), count, count])
        found.append(Pool(group, log_odds, scores, np.array(list(map(len, texts)), float), kind))
    return found


def ensemble() -> PreferenceEnsemble:
    """Make the ensemble of ``method=ensemble``, not yet fitted."""
    settings = method_settings("ensemble", "preference")
    assert settings is not None
    return PreferenceEnsemble(**settings["options"])


def _fitted(train: EncodedPairs) -> PreferenceWin:
    model = ensemble().fit(train)
    return PreferenceWin.made(model, train, train)[0]


def _constants(win: PreferenceWin, encoder: Encoder, outputs: list[str], prompts: Iterable[str | None]) -> list[str]:
    """Return the training outputs whose mean logit b over (some of) the test prompts is highest."""
    rng = np.random.default_rng(0)
    some = [outputs[row] for row in rng.permutation(len(outputs))[:300]]
    vectors = encoder.encode(some, progress=False)
    asked = list(dict.fromkeys(prompts))[:20]
    mean = np.mean([_log_odds(win, vectors, encoder, prompt) for prompt in asked], axis=0)
    return [some[row] for row in np.argsort(-mean)[:5]]


@torch.no_grad()
def _log_odds(win: PreferenceWin, vectors: Tensor, encoder: Encoder, prompt: str | None) -> Array:
    context = None if prompt is None else encoder.encode_prompts([prompt]).expand(len(vectors), -1)
    return win(vectors, context).numpy().astype(np.float64)


def study_options(description: str | None) -> argparse.Namespace:
    """Read the options of a study that replays draws: tasks, seeds, labels, and the folder of candidates."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(READY))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=["given", "shuffled"])
    parser.add_argument("--out", type=Path, default=Path("runs/draws"), help="folder of the candidates and their b")
    return parser.parse_args()

"""What a judge is: it compares outputs in pairs, and everything else follows from that."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from pfm.data.checks import checked_prompt, checked_response, choose_pairs, require
from pfm.data.conversations import conversation_text
from pfm.data.errors import PreferenceDataError, show
from pfm.errors import GenerationError
from pfm.generators.base import Prompt
from pfm.reasoning import judged_text

__all__ = ["Comparison", "Judge", "ScoringJudge", "Verdict", "candidate_pairs", "preference_row"]

logger = logging.getLogger(__name__)

NO_VOTES = {"first": 0, "second": 0, "tie": 0, "unread": 0}


class Comparison(NamedTuple):
    """Two outputs for one prompt."""

    prompt: Prompt
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two outputs.

    Attributes:
        probability: that the first is the better one, in [0, 1]; ½ is a tie; NaN if the judge gave no verdict.
        votes: how often it said first, second, tie, and how often it could not be read.
        error: type and message of what failed, or None.
        by_model: whether a preference model gave it alone, without the judge (:class:`pfm.judges.SparingJudge`).
    """

    probability: float
    votes: Mapping[str, int] = field(default_factory=lambda: dict(NO_VOTES))
    error: str | None = None
    by_model: bool = False

    @property
    def given(self) -> bool:
        """Tell whether there is a verdict."""
        return not math.isnan(self.probability)


class Judge(ABC):
    """Compares outputs in pairs. A subclass has one method to write, :meth:`compare`.

    A judge is also what :func:`pfm.evaluate` asks for: called with a prompt and its responses it gives one number a
    response, higher is better: how often, by its verdicts, the response beats the others.

    Attributes:
        name: what reports call it.
        reasoning: "strip" judges of an output with hidden reasoning the answer after it (see :mod:`pfm.reasoning`),
            "keep" the whole text. May be set.
        against: whom a response meets when responses are scored: ``"all"`` others, or the ``"first"`` alone, which
            takes n - 1 comparisons where all take n (n - 1) / 2.
    """

    name: str = ""
    reasoning: str = "strip"
    against: str = "all"

    @abstractmethod
    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison, in order. What fails is a verdict without probability, and its error."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe, in JSON values, what the verdicts depend on; never a key."""

    def judge(self, prompt: Prompt, first: str, second: str) -> Verdict:
        """Say which of two outputs is better."""
        return self.compare([Comparison(prompt, first, second)])[0]

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """Score the responses (n,) to a prompt: the share of verdicts won, a tie being half.

        A verdict that could not be read is no evidence and counts as a tie, unless a response has no other.

        Raises:
            GenerationError: some response got no verdict at all.
        """
        n = len(responses)
        pairs = list(combinations(range(n), 2)) if self.against == "all" else [(0, other) for other in range(1, n)]
        distinct = [(i, j) for i, j in pairs if responses[i] != responses[j]]
        verdicts = self.compare([Comparison(prompt, responses[i], responses[j]) for i, j in distinct])
        found = dict(zip(distinct, verdicts, strict=True))
        won: list[list[float]] = [[] for _ in responses]
        for pair in pairs:
            verdict = found.get(pair, Verdict(0.5))
            p = verdict.probability if verdict.given else 0.5
            won[pair[0]].append(p)
            won[pair[1]].append(1 - p)
        for row in range(n):
            own = [found[pair] for pair in distinct if row in pair]
            if own and not any(verdict.given for verdict in own):
                error = next((verdict.error for verdict in own if verdict.error), "its answers could not be read")
                raise GenerationError(f"{self.name} gave no verdict on response {row}: {error}")
        if self.against == "first":  # the first meets itself
            return [0.5, *(scores[0] for scores in won[1:])][:n]
        return [float(np.mean(scores)) if scores else 0.5 for scores in won]

    def label(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        max_pairs_per_prompt: int | None = None,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Label candidates: make preference rows of every two different candidates of a prompt.

        Args:
            rows: each with ``prompt`` and ``candidates``, a list of texts; other columns are carried along.
            max_pairs_per_prompt: draw at most so many of a prompt's pairs, uniformly; None takes all.
            seed: of that draw.

        Returns:
            Rows with ``prompt``, ``chosen``, ``rejected``, ``probability`` (that chosen is the better one, at least
            ½) and ``votes``, ready for :meth:`pfm.PreferencePairs.from_rows`. Ties stay, with probability ½. Pairs
            without a verdict are left out, and counted in the log; so are pairs that a model decided alone, uncounted.

        Raises:
            PreferenceDataError: a row lacks a column, or a text is blank.
        """
        asked: list[tuple[Mapping[str, Any], Comparison]] = []
        for number, row in enumerate(rows):
            for _, comparison in candidate_pairs(row, max_pairs_per_prompt, (seed, number), self.reasoning):
                asked.append((row, comparison))
        verdicts = self.compare([comparison for _, comparison in asked])
        labelled = [
            preference_row(row, comparison, verdict)
            for (row, comparison), verdict in zip(asked, verdicts, strict=True)
            if verdict.given and not verdict.by_model
        ]
        missing = sum(not verdict.given for verdict in verdicts)
        if missing:
            logger.warning("%s gave no verdict on %d of %d pairs", self.name, missing, len(asked))
        return labelled


class ScoringJudge(Judge):
    """The base of judges that score an output by itself; they compare by the difference of two scores.

    Args:
        temperature: scale T of the scores in P(first is better) = sigmoid((s₁ - s₂) / T), Bradley–Terry's model; None
            takes the higher score as certain and equal scores as a tie.
    """

    def __init__(self, *, temperature: float | None) -> None:
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number or None, got {temperature}")
        self.temperature = temperature

    @abstractmethod
    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score N responses, each to the prompt in its place; higher is better."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Compare by scores; each distinct output is scored once."""
        places: dict[tuple[str, str], int] = {}
        prompts: list[Prompt] = []
        for prompt, *texts in comparisons:
            for text in texts:
                if places.setdefault((conversation_text(prompt), text), len(prompts)) == len(prompts):
                    prompts.append(prompt)
        found = self._checked(prompts, [text for _, text in places])
        return [
            self._verdict(*(found[places[conversation_text(prompt), text]] for text in (first, second)))
            for prompt, first, second in comparisons
        ]

    def __call__(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """Score the responses (n,) to a prompt."""
        return self._checked([prompt] * len(responses), list(responses))

    def _checked(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        shown = [judged_text(text, self.reasoning) for text in texts]
        found = [float(score) for score in self.scores(prompts, shown)] if texts else []
        if len(found) != len(texts):
            raise ValueError(f"{self.name} must give one number a response: got {len(found)} for {len(texts)}")
        for score, text in zip(found, texts, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"{self.name} must give finite numbers: got {score} for {text!r:.80}")
        return found

    def _verdict(self, first: float, second: float) -> Verdict:
        if self.temperature is None:
            probability = 0.5 if first == second else float(first > second)
        else:
            # tanh does not overflow where exp would
            probability = 0.5 + 0.5 * math.tanh((first - second) / (2 * self.temperature))
        vote = "tie" if first == second else "first" if first > second else "second"
        return Verdict(probability, NO_VOTES | {vote: 1})


def candidate_pairs(
    row: Mapping[str, Any], limit: int | None, seed: tuple[int, int], reasoning: str = "strip"
) -> Iterator[tuple[tuple[int, int], Comparison]]:
    """Yield the pairs of candidates of a row whose answers differ, with their places among the candidates.

    Raises:
        PreferenceDataError: the row lacks a column, or a text is blank.
    """
    prompt = checked_prompt(require(row, "prompt"), "prompt")
    given = require(row, "candidates")
    if not isinstance(given, list | tuple):
        raise PreferenceDataError(f"got {show(given)}; expected a list of texts", column="candidates")
    texts = [conversation_text(checked_response(text, "candidates")) for text in given]
    first = {judged_text(text, reasoning).strip(): place for place, text in reversed(list(enumerate(texts)))}
    pairs = list(combinations(sorted(first.values()), 2))
    kept = choose_pairs(len(pairs), limit, seed, "a row")
    for i, j in pairs if kept is None else [pairs[place] for place in kept.tolist()]:
        yield (i, j), Comparison(prompt, texts[i], texts[j])


def preference_row(row: Mapping[str, Any], comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    """Make a preference row of a verdict; the likelier winner is chosen, the first of a tie."""
    names = ["first", "second"] if verdict.probability >= 0.5 else ["second", "first"]
    chosen, rejected = (getattr(comparison, name) for name in names)
    votes = {
        "chosen": verdict.votes[names[0]],
        "rejected": verdict.votes[names[1]],
        "tie": verdict.votes["tie"],
        "unread": verdict.votes["unread"],
    }
    used = ("prompt", "candidates", "chosen", "rejected", "probability", "votes")
    return {
        "prompt": comparison.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "probability": max(verdict.probability, 1 - verdict.probability),
        "votes": votes,
        **{name: value for name, value in row.items() if name not in used},
    }

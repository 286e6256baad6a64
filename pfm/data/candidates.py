"""Candidates of one prompt with their scores, and the pairs they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm._internal.checks import check_length
from pfm.data.checks import check_pair_limit, checked_prompt, checked_response, choose_pairs
from pfm.data.conversations import Text, conversation_text
from pfm.data.errors import BadRows, PreferenceDataError, show
from pfm.data.identity import given_group
from pfm.data.rows import Columns, ScoredCandidates

__all__ = ["CandidateGroup", "add_scored_rows", "ranked_candidates", "scored_columns"]


@dataclass(frozen=True)
class CandidateGroup:
    """Hold the scored candidates of one prompt, from which targets beyond best of two are drawn.

    ``texts`` and ``scores`` have equal lengths; higher is better. ``group`` is the prompt's group, if any.
    """

    prompt: str
    texts: list[str]
    scores: list[float]
    group: Any = None


def _check_lengths(prompts: Sequence[Text], group: Sequence[Any] | None, **columns: Any) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list with one text a prompt: got the string {prompts!r}")
    for name, column in columns.items():
        check_length(name, column, len(prompts), "prompt")
    if group is not None:
        check_length("group", group, len(prompts), "prompt")


def _is_tie(rank: Any) -> bool:
    """Tell a list of texts from a text: a conversation is a list too, but of mappings."""
    return isinstance(rank, list | tuple) and not (rank and isinstance(rank[0], Mapping))


def _scored(texts: Sequence[Any], scores: Any, where: str, name: str, bad: BadRows) -> tuple[list[Text], np.ndarray]:
    """Check the candidates of one prompt; return those that are sound, at least two of them."""
    kept: list[tuple[Text, float]] = []
    for j, (value, score) in enumerate(zip(texts, scores, strict=True)):
        try:
            kept.append((checked_response(value, None), _checked_score(score)))
        except PreferenceDataError as error:
            bad.meet(error, f"{where}, candidate {j + 1} ({name.format(j=j)})")
    if len(kept) < 2:
        raise PreferenceDataError(
            f"got {len(kept)} usable candidates; expected at least two", reason="fewer than two candidates"
        )
    return [text for text, _ in kept], np.array([score for _, score in kept])


def _add_scored(
    columns: Columns,
    prompt: Text,
    texts: list[Text],
    scores: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    group: Any,
    extra: Mapping[str, Any],
) -> CandidateGroup:
    """Add the pairs of one prompt's candidates, numbered (better, worse), to the columns; return the candidates."""
    for j, k in zip(*(numbers.tolist() for numbers in pairs), strict=True):
        margin = float(scores[j] - scores[k])
        tie = None if margin else 0.5
        columns.add(prompt, texts[j], texts[k], probability=tie, group=group, extra={**extra, "margin": margin})
    views = [conversation_text(text) for text in texts]
    return CandidateGroup(conversation_text(prompt), views, scores.tolist(), group)


def _checked_score(score: Any) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        raise PreferenceDataError(f"the score is {show(score)}; expected a number", reason="wrong type") from None
    except OverflowError:  # an integer beyond what a float holds
        number = math.inf
    if not math.isfinite(number):
        raise PreferenceDataError(f"the score is {number}; expected a finite number", reason="score not finite")
    return number


def _ordered_pairs(
    texts: list[Text],
    scores: np.ndarray,
    limit: int | None,
    seed: tuple[int, int],
    where: str,
    ties: str = "half",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the better and of the worse candidate of each pair; of a tie either may stand first.

    In ascending order of score the candidate at position p is paired with the first ``below[p]`` ones, which are all
    before it or, without ties, those it beats; numbering the pairs in that order makes a draw possible without listing
    all of them.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    below = np.arange(len(scores)) if ties == "half" else np.searchsorted(ascending, ascending, side="left")
    ends = np.cumsum(below)
    total = int(ends[-1])
    if not total:
        raise PreferenceDataError(
            f"all {len(scores)} candidates have the score {scores[0]:g}; expected two different scores",
            reason="all ties",
        )
    numbers = choose_pairs(total, limit, seed, where)
    numbers = np.arange(total) if numbers is None else numbers
    position = np.searchsorted(ends, numbers, side="right")
    better, worse = order[position], order[numbers - (ends - below)[position]]
    ids: dict[str, int] = {}
    text_ids = np.array([ids.setdefault(conversation_text(text).strip(), len(ids)) for text in texts])
    different = text_ids[better] != text_ids[worse]
    if not different.any():
        raise PreferenceDataError("all candidates are the same text", reason="identical pair")
    return better[different], worse[different]


def scored_columns(
    prompts: Sequence[Text],
    candidates: Sequence[Sequence[Text]],
    scores: Sequence[Sequence[float] | np.ndarray] | np.ndarray,
    bad: BadRows,
    *,
    group: Sequence[Any] | None,
    max_pairs_per_prompt: int | None,
    seed: int,
    ties: str,
) -> tuple[Columns, list[CandidateGroup]]:
    """Pair the candidates of each prompt by their scores; the arguments are those of ``from_scores``."""
    check_pair_limit(max_pairs_per_prompt)
    _check_lengths(prompts, group, candidates=candidates, scores=scores)
    columns = Columns()
    groups: list[CandidateGroup] = []
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1} (prompts[{i}])"
        of_prompt = None if group is None else given_group(group[i])
        try:
            prompt = checked_prompt(prompt, None)
            if isinstance(candidates[i], str) or len(candidates[i]) != len(scores[i]):
                raise ValueError(
                    f"candidates[{i}] and scores[{i}] must be lists of equal length: got {show(candidates[i])} and "
                    f"{len(scores[i])} scores"
                )
            texts, numbers = _scored(candidates[i], scores[i], f"prompt {i + 1}", f"candidates[{i}][{{j}}]", bad)
            better, worse = _ordered_pairs(texts, numbers, max_pairs_per_prompt, (seed, i), where, ties)
        except PreferenceDataError as error:
            bad.meet(error, where)
            continue
        groups.append(_add_scored(columns, prompt, texts, numbers, (better, worse), of_prompt, {}))
    if groups and all(len(set(entry.scores)) == 1 for entry in groups):
        raise PreferenceDataError(
            f"scores: the candidates of every prompt ({len(groups)}) have equal scores, so that none is known to "
            "be better; expected two different scores somewhere",
            reason="all ties",
        )
    return columns, groups


def ranked_candidates(
    prompts: Sequence[Text], rankings: Sequence[Sequence[Any]], group: Sequence[Any] | None
) -> tuple[list[list[Text]], list[list[float]]]:
    """Return the candidates of each prompt, ranked best first, with scores that count the ranks below."""
    _check_lengths(prompts, group, rankings=rankings)
    candidates: list[list[Text]] = []
    scores: list[list[float]] = []
    for ranking in rankings:
        tiers = [list(rank) if _is_tie(rank) else [rank] for rank in ranking]
        candidates.append([text for tier in tiers for text in tier])
        scores.append([float(len(tiers) - n) for n, tier in enumerate(tiers, 1) for _ in tier])
    return candidates, scores


def add_scored_rows(
    columns: Columns,
    scored: Sequence[ScoredCandidates],
    bad: BadRows,
    place: str,
    *,
    max_pairs_per_prompt: int | None,
    seed: int,
) -> list[CandidateGroup]:
    """Add the pairs of rows of several scored responses to the columns; return the candidates of each row."""
    groups = []
    for entry in scored:
        where = place.format(n=entry.number, i=entry.number - 1)
        try:
            texts, numbers = _scored(entry.responses, entry.scores, where, "completions[{j}]", bad)
            better, worse = _ordered_pairs(texts, numbers, max_pairs_per_prompt, (seed, entry.number), where)
        except PreferenceDataError as error:
            bad.meet(error, where)
            continue
        groups.append(_add_scored(columns, entry.prompt, texts, numbers, (better, worse), entry.group, entry.extra))
    return groups

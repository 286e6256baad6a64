"""Preference pairs as text: load, check, split by prompt, describe and encode them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from pfm.data.conversations import joined_text
from pfm.data.identity import PromptIdentity, given_group, prompt_identity
from pfm.data.rows import (
    BadRows,
    Columns,
    NumberedRows,
    PreferenceDataError,
    RowOptions,
    RowParser,
    Text,
    check_pair_limit,
    checked_prompt,
    checked_response,
    choose_pairs,
    conversation_text,
    read_csv,
    read_dataset,
    read_json,
    read_jsonl,
    read_parquet,
    reader_for,
    show,
    vote_counts,
    vote_rows,
    write_lines,
)
from pfm.reasoning import checked_reasoning, training_text

if TYPE_CHECKING:
    from rich.table import Table

    from pfm.data.encoded import EncodedPairs

__all__ = ["CandidateGroup", "PairsSummary", "PreferenceDataError", "PreferencePairs", "conversation_text"]

logger = logging.getLogger(__name__)

#: What is encoded for an empty prompt beside others: encoders take no empty text, and all parts of a split must agree.
EMPTY_PROMPT = "(no prompt)"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class CandidateGroup:
    """Hold the scored candidates of one prompt, from which targets beyond best of two are drawn.

    ``texts`` and ``scores`` have equal lengths; higher is better. ``group`` is the prompt's group, if any.
    """

    prompt: str
    texts: list[str]
    scores: list[float]
    group: Any = None


class PreferencePairs:
    """Hold labelled pairs of texts: to one prompt, the chosen response was preferred to the rejected one.

    Make one with ``from_file``, ``from_jsonl``, ``from_json``, ``from_csv``, ``from_parquet``, ``from_dataset``,
    ``from_rows`` (options: :class:`pfm.data.rows.RowOptions`), ``from_scores``, ``from_rankings`` or ``from_votes``.
    Every text is a string or a list of ``{"role", "content"}`` messages. Row formats:

    - ``prompt, chosen, rejected``;
    - ``chosen, rejected`` that share a beginning: whole turns of a conversation, whole words of a string, all up to
      the last ``Assistant:`` of a transcript;
    - ``prompt, completion, label``: each liked completion against each disliked one of the same prompt; a label is
      true or false, or a word for one of them such as "liked" or "bad";
    - layouts of public data, whose prompt is under another name or whose responses are (:mod:`pfm.data.layouts`).

    The module :mod:`pfm.data.rows` says how the prompt is found. Where a column that is not known could hold it,
    reading stops: ``prompt_key`` names the column. ``layout`` says which layout was recognised.

    Optional columns are ``weight`` (≥ 0, 1 where null), ``probability`` (in [0, 1]: that chosen is the better
    one, 1 where null) and ``group``. All others, ``margin`` among them, are kept in ``extra``; only unpaired rows
    lose theirs, and the weight of their pairs is the product of the two rows' weights. Two of the others mean
    something: ``votes``, an object of the counts ``chosen``, ``rejected`` and ``tie``, gives the probability where
    the row has none, a tie half, and the weight likewise; ``rater`` names who made the row's judgement, and
    :func:`pfm.preferences.reconcile` joins the rows of one pair by how reliable their raters are.

    A row is bad when a column is missing (the prompt too, if any row has one), a text is blank, or both responses
    are the same text. The empty string as a prompt says that there is none; such rows count as one prompt, or as
    one prompt a group. Where other rows have a prompt, ``notes`` names them, and they are encoded as "(no prompt)".
    Prompts that differ only in white space, case or Unicode form are one prompt (:mod:`pfm.data.identity`), of which no
    split separates rows. A group that is null, NaN or blank is no group.

    Attributes:
        prompts, chosen, rejected: list of N str, as encoders read them (see :func:`conversation_text`).
        weight, probability: list of N float, or None when no row has one.
        group: list of N values, or None.
        extra: other columns by name, each a list of N values.
        candidates: scored candidates by prompt, empty unless made from scores or rankings.
        dropped: how many rows loading has dropped, by reason.
        layout: how the rows were laid out, or "".
        notes: sentences on what loading has found that may surprise.
        has_prompts: whether the rows have prompts; parts of a split inherit it, so that all have contexts or none.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        candidates: Sequence[CandidateGroup] = (),
        dropped: Mapping[str, int] | None = None,
        layout: str = "",
        notes: Sequence[str] = (),
        has_prompts: bool | None = None,
    ):
        self._prompt, self._chosen, self._rejected = columns.prompt, columns.chosen, columns.rejected
        self.prompts: list[str] = [joined_text(text) for text in columns.prompt]
        self.chosen: list[str] = [joined_text(text) for text in columns.chosen]
        self.rejected: list[str] = [joined_text(text) for text in columns.rejected]
        self.weight = _numbers(columns.weight)
        self.probability = _numbers(columns.probability)
        self.group = columns.group if any(group is not None for group in columns.group) else None
        names = dict.fromkeys(name for extra in columns.extra for name in extra)
        self.extra: dict[str, list[Any]] = {name: [e.get(name) for e in columns.extra] for name in names}
        self.candidates = list(candidates)
        self.dropped: Counter[str] = Counter(dropped or {})
        self.layout = layout
        self.notes = list(notes)
        self.has_prompts = any(self.prompts) if has_prompts is None else has_prompts

    # --- loading ---------------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load .jsonl (.ndjson), .json, .csv, .tsv or .parquet; ``.gz`` or ``.xz`` may follow the suffix.

        Raises:
            PreferenceDataError: the file or, unless ``on_bad_rows="drop"``, a row is bad.
            ValueError: the suffix is unknown.
        """
        return cls._from_file(reader_for(Path(path)), path, options)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a file with one JSON object a line."""
        return cls._from_file(read_jsonl, path, options)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a file that is one JSON array of objects."""
        return cls._from_file(read_json, path, options)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a table of text with a header, as spreadsheets and pandas write it (:mod:`pfm.data.spreadsheets`)."""
        return cls._from_file(read_csv, path, options)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a Parquet file; needs the extra ``parquet``."""
        return cls._from_file(read_parquet, path, options)

    @classmethod
    def from_dataset(cls, dataset: Any, **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load one split of a ``datasets.Dataset``."""
        return cls._from_numbered(read_dataset(dataset), "dataset", "row {n} (dataset[{i}])", options)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a list of dictionaries."""
        return cls._from_numbered(_numbered(rows), "rows", "row {n} (rows[{i}])", options)

    @classmethod
    def _from_file(
        cls,
        reader: Callable[[Path, BadRows], NumberedRows],
        path: str | os.PathLike[str],
        options: RowOptions,
    ) -> PreferencePairs:
        place = "line {n}" if reader is read_jsonl else "row {n}"
        return cls._from_numbered(lambda bad: reader(Path(path), bad), os.fspath(path), place, options)

    @classmethod
    def _from_numbered(
        cls,
        rows: NumberedRows | Callable[[BadRows], NumberedRows],
        source: str,
        place: str,
        options: RowOptions,
        way_out: str = "",
    ) -> PreferencePairs:
        rest: dict[str, Any] = dict(options)
        bad = BadRows(source, rest.pop("on_bad_rows", "raise"))
        parser = RowParser(**rest)
        parsed = parser.parse(rows(bad) if callable(rows) else rows, bad, place)
        columns, groups = parsed.columns, []
        for entry in parsed.scored:
            where = place.format(n=entry.number, i=entry.number - 1)
            limit, seed = parser.max_pairs_per_prompt, (parser.seed, entry.number)
            try:
                texts, numbers = _scored(entry.responses, entry.scores, where, "completions[{j}]", bad)
                better, worse = _ordered_pairs(texts, numbers, limit, seed, where)
            except PreferenceDataError as error:
                bad.meet(error, where)
                continue
            groups.append(_add_scored(columns, entry.prompt, texts, numbers, (better, worse), entry.group, entry.extra))
        bad.finish(len(columns.prompt), way_out)
        logger.info("%s: read as %s", source, parsed.layout)
        for note in parsed.notes:
            logger.warning("%s: %s", source, note)
        return cls(columns, candidates=groups, dropped=bad.dropped, layout=parsed.layout, notes=parsed.notes)

    # --- from scores, rankings and votes ---------------------------------------------------------------------

    @classmethod
    def from_scores(
        cls,
        prompts: Sequence[Text],
        candidates: Sequence[Sequence[Text]],
        scores: Sequence[Sequence[float] | np.ndarray] | np.ndarray,
        *,
        group: Sequence[Any] | None = None,
        max_pairs_per_prompt: int | None = None,
        seed: int = 0,
        on_bad_rows: str = "raise",
        ties: str = "half",
    ) -> PreferencePairs:
        """Make a pair of every two candidates of a prompt; the one with the higher score is chosen.

        The column ``margin`` holds the difference of scores; ``.candidates`` keeps each prompt's whole set. Candidates
        with equal scores are a tie, a pair with probability ½: without them b would be too certain. A text that stands
        twice among the candidates is never paired with itself.

        Args:
            prompts: P texts.
            candidates: for each prompt a list of n_p texts; n_p may differ.
            scores: for each prompt n_p finite numbers, higher is better.
            group: P values of what belongs together beyond the prompt, or None.
            max_pairs_per_prompt: draw at most so many of a prompt's pairs, uniformly; None takes all.
            seed: seed of that draw.
            on_bad_rows: "drop" leaves out bad candidates, and prompts that make no pair.
            ties: "half" keeps ties, "drop" leaves them out.

        Raises:
            PreferenceDataError: a score is not a finite number, a text is blank, a prompt has fewer than two
                candidates or, with ties="drop", only ties; or all prompts have only ties.
            ValueError: the lengths disagree, or a prompt makes millions of pairs without a limit.
        """
        _check_choice("ties", ties, ("half", "drop"))
        check_pair_limit(max_pairs_per_prompt)
        _check_lengths(prompts, group, candidates=candidates, scores=scores)
        bad = BadRows("scores", on_bad_rows)
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
        bad.finish(len(columns.prompt))
        return cls(columns, candidates=groups, dropped=bad.dropped)

    @classmethod
    def from_rankings(
        cls,
        prompts: Sequence[Text],
        rankings: Sequence[Sequence[Any]],
        *,
        group: Sequence[Any] | None = None,
        max_pairs_per_prompt: int | None = None,
        seed: int = 0,
        on_bad_rows: str = "raise",
        ties: str = "half",
    ) -> PreferencePairs:
        """Make pairs from texts ranked best first; a list of texts in the place of a text is a tie.

        The score of a text, and so ``margin``, counts the ranks below it. For the rest see :meth:`from_scores`.
        """
        _check_lengths(prompts, group, rankings=rankings)
        candidates: list[list[Text]] = []
        scores: list[list[float]] = []
        for ranking in rankings:
            tiers = [list(rank) if _is_tie(rank) else [rank] for rank in ranking]
            candidates.append([text for tier in tiers for text in tier])
            scores.append([float(len(tiers) - n) for n, tier in enumerate(tiers, 1) for _ in tier])
        return cls.from_scores(
            prompts,
            candidates,
            scores,
            group=group,
            max_pairs_per_prompt=max_pairs_per_prompt,
            seed=seed,
            on_bad_rows=on_bad_rows,
            ties=ties,
        )

    @classmethod
    def from_votes(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        soft: bool = True,
        weight: str = "total",
        ties: str | None = None,
        prior: float | None = 0.0,
        prompt_key: str | None = "prompt",
        group_key: str = "group",
        on_bad_rows: str = "raise",
    ) -> PreferencePairs:
        """Make pairs from rows of counted votes: ``prompt, a, b, votes_a, votes_b`` and, if any, ``votes_tie``.

        The side with more votes is chosen. With v₁ ≥ v₂ the votes of the two sides, t the undecided ones and
        n = v₁ + v₂ + t, the probability is (v₁ + t/2 + prior) / (n + 2 prior).

        Args:
            rows: one row a pair; vote counts are numbers ≥ 0; other columns are kept.
            soft: keep the probability; False takes the majority's word as certain.
            weight: "total" for n, "margin" for v₁ − v₂, "one" for 1, "effective" for how many single votes on
                different pairs the n are worth (:func:`pfm.preferences.soft_labels`).
            ties: where v₁ = v₂: "half" keeps the row with probability ½ (needs ``soft``); "drop" leaves it out and
                counts it as ``dropped["tie"]``. None: "half" if ``soft``, else "drop".
            prior: votes for either side that are added to every pair, so that one vote makes nothing certain; None
                finds how many (:func:`pfm.preferences.fit_prior`).
            prompt_key, group_key: columns of the prompt, and of what belongs together beyond it, as for rows
                (:class:`pfm.data.rows.RowOptions`).
            on_bad_rows: "raise" or "drop".

        Raises:
            PreferenceDataError: a row is bad, has no vote at all, or nothing but ties is left.
        """
        _check_choice("weight", weight, ("total", "one", "margin", "effective"))
        ties = ("half" if soft else "drop") if ties is None else ties
        _check_choice("ties", ties, ("drop", "half"))
        if ties == "half" and not soft:
            raise ValueError('ties="half" needs soft=True: a hard label has no half; use ties="drop"')
        if prior is not None and not (math.isfinite(prior) and prior >= 0):
            raise ValueError(f"prior must be a number of votes >= 0, or None to be found, got {prior}")
        if prior is None:
            rows = list(rows)
            prior = _vote_prior(rows)
        a_priori = prior
        place = "row {n} (rows[{i}])"

        def pairs(bad: BadRows) -> NumberedRows:
            return vote_rows(_numbered(rows), bad, place, soft=soft, weight=weight, ties=ties, prior=a_priori)

        options: RowOptions = {"prompt_key": prompt_key, "group_key": group_key, "on_bad_rows": on_bad_rows}
        way_out = '; ties="half" keeps ties' if ties == "drop" else ""
        return cls._from_numbered(pairs, "votes", place, options, way_out)

    # --- rows ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"PreferencePairs(rows={len(self)}, prompts={len(set(self._identities))})"

    @overload
    def __getitem__(self, index: slice) -> PreferencePairs: ...
    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def __getitem__(self, index: slice | int) -> PreferencePairs | dict[str, Any]:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        i = operator.index(index)
        row = {"prompt": self._prompt[i], "chosen": self._chosen[i], "rejected": self._rejected[i]}
        for name, column in self._optional_columns().items():
            if column[i] is not None:
                row[name] = column[i]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def _optional_columns(self) -> dict[str, list[Any]]:
        own = {"weight": self.weight, "probability": self.probability, "group": self.group}
        return {name: column for name, column in own.items() if column is not None} | self.extra

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a row, whole or not at all; ``.gz`` and ``.xz`` compress.

        Reading the file gives the same pairs. Candidate sets are not rows and are not written.

        Raises:
            TypeError: an extra column holds something that JSON has no form for.
        """
        write_lines(path, (json.dumps(row, ensure_ascii=False, default=_json_value) for row in self))

    def select(self, indices: Iterable[int] | np.ndarray) -> PreferencePairs:
        """Take rows by number, in that order, or by a mask of N booleans.

        Candidate sets stay with the prompts that remain; ``dropped`` and ``notes`` tell of loading and start empty.

        Raises:
            IndexError: a number lies outside of the rows.
            TypeError: the indices are neither integers nor booleans.
            ValueError: a mask does not have N entries.
        """
        taken = _row_numbers(indices, len(self))
        remaining = {self._identities[i] for i in taken}
        candidates = [c for c in self.candidates if prompt_identity(c.prompt, c.group) in remaining]
        return PreferencePairs(
            self._columns(taken), candidates=candidates, layout=self.layout, has_prompts=self.has_prompts
        )

    def swap(self) -> PreferencePairs:
        """Exchange chosen and rejected, and negate scores: the control that must turn every gain round."""
        candidates = [replace(c, scores=[-score for score in c.scores]) for c in self.candidates]
        return self._flipped([True] * len(self), candidates)

    def shuffle_labels(self, seed: int = 0) -> PreferencePairs:
        """Exchange chosen and rejected by a coin toss a row, and permute scores within each prompt.

        This is the control in which nothing can be learned.
        """
        generator = np.random.default_rng(seed)
        flip = (generator.random(len(self)) < 0.5).tolist()
        candidates = [replace(c, scores=generator.permutation(c.scores).tolist()) for c in self.candidates]
        return self._flipped(flip, candidates)

    def _flipped(self, flip: Sequence[bool], candidates: Sequence[CandidateGroup]) -> PreferencePairs:
        return PreferencePairs(
            self._columns(range(len(self)), flip=flip),
            candidates=candidates,
            dropped=self.dropped,
            layout=self.layout,
            notes=self.notes,
            has_prompts=self.has_prompts,
        )

    def _columns(self, taken: Sequence[int], flip: Sequence[bool] | None = None) -> Columns:
        first, second = self._chosen, self._rejected
        flip = flip or [False] * len(taken)
        none = [None] * len(self)
        return Columns(
            prompt=[self._prompt[i] for i in taken],
            chosen=[second[i] if turned else first[i] for i, turned in zip(taken, flip, strict=True)],
            rejected=[first[i] if turned else second[i] for i, turned in zip(taken, flip, strict=True)],
            weight=[(self.weight or none)[i] for i in taken],
            probability=[(self.probability or none)[i] for i in taken],
            group=[(self.group or none)[i] for i in taken],
            extra=[{name: column[i] for name, column in self.extra.items()} for i in taken],
        )

    @cached_property
    def _identities(self) -> list[PromptIdentity]:
        groups = self.group or [None] * len(self)
        return [prompt_identity(prompt, group) for prompt, group in zip(self.prompts, groups, strict=True)]

    # --- split, describe, encode -----------------------------------------------------------------------------

    def split(
        self, held_out: float = 0.1, seed: int = 0, *, by: str = "prompt"
    ) -> tuple[PreferencePairs, PreferencePairs]:
        """Split into (train, held out): no prompt stands on both sides.

        Which prompts are held out depends on their texts and the seed alone, not on the order of the rows.

        Args:
            held_out: share of the prompts to hold out, in (0, 1); at least one prompt on each side.
            seed: the same seed gives the same split.
            by: ``"prompt"``; or ``"group"``, to keep whole groups - topics, debates, raters - on one side too, and
                then the share is of the groups. Rows without a prompt are told apart by their group in both.

        Raises:
            ValueError: ``held_out`` or ``by`` is out of range, or there are not two prompts to separate.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
        _check_choice("by", by, ("prompt", "group"))
        keys = self._split_keys(seed, by)
        units = sorted(set(keys))
        if len(units) < 2:
            prompts = len(set(self._identities))
            linked = "belong to one prompt" if prompts == 1 else f"and {prompts} prompts are linked by their groups"
            raise ValueError(
                f"cannot hold a prompt out: all {len(self)} rows {linked}; add rows of other prompts, hold rows "
                "out by number with select(), or, for rows without a prompt, give a group column to split by"
            )
        count = min(max(round(held_out * len(units)), 1), len(units) - 1)
        out = set(units[:count])
        mask = np.array([key in out for key in keys])
        return self.select(~mask), self.select(mask)

    def _split_keys(self, seed: int, by: str) -> list[str]:
        """Return for each row the random key of its unit: its prompt, or all prompts that groups join to it."""
        prompt_keys: dict[PromptIdentity, str] = {}
        groups = self.group or [None] * len(self)
        for identity, (prompt, group) in zip(self._identities, zip(self.prompts, groups, strict=True), strict=True):
            # Of texts that are one prompt the smallest key counts: neither their order nor the normal form matters.
            exact = (prompt, None if identity[0] else group)
            key = hashlib.blake2b(f"{seed}\0{exact}".encode(), digest_size=16).hexdigest()
            prompt_keys[identity] = min(prompt_keys.get(identity, key), key)
        if self.group is None or by == "prompt":
            return [prompt_keys[identity] for identity in self._identities]
        # union-find over prompt keys; the smallest key of a unit stands for it, so row order does not matter
        parent = {key: key for key in prompt_keys.values()}

        def root(key: str) -> str:
            while parent[key] != key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        of_group: dict[Any, str] = {}
        for identity, group in zip(self._identities, self.group, strict=True):
            if group is not None:
                low, high = sorted((root(prompt_keys[identity]), root(of_group.get(group, prompt_keys[identity]))))
                parent[high] = of_group[group] = low
        return [root(prompt_keys[identity]) for identity in self._identities]

    def describe(self) -> PairsSummary:
        """Count and measure the rows; print the result, or show it with rich."""
        texts = dict.fromkeys(self.chosen) | dict.fromkeys(self.rejected)
        words = {text: len(training_text(text).split()) for text in texts}
        chosen = np.array([words[text] for text in self.chosen])
        rejected = np.array([words[text] for text in self.rejected])
        return PairsSummary(
            rows=len(self),
            prompts=len(set(self._identities)),
            responses=len(texts),
            without_prompt=sum(not prompt for prompt in self.prompts),
            chosen_words=_quantiles(chosen),
            rejected_words=_quantiles(rejected),
            chosen_longer=float((chosen > rejected).mean()) if len(self) else math.nan,
            weight=_range(self.weight),
            probability=_range(self.probability),
            groups=0 if self.group is None else len(set(self.group) - {None}),
            candidates=_quantiles(np.array([len(entry.texts) for entry in self.candidates])),
            extra=list(self.extra),
            dropped=dict(self.dropped),
            layout=self.layout,
            notes=tuple(self.notes),
        )

    def encode(
        self, encoder: Any, *, context: bool = True, reasoning: str = "strip", progress: bool = True
    ) -> EncodedPairs:
        """Encode every distinct text once.

        Args:
            encoder: has ``encode(texts) -> (M, *D)``, with or without the keyword ``progress``, and, optionally,
                ``encode_prompts`` of the same form for prompts and ``describe() -> dict``, which is kept as provenance;
                or a loaded ``SentenceTransformer``.
            context: False leaves the prompts out: pairs without contexts.
            reasoning: "strip" encodes the answer after hidden reasoning alone (:mod:`pfm.reasoning`), "keep" the whole.
            progress: show a progress bar.

        Returns:
            Pairs whose ``group`` numbers the prompts in order of appearance; texts that are one prompt
            (:mod:`pfm.data.identity`) share a number, and have contexts of their own. Candidate sets, where there are
            any, name their context, or without contexts their prompt's number. Without prompts (``has_prompts``) there
            are no contexts; beside rows with a prompt, an empty one is encoded as "(no prompt)".

        Raises:
            ValueError: the encoder returns another number of vectors than it was given texts.
        """
        from pfm.data.encoded import EncodedPairs
        from pfm.encoders import as_encoder

        encoder, reasoning = as_encoder(encoder), checked_reasoning(reasoning)
        outputs: dict[str, int] = {}
        chosen = [outputs.setdefault(text, len(outputs)) for text in self.chosen]
        rejected = [outputs.setdefault(text, len(outputs)) for text in self.rejected]
        identities: dict[PromptIdentity, int] = {}
        groups = [identities.setdefault(identity, len(identities)) for identity in self._identities]
        with_context = context and self.has_prompts
        # Without contexts a candidate set is found by its prompt's number, with them by its text's.
        texts: dict[Any, int] = {}
        text_index = [texts.setdefault(prompt, len(texts)) for prompt in self.prompts]
        candidates = [
            (
                texts.setdefault(entry.prompt, len(texts))
                if with_context
                else identities[prompt_identity(entry.prompt, entry.group)],
                torch.tensor([outputs.setdefault(text, len(outputs)) for text in entry.texts]),
                torch.tensor(entry.scores, dtype=torch.float32),
            )
            for entry in self.candidates
        ]
        contexts = None
        if with_context:
            encode_prompts = getattr(encoder, "encode_prompts", encoder.encode)
            contexts = _encode(encode_prompts, [text or EMPTY_PROMPT for text in texts], progress)
        return EncodedPairs.from_table(
            _encode(encoder.encode, [training_text(text, reasoning) for text in outputs], progress),
            torch.tensor(chosen),
            torch.tensor(rejected),
            contexts=contexts,
            context_index=None if contexts is None else torch.tensor(text_index),
            weight=self.weight,
            probability=self.probability,
            group=torch.tensor(groups),
            encoder=encoder.describe() or None,
            candidates=candidates or None,
        )


@dataclass(frozen=True)
class PairsSummary:
    """Say in numbers what a set of pairs holds; prints as a table.

    ``chosen_words``, ``rejected_words`` and ``candidates`` (texts in a candidate set) are quantiles by name, empty
    where there is nothing to measure; ``chosen_longer`` is the share of rows whose chosen response has more
    words; ``weight`` and ``probability`` give minimum, mean and maximum, or None.
    """

    rows: int
    prompts: int
    responses: int
    without_prompt: int
    chosen_words: dict[str, float]
    rejected_words: dict[str, float]
    chosen_longer: float
    weight: dict[str, float] | None
    probability: dict[str, float] | None
    groups: int
    candidates: dict[str, float]
    extra: list[str]
    dropped: dict[str, int]
    layout: str = ""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """Return (label, value) of everything worth showing."""
        optional = {
            "layout": self.layout,
            "rows without a prompt": self.without_prompt and f"{self.without_prompt:,}",
            "weight": self.weight and _spread(self.weight),
            "probability": self.probability and _spread(self.probability),
            "groups": self.groups and f"{self.groups:,}",
            "candidates a prompt": self.candidates and _spread(self.candidates),
            "other columns": ", ".join(self.extra),
            "dropped": ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items()),
            "note": "; ".join(self.notes),
        }
        return [
            ("rows", f"{self.rows:,}"),
            ("prompts", f"{self.prompts:,}"),
            ("distinct responses", f"{self.responses:,}"),
            ("words of chosen", _spread(self.chosen_words)),
            ("words of rejected", _spread(self.rejected_words)),
            ("chosen is longer", f"{self.chosen_longer:.1%}"),
            *((label, value) for label, value in optional.items() if value),
        ]

    def __str__(self) -> str:
        lines = self.lines()
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text as RichText

        table = Table("preference pairs", "", show_edge=False)
        for label, value in self.lines():
            table.add_row(label, RichText(value))
        return table


def _numbered(rows: Iterable[Mapping[str, Any]]) -> NumberedRows:
    if type(rows).__name__ == "DataFrame":  # which yields the names of its columns
        raise TypeError("rows must be a list of dictionaries, got a DataFrame; pass frame.to_dict('records')")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"rows must be a list of dictionaries, got {show(rows)}; for a path use from_file")
    return enumerate(rows, 1)


def _vote_prior(rows: Sequence[Any]) -> float:
    """Fit the prior to the rows that are sound; the others are met where rows are read."""
    from pfm.data.votes import fit_prior

    counts = []
    for row in rows:
        try:
            counts.append(vote_counts(row))
        except PreferenceDataError:
            continue
    decided = any(one or two for one, two, _ in counts)
    return fit_prior(*zip(*counts, strict=True)) if decided else 0.0


def _numbers(values: list[float | None]) -> list[float] | None:
    if all(value is None for value in values):
        return None
    return [1.0 if value is None else value for value in values]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_lengths(prompts: Sequence[Text], group: Sequence[Any] | None, **columns: Any) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list with one text a prompt, got the string {prompts!r}")
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(f"{name} must have one entry a prompt: got {len(column)} for {len(prompts)} prompts")
    if group is not None and len(group) != len(prompts):
        raise ValueError(f"group must have one value a prompt: got {len(group)} for {len(prompts)} prompts")


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


def _row_numbers(indices: Iterable[int] | np.ndarray, count: int) -> list[int]:
    numbers = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
    if numbers.dtype == bool:
        if numbers.shape != (count,):
            raise ValueError(f"a mask must have {count} entries, one a row; got shape {numbers.shape}")
        return np.flatnonzero(numbers).tolist()
    if not numbers.size:
        return []
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"indices must be row numbers or a mask, got {numbers.dtype} of shape {numbers.shape}")
    outside = numbers[(numbers < -count) | (numbers >= count)]
    if outside.size:
        raise IndexError(f"row {outside[0]} does not exist: there are {count} rows")
    return (numbers % count).tolist()


def _encode(encode: Callable[..., Tensor], texts: list[str], progress: bool) -> Tensor:
    vectors = torch.as_tensor(encode(texts, progress=progress))
    if len(vectors) != len(texts):
        raise ValueError(f"the encoder must return one vector a text: got {len(vectors)} for {len(texts)} texts")
    return vectors


def _json_value(value: Any) -> Any:
    """Give the plain form of numpy values and of dates, which tables of other libraries hold."""
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"cannot write {show(value)} as JSON; remove or convert the column that holds it")


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{q:.0%}": float(np.quantile(values, q)) for q in _QUANTILES}


def _range(values: list[float] | None) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)}


def _spread(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:,.4g}" for name, value in values.items())

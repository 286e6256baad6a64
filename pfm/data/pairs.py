"""Preference pairs as text: load, check, split by prompt, describe and encode them."""

from __future__ import annotations

import json
import logging
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from pfm._internal.checks import check_choice, check_number, check_seed
from pfm._internal.moved import renamed_method
from pfm.data.candidates import CandidateGroup, add_scored_rows, ranked_candidates, scored_columns
from pfm.data.conversations import Text, conversation_text, joined_text
from pfm.data.errors import BadRows, PreferenceDataError
from pfm.data.identity import PromptIdentity, prompt_identity
from pfm.data.readers import (
    NumberedRows,
    json_value,
    numbered_rows,
    read_csv,
    read_dataset,
    read_json,
    read_jsonl,
    read_parquet,
    reader_for,
    write_lines,
)
from pfm.data.rows import Columns, RowOptions, RowParser
from pfm.data.splits import row_numbers, split_keys
from pfm.data.summary import PairsSummary, extremes, quantiles
from pfm.data.vote_rows import vote_prior, vote_rows
from pfm.reasoning import training_text

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs

__all__ = ["CandidateGroup", "PairsSummary", "PreferenceDataError", "PreferencePairs", "conversation_text"]

logger = logging.getLogger(__name__)


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
        notes: sentences on unusual findings in the rows.
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
        """Load .jsonl (.ndjson), .json, .csv, .tsv or .parquet; ``.gz``, ``.xz`` or ``.bz2`` may follow the suffix.

        Raises:
            PreferenceDataError: the file or, unless ``on_bad_rows="drop"``, a row is bad.
            ValueError: the suffix is unknown.
        """
        return cls._from_file(reader_for(Path(path)), path, options)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], **options: Unpack[RowOptions]) -> PreferencePairs:
        """Load a file with one JSON object a line.

        >>> _ = Path("pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "It rains.", "rejected": "No."}')
        >>> PreferencePairs.from_jsonl("pairs.jsonl").chosen
        ['It rains.']
        """
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
        """Load a list of dictionaries.

        >>> PreferencePairs.from_rows([{"prompt": "Why?", "chosen": "Because it rains.", "rejected": "No."}])
        PreferencePairs(rows=1, prompts=1)
        """
        return cls._from_numbered(numbered_rows(rows), "rows", "row {n} (rows[{i}])", options)

    @classmethod
    def _from_file(
        cls,
        reader: Callable[[Path, BadRows], NumberedRows],
        path: str | os.PathLike[str],
        options: RowOptions,
    ) -> PreferencePairs:
        place = "line {n}" if reader is read_jsonl else "row {n}"
        return cls._from_numbered(lambda bad: reader(Path(path).expanduser(), bad), os.fspath(path), place, options)

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
        columns = parsed.columns
        groups = add_scored_rows(
            columns, parsed.scored, bad, place, max_pairs_per_prompt=parser.max_pairs_per_prompt, seed=parser.seed
        )
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

        >>> pairs = PreferencePairs.from_scores(["Why?"], [["No.", "It rains.", "Rain."]], [[0, 2, 1]])
        >>> list(zip(pairs.chosen, pairs.rejected))
        [('Rain.', 'No.'), ('It rains.', 'No.'), ('It rains.', 'Rain.')]
        """
        seed = check_seed(seed)
        check_choice("ties", ties, ("half", "drop"))
        bad = BadRows("scores", on_bad_rows)
        columns, groups = scored_columns(
            prompts, candidates, scores, bad,
            group=group, max_pairs_per_prompt=max_pairs_per_prompt, seed=seed, ties=ties,
        )  # fmt: skip
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

        >>> len(PreferencePairs.from_rankings(["Why?"], [["It rains.", "Rain.", "No."]]))
        3
        """
        seed = check_seed(seed)
        candidates, scores = ranked_candidates(prompts, rankings, group)
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

        >>> row = {"prompt": "Why?", "a": "It rains.", "b": "No.", "votes_a": 3, "votes_b": 1}
        >>> PreferencePairs.from_votes([row]).probability
        [0.75]
        """
        check_choice("weight", weight, ("total", "one", "margin", "effective"))
        ties = ("half" if soft else "drop") if ties is None else ties
        check_choice("ties", ties, ("drop", "half"))
        if ties == "half" and not soft:
            raise ValueError('ties="half" needs soft=True: a hard label has no half; use ties="drop"')
        prior = check_number("prior", prior, least=0, also=(None,))
        if prior is None:
            rows = list(rows)
            prior = vote_prior(rows)
        a_priori = prior
        place = "row {n} (rows[{i}])"

        def pairs(bad: BadRows) -> NumberedRows:
            return vote_rows(numbered_rows(rows), bad, place, soft=soft, weight=weight, ties=ties, prior=a_priori)

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
        """Write one JSON object a row, whole or not at all; ``.gz``, ``.xz`` and ``.bz2`` compress.

        Reading the file gives the same pairs. Candidate sets are not rows and are not written.

        Raises:
            TypeError: an extra column holds something that JSON has no form for.
        """
        write_lines(path, (json.dumps(row, ensure_ascii=False, default=json_value) for row in self))

    def select(self, indices: Iterable[int] | np.ndarray) -> PreferencePairs:
        """Take rows by number, in that order, or by a mask of N booleans.

        Candidate sets stay with the prompts that remain; ``dropped`` and ``notes`` describe loading and start empty.

        Raises:
            IndexError: a number lies outside of the rows.
            TypeError: the indices are neither integers nor booleans.
            ValueError: a mask does not have N entries.
        """
        taken = row_numbers(indices, len(self))
        remaining = {self._identities[i] for i in taken}
        candidates = [c for c in self.candidates if prompt_identity(c.prompt, c.group) in remaining]
        return PreferencePairs(
            self._columns(taken), candidates=candidates, layout=self.layout, has_prompts=self.has_prompts
        )

    def swap(self) -> PreferencePairs:
        """Exchange chosen and rejected, and negate scores: the control in which every gain must change its sign."""
        candidates = [replace(c, scores=[-score for score in c.scores]) for c in self.candidates]
        return self._flipped([True] * len(self), candidates)

    def shuffle_labels(self, seed: int = 0) -> PreferencePairs:
        """Exchange chosen and rejected in each row with probability 1/2, and permute scores within each prompt.

        This is the control in which nothing can be learned.
        """
        seed = check_seed(seed)
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
        """Split into (train, held out): no prompt is on both sides.

        Which prompts are held out depends on their texts and the seed alone, not on the order of the rows.

        Args:
            held_out: share of the prompts to hold out, in (0, 1); at least one prompt on each side.
            seed: the same seed gives the same split.
            by: ``"prompt"``; or ``"group"``, to keep whole groups - topics, debates, raters - on one side too, and
                then the share is of the groups. Rows without a prompt are distinguished by their group in both.

        Raises:
            ValueError: ``held_out`` or ``by`` is out of range, or there are not two prompts to separate.

        >>> rows = [{"prompt": str(n // 2), "chosen": f"yes {n}", "rejected": "no"} for n in range(8)]
        >>> train, held_out = PreferencePairs.from_rows(rows).split(held_out=0.25, seed=0)
        >>> len(train), len(held_out), set(train.prompts) & set(held_out.prompts)
        (6, 2, set())
        """
        seed = check_seed(seed)
        held_out = check_number("held_out", held_out, above=0, below=1)
        check_choice("by", by, ("prompt", "group"))
        groups = self.group or [None] * len(self)
        keys = split_keys(self.prompts, groups, self._identities, seed, join_groups=by == "group")
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

    def summary(self) -> PairsSummary:
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
            chosen_words=quantiles(chosen),
            rejected_words=quantiles(rejected),
            chosen_longer=float((chosen > rejected).mean()) if len(self) else math.nan,
            weight=extremes(self.weight),
            probability=extremes(self.probability),
            groups=0 if self.group is None else len(set(self.group) - {None}),
            candidates=quantiles(np.array([len(entry.texts) for entry in self.candidates])),
            extra=list(self.extra),
            dropped=dict(self.dropped),
            layout=self.layout,
            notes=tuple(self.notes),
        )

    describe = renamed_method("describe", "summary")

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

        >>> from pfm.encoders import SurfaceEncoder
        >>> pairs = PreferencePairs.from_rows([{"prompt": "Why?", "chosen": "It rains.", "rejected": "No."}])
        >>> pairs.encode(SurfaceEncoder(), progress=False)
        EncodedPairs(1 pairs of (28,), context 28)
        """
        from pfm.data.encoding import encode_columns

        return encode_columns(
            encoder, self.prompts, self.chosen, self.rejected, self._identities, self.candidates,
            context=context and self.has_prompts, reasoning=reasoning, progress=progress,
            weight=self.weight, probability=self.probability,
        )  # fmt: skip


def _numbers(values: list[float | None]) -> list[float] | None:
    if all(value is None for value in values):
        return None
    return [1.0 if value is None else value for value in values]

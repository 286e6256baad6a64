"""Bring every common row format to one: prompt, chosen, rejected.

A *text* is a string or a conversation (:mod:`pfm.data.conversations`). A null value counts as an absent column
everywhere, and so does NaN in columns of text, groups and labels.

How the prompt of rows with ``chosen`` and ``rejected`` is found, decided once for all rows of a source:

1. ``prompt_key`` names its column, or a column has a name that is known (:mod:`pfm.data.layouts`); rows without it are
   bad.
2. Else the responses hold it, if most of them do: transcripts of ``Human:`` and ``Assistant:``
   (:mod:`pfm.data.transcripts`), or conversations whose first turns are the same.
3. Else, if another column of text could hold it, reading stops and names the columns.
4. Else it is the opening that chosen and rejected share, if more than half of the rows share one of at least three
   words (of a single row, any whole words); rows that share less have no prompt.
5. Else there are no prompts.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Number
from typing import Any, TypedDict

import numpy as np

from pfm.data.checks import (
    DIFFERENCE,
    check_pair_limit,
    checked_prompt,
    checked_response,
    choose_pairs,
    optional_number,
    require,
    response,
)
from pfm.data.conversations import Text, joined_text, shared_turns
from pfm.data.errors import BadRows, PreferenceDataError, show
from pfm.data.identity import PromptIdentity, given_group, is_missing, name_form, prompt_identity
from pfm.data.implicit import ImplicitPrompt, conversational_prompt, opening_prompt, split_prompt
from pfm.data.labels import read_label
from pfm.data.layouts import (
    REPEATED_LAYOUT,
    SCORED_LAYOUT,
    STANDARD_LAYOUT,
    SYSTEM_COLUMNS,
    TEXT_COLUMNS,
    Prompt,
    find_prompt,
    prompt_candidates,
    scored_row,
    standard_row,
)
from pfm.data.readers import NumberedRows
from pfm.data.stringified import parse_columns
from pfm.data.transcripts import is_transcript, split_transcript

__all__ = ["Columns", "ParsedRows", "RowOptions", "RowParser", "ScoredCandidates", "separate"]

logger = logging.getLogger(__name__)


#: Names that rows have on the way out; no extra column may take one of them.
STANDARD_COLUMNS = ("prompt", "chosen", "rejected", "weight", "probability", "group")


@dataclass
class Columns:
    """Hold checked pairs column by column; None where a row has no such value."""

    prompt: list[Text] = field(default_factory=list)
    chosen: list[Text] = field(default_factory=list)
    rejected: list[Text] = field(default_factory=list)
    weight: list[float | None] = field(default_factory=list)
    probability: list[float | None] = field(default_factory=list)
    group: list[Any] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)

    def add(self, prompt, chosen, rejected, weight=None, probability=None, group=None, extra=None) -> None:
        """Append one pair."""
        self.prompt.append(prompt)
        self.chosen.append(chosen)
        self.rejected.append(rejected)
        self.weight.append(weight)
        self.probability.append(probability)
        self.group.append(group)
        self.extra.append(extra or {})


class RowOptions(TypedDict, total=False):
    """Options of everything that reads rows.

    ``prompt_key`` ("prompt"), ``chosen_key`` ("chosen"), ``rejected_key`` ("rejected"): names of the columns. Another
    ``prompt_key`` takes that column alone; None says that no column holds the prompt.
    ``weight_key`` (None): column of the pair's weight, a finite number ≥ 0; None takes "weight" where present.
    ``group_key`` ("group"): column, optional unless renamed, of what belongs together beyond the prompt.
    ``max_pairs_per_prompt`` (None) and ``seed`` (0): how many pairs unpaired rows may make of one prompt.
    ``on_bad_rows`` ("raise"): "drop" counts bad rows by reason instead, and warns once.
    """

    prompt_key: str | None
    chosen_key: str
    rejected_key: str
    weight_key: str | None
    group_key: str
    max_pairs_per_prompt: int | None
    seed: int
    on_bad_rows: str


@dataclass
class ScoredCandidates:
    """Hold the responses to one prompt with their scores, as a row gave them; ``number`` is the row's."""

    number: int
    prompt: Text
    responses: list[Any]
    scores: list[float]
    group: Any
    extra: dict[str, Any]


@dataclass
class ParsedRows:
    """Holds the result of reading the rows of one source.

    Attributes:
        columns: the pairs.
        scored: rows of several responses with scores, of which pairs are yet to be made.
        layouts: how each row was laid out, by its number.
        filled, empty: numbers of the rows with and without a prompt.
        notes: sentences on what a user should know of the rows.
    """

    columns: Columns = field(default_factory=Columns)
    scored: list[ScoredCandidates] = field(default_factory=list)
    layouts: dict[int, str] = field(default_factory=dict)
    filled: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str:
        """Name the layouts, the most frequent first."""
        return "; ".join(name for name, _ in Counter(self.layouts.values()).most_common())

    def note_other_columns(self, rows: Sequence[Mapping[str, Any]], prompts: Iterable[Any], used: set[str]) -> None:
        """Note which columns of text are not part of the prompt, where a reader could think that they are."""
        used = used.union(*(found.columns for found in prompts if isinstance(found, Prompt)))
        if self.filled and set(self.layouts.values()) <= {STANDARD_LAYOUT, REPEATED_LAYOUT}:
            rows = [{name: row[name] for name in SYSTEM_COLUMNS if name in row} for row in rows]
        others = prompt_candidates(rows, used)
        if others:
            self.notes.append(f"columns of text that are not part of the prompt: {', '.join(map(repr, others))}")

    def note_empty_prompts(self, place: str) -> None:
        """Note which rows have no prompt, where others have one."""
        if not (self.empty and self.filled):
            return
        unit = place.partition(" ")[0]
        more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
        shown = ", ".join(map(str, self.empty[:5])) + more
        self.notes.append(
            f"{len(self.empty)} of {len(self.empty) + len(self.filled)} rows have an empty prompt ({unit} {shown}): "
            'they are encoded as "(no prompt)", and count as one prompt, or as one a group'
        )


@dataclass
class RowParser:
    """Parse the rows of one source, in any format; the fields are those of ``RowOptions``."""

    prompt_key: str | None = "prompt"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    weight_key: str | None = None
    group_key: str = "group"
    max_pairs_per_prompt: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_pair_limit(self.max_pairs_per_prompt)
        keys = [key for key in (self.prompt_key, self.chosen_key, self.rejected_key) if key is not None]
        self._keys = tuple(dict.fromkeys(keys))
        self._texts = tuple(dict.fromkeys((*keys, *TEXT_COLUMNS)))
        self._emptied = {*self._texts, *SYSTEM_COLUMNS, "input", "history", "label", self.group_key}
        used = {*keys, self.group_key, self.weight_key or "weight", "probability", "conversations"}
        self._used = used | set(STANDARD_COLUMNS)
        self._has_groups = False

    def parse(self, rows: NumberedRows, bad: BadRows, place: str) -> ParsedRows:
        """Parse numbered rows. ``place`` names a row in messages: a template of n (from 1) and i (from 0).

        Raises:
            PreferenceDataError: another column of text could hold the prompt; or a row is bad, and those are raised.
        """

        def refuse(number: int, error: PreferenceDataError) -> None:
            bad.meet(error, place.format(n=number, i=number - 1))

        parsed = ParsedRows()
        sound = parse_columns(self._standard(rows, parsed, refuse), self._texts, refuse)
        self._has_groups = any(self.group_key in row for _, row in sound)
        prompts = [self._find_prompt(row) for _, row in sound]
        implicit = None
        if not any(isinstance(found, Prompt) for found in prompts) and self.prompt_key in (None, "prompt"):
            implicit = self._choose_implicit([row for _, row in sound if self._is_pair(row)], bad.source)
        unpaired: dict[PromptIdentity, _Rated] = {}
        for (number, row), found in zip(sound, prompts, strict=True):
            try:
                if isinstance(found, PreferenceDataError):
                    raise found
                if self._is_pair(row):
                    self._add_pair(row, found, implicit, number, parsed)
                elif self._is_scored(row):
                    self._add_scored(row, found, number, parsed)
                else:
                    self._add_rated(row, found, number, unpaired, parsed)
            except PreferenceDataError as error:
                refuse(number, error)
        for position, rated in enumerate(unpaired.values()):
            self._add_product(rated, position, parsed.columns, bad, place)
        parsed.note_empty_prompts(place)
        parsed.note_other_columns([row for _, row in sound], prompts, self._used)
        return parsed

    def _standard(
        self, rows: NumberedRows, parsed: ParsedRows, refuse: Callable[[int, PreferenceDataError], None]
    ) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the rows that are objects, with standard names where their layout is known, and nulls for NaN."""
        sound: list[tuple[int, Mapping[str, Any]]] = []
        respelled: dict[str, str] = {}
        for number, row in rows:
            try:
                if not isinstance(row, Mapping):
                    raise PreferenceDataError(f"got {show(row)}; expected an object with columns", reason="wrong type")
                row = self._in_case(row, respelled)
                if row.get(self.chosen_key) is None and row.get(self.rejected_key) is None:
                    row, layout = standard_row(row)
                    if layout is not None:
                        parsed.layouts[number] = layout
                missing = [name for name in self._emptied if row.get(name) is not None and is_missing(row[name])]
                sound.append((number, {**row, **dict.fromkeys(missing)} if missing else row))
            except PreferenceDataError as error:
                refuse(number, error)
        for column, name in respelled.items():
            parsed.notes.append(f"the column {column!r} was read as {name!r}: the two differ in {DIFFERENCE} only")
        return sound

    def _in_case(self, row: Mapping[str, Any], respelled: dict[str, str]) -> Mapping[str, Any]:
        """Return the row with "Prompt" as "prompt" where the column is found under a name so near only, and note it."""
        missing = {name_form(name): name for name in self._keys if name not in row}
        if not missing:
            return row
        near = [name for name in row if isinstance(name, str) and name_form(name) in missing]
        found = {name: missing[name_form(name)] for name in near}
        if not found or len(set(found.values())) < len(found):  # two may be meant
            return row
        respelled |= found
        return {found.get(name, name): value for name, value in row.items()}

    def _is_pair(self, row: Mapping[str, Any]) -> bool:
        return not self._is_scored(row) and not self._is_unpaired(row)

    def _is_unpaired(self, row: Mapping[str, Any]) -> bool:
        if row.get(self.chosen_key) is not None or row.get(self.rejected_key) is not None:
            return False
        return row.get("completion") is not None or row.get("label") is not None

    def _is_scored(self, row: Mapping[str, Any]) -> bool:
        if row.get(self.chosen_key) is not None or row.get(self.rejected_key) is not None:
            return False
        return row.get("completion") is None and row.get("completions") is not None

    def _find_prompt(self, row: Mapping[str, Any]) -> Prompt | PreferenceDataError | None:
        if self.prompt_key == "prompt":
            try:
                return find_prompt(row)
            except PreferenceDataError as error:  # raised where the row is read, with its place
                return error
        if self.prompt_key is None or row.get(self.prompt_key) is None:
            return None
        return Prompt(row[self.prompt_key], (self.prompt_key,))

    def _choose_implicit(self, rows: Sequence[Mapping[str, Any]], source: str) -> ImplicitPrompt:
        """Choose how the responses of all rows hold their prompts.

        Raises:
            PreferenceDataError: another column could hold them.
        """
        pairs: list[tuple[Text, Text]] = []
        for row in rows:
            try:
                pairs.append((response(row, self.chosen_key), response(row, self.rejected_key)))
            except PreferenceDataError:  # raised where the row is read
                continue
        found = conversational_prompt(pairs)
        others = [] if found or self.prompt_key is None or not pairs else prompt_candidates(rows, self._used)
        if others:
            named = " and ".join(map(repr, others))
            columns = ", ".join(map(repr, dict.fromkeys(name for row in rows for name in row)))
            raise PreferenceDataError(
                f"there is no column 'prompt', and {named} may hold the prompts; columns found: {columns}; name the "
                f"one that does, as in prompt_key={others[0]!r}, or say that none does with prompt_key=None",
                reason="no prompt column",
                source=source,
            )
        return found or opening_prompt(pairs)

    def _checked_prompt(self, row: Mapping[str, Any], found: Prompt | None, number: int, parsed: ParsedRows) -> Text:
        """Return the prompt of a row that must have one by its columns."""
        if found is None:
            value = require(row, self.prompt_key or "prompt", "prompt_key")
            found = Prompt(value, (self.prompt_key or "prompt",))
        prompt = checked_prompt(found.text, found.columns[-1])
        parsed.layouts.setdefault(number, found.layout)
        (parsed.filled if prompt else parsed.empty).append(number)
        return prompt

    def _add_pair(
        self,
        row: Mapping[str, Any],
        found: Prompt | None,
        implicit: ImplicitPrompt | None,
        number: int,
        parsed: ParsedRows,
    ) -> None:
        chosen = response(row, self.chosen_key, "chosen_key")
        rejected = response(row, self.rejected_key, "rejected_key")
        if implicit is None:
            prompt = self._checked_prompt(row, found, number, parsed)
            prompt, own, rejected = separate(prompt, chosen, rejected)
            if len(own) < len(chosen) and parsed.layouts[number] == STANDARD_LAYOUT:
                parsed.layouts[number] = REPEATED_LAYOUT
            chosen = own
        else:
            prompt, chosen, rejected = implicit.split(chosen, rejected)
            chosen = checked_response(chosen, self.chosen_key)
            rejected = checked_response(rejected, self.rejected_key)
            parsed.layouts.setdefault(number, implicit.layout)
            (parsed.filled if prompt else parsed.empty).append(number)
        if joined_text(chosen).strip() == joined_text(rejected).strip():
            raise PreferenceDataError(
                f"chosen and rejected are the same text, {reprlib.repr(joined_text(chosen))}; "
                "expected two different responses",
                reason="identical pair",
            )
        extra = self._extra(row, found)
        probability, weight = optional_number(row, "probability", highest=1.0), self._weight(row)
        votes = extra.get("votes")
        if probability is None and isinstance(votes, Mapping) and {"chosen", "rejected"} <= votes.keys():
            probability, total = _voted(votes)
            weight = total if weight is None else weight
        parsed.columns.add(prompt, chosen, rejected, weight, probability, self._group(row), extra)

    def _extra(self, row: Mapping[str, Any], found: Prompt | None) -> dict[str, Any]:
        used = self._used if found is None else self._used.union(found.columns)
        return {name: value for name, value in row.items() if name not in used}

    def _weight(self, row: Mapping[str, Any]) -> float | None:
        if self.weight_key is not None:
            require(row, self.weight_key, "weight_key")
        return optional_number(row, self.weight_key or "weight")

    def _group(self, row: Mapping[str, Any]) -> Any:
        if self.group_key != "group" and not self._has_groups:
            require(row, self.group_key, "group_key")
        group = given_group(row.get(self.group_key))
        if group is not None and not isinstance(group, str | Number):
            raise PreferenceDataError(
                f"got {show(group)}; expected a string or a number",
                reason="wrong type",
                column=self.group_key,
            )
        return group

    def _add_scored(self, row: Mapping[str, Any], found: Prompt | None, number: int, parsed: ParsedRows) -> None:
        scored = scored_row(row)
        parsed.layouts.setdefault(number, SCORED_LAYOUT)
        prompt = self._checked_prompt(row, found, number, parsed)
        extra = self._extra(row, found)
        extra.pop("completions")
        parsed.scored.append(ScoredCandidates(number, prompt, scored.responses, scored.scores, self._group(row), extra))

    def _add_rated(
        self,
        row: Mapping[str, Any],
        found: Prompt | None,
        number: int,
        unpaired: dict[PromptIdentity, _Rated],
        parsed: ParsedRows,
    ) -> None:
        completion = response(row, "completion")
        liked = read_label(require(row, "label"))
        prompt = self._checked_prompt(row, found, number, parsed)
        group = self._group(row)
        identity = prompt_identity(joined_text(prompt), group)
        rated = unpaired.setdefault(identity, _Rated(prompt, group, number))
        (rated.liked if liked else rated.disliked).append((completion, self._weight(row)))

    def _add_product(self, rated: _Rated, position: int, columns: Columns, bad: BadRows, place: str) -> None:
        where = place.format(n=rated.number, i=rated.number - 1)
        liked, disliked = rated.liked, rated.disliked
        if not liked or not disliked:
            error = PreferenceDataError(
                f"all {len(liked) + len(disliked)} completions of this prompt have label "
                f"{str(bool(liked)).lower()}; expected at least one of each",
                reason="prompt with one label only",
            )
            bad.meet(error, where, count=len(liked) + len(disliked))
            return
        total = len(liked) * len(disliked)
        kept = choose_pairs(total, self.max_pairs_per_prompt, (self.seed, position), where)
        pairs = list(product(liked, disliked)) if kept is None else _nth_products(liked, disliked, kept)
        for (chosen, chosen_weight), (rejected, rejected_weight) in pairs:
            if joined_text(chosen).strip() == joined_text(rejected).strip():
                error = PreferenceDataError(
                    f"a completion of this prompt is labelled both true and false: {show(chosen)}",
                    reason="identical pair",
                )
                bad.meet(error, where)
                continue
            weights = [weight for weight in (chosen_weight, rejected_weight) if weight is not None]
            weight = math.prod(weights) if weights else None
            columns.add(rated.prompt, chosen, rejected, weight, group=rated.group)


def _voted(votes: Mapping[str, Any]) -> tuple[float, float]:
    """Return the share of votes for chosen, a tie half, and their number, of a row's column ``votes``."""
    counts = [optional_number(votes, name) or 0.0 for name in ("chosen", "rejected", "tie")]
    total = sum(counts)
    if not total:
        raise PreferenceDataError("nobody voted; expected at least one vote", reason="no votes", column="votes")
    return (counts[0] + counts[2] / 2) / total, total


@dataclass
class _Rated:
    """Completions of one prompt with their weights, by label; ``number`` is the prompt's first row."""

    prompt: Text
    group: Any
    number: int
    liked: list[tuple[Text, float | None]] = field(default_factory=list)
    disliked: list[tuple[Text, float | None]] = field(default_factory=list)


def _nth_products(first: list, second: list, positions: np.ndarray) -> list[tuple[Any, Any]]:
    return [(first[n // len(second)], second[n % len(second)]) for n in positions.tolist()]


def separate(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Bring a pair to (prompt, chosen, rejected) where the responses do not repeat the prompt.

    Conversations that repeat the prompt's turns lose them, and a prompt
    given as a string beside two whole conversations gives way to the turns that these share; likewise beside two
    transcripts of the form ``Human: … Assistant: …``.
    """
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        both = is_transcript(chosen) and is_transcript(rejected)
        cut = split_transcript(chosen, rejected) if both else None
        if cut is None:
            return prompt, chosen, rejected
        return chosen[: cut[0]], checked_response(chosen[cut[0] :], None), checked_response(rejected[cut[1] :], None)
    if isinstance(chosen, list) and isinstance(rejected, list):
        turns = len(prompt)
        if len(chosen) > turns < len(rejected) and chosen[:turns] == rejected[:turns] == prompt:
            return prompt, chosen[turns:], rejected[turns:]
        if chosen[0]["role"] in ("system", "user") and shared_turns(chosen, rejected) > 0:
            shared, *responses = split_prompt(chosen, rejected)
            if isinstance(prompt, list) and shared[-turns:] != prompt:
                shared = [*prompt, *shared]  # such as a system message that stands apart
            return shared, responses[0], responses[1]
    return prompt, chosen, rejected

"""Read preference rows from files and bring every common row format to one: prompt, chosen, rejected.

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

import gzip
import json
import logging
import lzma
import math
import os
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from numbers import Number, Real
from pathlib import Path
from typing import IO, Any, TypeAlias, TypedDict, cast

import numpy as np

from pfm._internal.nesting import parse_json
from pfm.data.conversations import (
    Message,
    Text,
    as_text,
    conversation_text,
    is_blank,
    is_unicode,
    joined_text,
    message_texts,
    shared_turns,
)
from pfm.data.errors import BadRows, PreferenceDataError, not_utf8, show
from pfm.data.identity import PromptIdentity, given_group, is_missing, prompt_identity
from pfm.data.implicit import ImplicitPrompt, conversational_prompt, opening_prompt, split_prompt
from pfm.data.labels import class_name, class_names, read_label
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
from pfm.data.spreadsheets import table_rows
from pfm.data.stringified import parse_columns
from pfm.data.transcripts import is_transcript, split_transcript

__all__ = [
    "BadRows",
    "Columns",
    "Message",
    "NumberedRows",
    "PreferenceDataError",
    "PromptIdentity",
    "RowOptions",
    "RowParser",
    "Text",
    "check_pair_limit",
    "checked_prompt",
    "checked_response",
    "choose_pairs",
    "conversation_text",
    "is_blank",
    "optional_number",
    "prompt_identity",
    "read_csv",
    "read_dataset",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "reader_for",
    "require",
    "response",
    "separate",
    "show",
    "split_prompt",
    "vote_counts",
    "vote_rows",
    "write_lines",
]

logger = logging.getLogger(__name__)

NumberedRows: TypeAlias = Iterable[tuple[int, Any]]

#: Names that rows have on the way out; no extra column may take one of them.
STANDARD_COLUMNS = ("prompt", "chosen", "rejected", "weight", "probability", "group")

#: Pairs that one prompt may give before a limit is asked for: beyond it the lists no longer fit in memory.
MOST_PAIRS_PER_PROMPT = 2_000_000

_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


# --- files ---------------------------------------------------------------------------------------------------


def open_binary(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a file of bytes, through gzip or xz when its name ends in ``.gz`` or ``.xz``."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    return cast(IO[bytes], opener(path, mode))


def read_jsonl(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of each line that is not blank."""
    number, offset = 0, 0
    with open_binary(path) as file:
        lines = iter(file)
        while True:
            number += 1
            try:
                line = next(lines, None)
            except _DAMAGE as error:
                bad.meet(_damaged(error), f"line {number}")
                return
            if line is None:
                return
            if not line.isspace():
                try:
                    yield number, _parse_line(line, number, offset)
                except PreferenceDataError as error:
                    bad.meet(error, f"line {number}")
            offset += len(line)


def _parse_line(line: bytes, number: int, offset: int) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error, offset) from None
    except ValueError as error:
        if line.endswith(b"\n"):
            raise PreferenceDataError(
                f"not valid JSON ({error}); expected one JSON object a line", reason="invalid JSON"
            ) from None
        raise PreferenceDataError(
            f"the last line is cut short ({error}); the file was probably not written to its end",
            reason="truncated last line",
        ) from None


def read_json(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, value) of a file that holds one JSON array."""
    raw = _read_all(path, bad)
    try:
        rows = parse_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(error, source=bad.source) from None
    except ValueError as error:
        hint = (
            "; the file holds one object a line: rename it to .jsonl or use from_jsonl"
            if str(error).startswith("Extra data")
            else ""
        )
        raise PreferenceDataError(f"not valid JSON ({error}){hint}", reason="invalid JSON", source=bad.source) from None
    if not isinstance(rows, list):
        raise PreferenceDataError(
            f"got {show(rows)}; expected a JSON array of row objects", reason="wrong type", source=bad.source
        )
    yield from enumerate(rows, 1)


def read_csv(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1 after the header, dict) of a table of text with a header (:mod:`pfm.data.spreadsheets`).

    Empty cells are null.
    """
    yield from table_rows(_read_all(path, bad), bad)


def read_parquet(path: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, dict) of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading Parquet files needs pyarrow: pip install "preference-flow[parquet]"') from error
    number = 0
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            classes = class_names(_features(table.schema_arrow.metadata))
            for batch in table.iter_batches(batch_size=4096):
                for row in _arrow_rows(batch):
                    number += 1
                    if isinstance(row, PreferenceDataError):
                        bad.meet(row, f"row {number}")
                    else:
                        yield number, _with_class_names(row, classes)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise PreferenceDataError(
            f"not a readable Parquet file ({error})", reason="damaged file", source=bad.source
        ) from None


def _features(metadata: Mapping[bytes, bytes] | None) -> Any:
    """Return what ``datasets`` writes beside a table about its columns."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def _with_class_names(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return row | {column: class_name(names, row.get(column)) for column, names in classes.items() if column in row}


def _arrow_rows(batch: Any) -> Iterator[dict[str, Any] | PreferenceDataError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for position in range(batch.num_rows):
            try:
                yield from batch.slice(position, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield not_utf8(error)


def read_dataset(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, dict) of a ``datasets.Dataset`` or ``IterableDataset``."""
    if isinstance(dataset, Mapping):
        raise PreferenceDataError(
            f"got a dictionary with the splits {', '.join(map(repr, dataset))}; "
            'expected one split, as in dataset["train"]',
            reason="wrong type",
            source="dataset",
        )
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "iter"):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}; use from_rows for a list")
    number = 0
    classes = class_names(getattr(dataset, "features", None))
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, _with_class_names(dict(zip(batch, values, strict=True)), classes)


FILE_READERS: dict[str, Callable[[Path, BadRows], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def reader_for(path: Path) -> Callable[[Path, BadRows], Iterator[tuple[int, Any]]]:
    """Find the reader by the suffix that is left after ``.gz`` or ``.xz``."""
    inner = Path(path.stem) if path.suffix.lower() in (".gz", ".xz") else path
    try:
        return FILE_READERS[inner.suffix.lower()]
    except KeyError:
        raise ValueError(
            f"cannot tell the format of {path} by its name; expected one of {', '.join(FILE_READERS)} "
            "(.gz or .xz may follow), or call from_jsonl, from_json, from_csv, from_parquet"
        ) from None


def _read_all(path: Path, bad: BadRows) -> bytes:
    try:
        with open_binary(path) as file:
            raw = file.read()
    except _DAMAGE as error:
        damage = _damaged(error)
        damage.source = bad.source
        raise damage from None
    if not raw.strip():
        raise PreferenceDataError("the file is empty", reason="empty file", source=bad.source)
    return raw


def _damaged(error: Exception) -> PreferenceDataError:
    return PreferenceDataError(
        f"the compressed file is damaged or cut short ({error or type(error).__name__})",
        reason="damaged file",
    )


# --- rows ----------------------------------------------------------------------------------------------------


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
    """Hold what came of the rows of one source.

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
        sound = parse_columns(self._standard(rows, parsed.layouts, refuse), self._texts, refuse)
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
        self, rows: NumberedRows, layouts: dict[int, str], refuse: Callable[[int, PreferenceDataError], None]
    ) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the rows that are objects, with standard names where their layout is known, and nulls for NaN."""
        sound: list[tuple[int, Mapping[str, Any]]] = []
        for number, row in rows:
            try:
                if not isinstance(row, Mapping):
                    raise PreferenceDataError(f"got {show(row)}; expected an object with columns", reason="wrong type")
                if row.get(self.chosen_key) is None and row.get(self.rejected_key) is None:
                    row, layout = standard_row(row)
                    if layout is not None:
                        layouts[number] = layout
                missing = [name for name in self._emptied if row.get(name) is not None and is_missing(row[name])]
                sound.append((number, {**row, **dict.fromkeys(missing)} if missing else row))
            except PreferenceDataError as error:
                refuse(number, error)
        return sound

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
    """Give the share of votes for chosen, a tie half, and their number, of a row's column ``votes``."""
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


def vote_rows(
    rows: NumberedRows, bad: BadRows, place: str, *, soft: bool, weight: str, ties: str, prior: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Turn rows of vote counts into rows with chosen, rejected, weight and (if ``soft``) probability."""
    for number, row in rows:
        where = place.format(n=number, i=number - 1)
        try:
            votes_a, votes_b, votes_tie = vote_counts(row)
            a, b = response(row, "a"), response(row, "b")
        except PreferenceDataError as error:
            bad.meet(error, where)
            continue
        if votes_a == votes_b and ties == "drop":
            bad.dropped["tie"] += 1
            continue
        pair = {name: value for name, value in row.items() if name not in _VOTE_COLUMNS}
        pair["chosen"], pair["rejected"] = (a, b) if votes_a >= votes_b else (b, a)
        total = votes_a + votes_b + votes_tie
        shared = 1 + max(total - 1, 0) / (2 * prior + 1)
        worth = {"total": total, "one": 1.0, "margin": abs(votes_a - votes_b), "effective": total / shared}
        pair["weight"] = worth[weight]
        if soft:
            pair["probability"] = (max(votes_a, votes_b) + votes_tie / 2 + prior) / (total + 2 * prior)
        yield number, pair


def vote_counts(row: Any) -> tuple[float, float, float]:
    """Give the votes for a, for b, and undecided ones, of a row that must have some."""
    if not isinstance(row, Mapping):
        raise PreferenceDataError(f"got {show(row)}; expected an object with columns", reason="wrong type")
    require(row, "votes_a")
    require(row, "votes_b")
    a, b, tie = (optional_number(row, name) or 0.0 for name in ("votes_a", "votes_b", "votes_tie"))
    if not a + b + tie:
        raise PreferenceDataError("nobody voted; expected at least one vote", reason="no votes")
    return a, b, tie


_VOTE_COLUMNS = {"a", "b", "votes_a", "votes_b", "votes_tie", "weight", "probability", "chosen", "rejected"}


# --- values --------------------------------------------------------------------------------------------------


def require(row: Mapping[str, Any], column: str, option: str | None = None) -> Any:
    """Return the value of a column that must be there; a null is as good as absent."""
    value = row.get(column)
    if value is None:
        found = ", ".join(repr(name) for name in row) or "none"
        rename = f"; if another column holds it, name that one with {option}=" if option else ""
        state = "the value is null" if column in row else "the column is missing"
        raise PreferenceDataError(f"{state}; columns found: {found}{rename}", reason="missing column", column=column)
    return value


def response(row: Mapping[str, Any], column: str, option: str | None = None) -> Text:
    """Return a response that must be there and hold more than white space."""
    return checked_response(require(row, column, option), column)


def checked_response(value: Any, column: str | None) -> Text:
    """Return a response as a text; refuse one that is blank."""
    text = as_text(value, column)
    if is_blank(text):
        raise PreferenceDataError(
            f"the text is empty or only white space, {show(value)}; expected at least one character to read",
            reason="empty text",
            column=column,
        )
    check_unicode(text, column)
    return text


def checked_prompt(value: Any, column: str | None) -> Text:
    """Return a prompt as a text; "" or [] says that there is none, white space alone is a prompt that got lost."""
    text = as_text(value, column)
    if text and is_blank(text):
        raise PreferenceDataError(
            f'the prompt is only white space, {show(value)}; expected a text, or "" for no prompt',
            reason="empty text",
            column=column,
        )
    check_unicode(text, column)
    return text


def check_unicode(text: Text, column: str | None) -> None:
    """Refuse half surrogate pairs: they can be written in JSON escapes but are no text."""
    if not all(map(is_unicode, message_texts(text))):
        raise PreferenceDataError(
            "the text holds half of a surrogate pair (a character cut in two); expected valid Unicode",
            reason="invalid Unicode",
            column=column,
        )


def optional_number(row: Mapping[str, Any], column: str, highest: float = math.inf) -> float | None:
    """Return a number from 0 to ``highest``, or None when the row has none; text such as "0.5" is read."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()) or type(value).__name__ == "NAType":
        return None
    try:
        number = float(value) if isinstance(value, Real | Decimal | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and 0 <= number <= highest):
        expected = "a finite number ≥ 0" if highest == math.inf else f"a number from 0 to {highest:g}"
        expected += " with a decimal point" * (isinstance(value, str) and "," in value)
        raise PreferenceDataError(f"got {show(value)}; expected {expected}", reason="bad number", column=column)
    return number


def check_pair_limit(limit: int | None) -> None:
    """Refuse a limit of pairs a prompt that is not None or a positive integer."""
    if limit is not None and (not isinstance(limit, int | np.integer) or limit < 1):
        raise ValueError(f"max_pairs_per_prompt must be None or an integer ≥ 1, got {limit!r}")


def choose_pairs(total: int, limit: int | None, seed: tuple[int, int], where: str) -> np.ndarray | None:
    """Draw ``limit`` of ``total`` pair numbers, ascending; None means all of them.

    Raises:
        ValueError: there is no limit, and there are more pairs than memory should hold.
    """
    if limit is None:
        if total > MOST_PAIRS_PER_PROMPT:
            raise ValueError(
                f"{where}: the candidates make {total:,} pairs; pass max_pairs_per_prompt= to draw some of them"
            )
        return None
    if total <= limit:
        return None
    return np.sort(np.random.default_rng(seed).choice(total, size=limit, replace=False, shuffle=False))


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Write lines as UTF-8 so that the file is either whole or, if anything fails, left as it was."""
    target = Path(path)
    # the suffix stays last, as it decides about compression
    temporary = target.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.{target.name}")
    try:
        with open_binary(temporary, "wb") as file:
            for line in lines:
                file.write(line.encode() + b"\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

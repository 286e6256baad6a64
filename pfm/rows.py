"""Read preference rows from files and bring every common row format to one: prompt, chosen, rejected.

A *text* is a string or a conversation, that is a list of ``{"role", "content"}`` messages; ``{"from", "value"}``
messages are accepted and renamed. A null value counts as an absent column everywhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import lzma
import math
import os
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Real
from pathlib import Path
from typing import IO, Any, TypeAlias, TypedDict, cast

import numpy as np

from pfm.errors import PfmError
from pfm.nesting import parse_json

logger = logging.getLogger(__name__)

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]
NumberedRows: TypeAlias = Iterable[tuple[int, Any]]
PromptIdentity: TypeAlias = tuple[str, Any]

#: Names that rows have on the way out; no extra column may take one of them.
STANDARD_COLUMNS = ("prompt", "chosen", "rejected", "weight", "probability", "group")

#: Pairs that one prompt may give before a limit is asked for: beyond it the lists no longer fit in memory.
MOST_PAIRS_PER_PROMPT = 2_000_000

_ROLES = {"human": "user", "gpt": "assistant"}
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_LABELS = {"true": True, "1": True, "false": False, "0": False}


class PreferenceDataError(PfmError, ValueError):
    """Say what is wrong with preference data: where, what was found, what was expected, the way out.

    Attributes: ``problem`` (a sentence), ``reason`` (a short name, the key in ``PreferencePairs.dropped``),
    ``source`` (file or argument), ``row`` (such as ``"line 3"``), ``column``; the last three may be None.
    """

    def __init__(
        self,
        problem: str,
        *,
        reason: str = "bad data",
        column: str | None = None,
        row: str | None = None,
        source: str | None = None,
    ):
        super().__init__(problem)
        self.problem = problem
        self.reason = reason
        self.column = column
        self.row = row
        self.source = source
        self.way_out = ""

    def __str__(self) -> str:
        column = None if self.column is None else f"column {self.column!r}"
        place = ", ".join(part for part in (self.source, self.row, column) if part)
        return (f"{place}: " if place else "") + self.problem + self.way_out


class BadRows:
    """Deal with bad rows as asked: raise at the first one, or count them by reason."""

    def __init__(self, source: str, on_bad_rows: str):
        if on_bad_rows not in ("raise", "drop"):
            raise ValueError(f'on_bad_rows must be "raise" or "drop", got {on_bad_rows!r}')
        self.source = source
        self.raises = on_bad_rows == "raise"
        self.dropped: Counter[str] = Counter()
        self.first: PreferenceDataError | None = None

    def meet(self, error: PreferenceDataError, row: str, count: int = 1) -> None:
        """Raise ``error`` with its place filled in (an inner place stays), or count it ``count`` times."""
        error.source, error.row = self.source, error.row or row
        if self.raises:
            error.way_out = '. Correct it, or pass on_bad_rows="drop" to skip and count such rows.'
            raise error
        self.dropped[error.reason] += count
        self.first = self.first or error

    def finish(self, kept: int, way_out: str = "") -> None:
        """Warn once about what was dropped; raise, adding ``way_out``, if no pair is left."""
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())
        first = f". The first: {self.first}" if self.first else ""
        if not kept:
            problem = (
                f"nothing is left of the rows, all were dropped ({counts}){first}"
                if counts
                else "there are no rows; expected at least one"
            )
            raise PreferenceDataError(problem + way_out, reason="nothing left", source=self.source)
        if self.dropped:
            total = sum(self.dropped.values())
            logger.warning("%s: dropped %d (%s)%s", self.source, total, counts, first)


# --- texts ---------------------------------------------------------------------------------------------------


def conversation_text(messages: str | Sequence[Mapping[str, Any]]) -> str:
    """Turn a conversation into the one text that encoders read; a string is returned as it is.

    A single turn of the user or the assistant is just its content; anything longer, and a lone turn of another
    role, becomes one ``role: content`` line a turn.

    Raises:
        PreferenceDataError: ``messages`` is neither a string nor a list of messages.
    """
    text = as_text(messages, None)
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] in ("user", "assistant"):
        return text[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def as_text(value: Any, column: str | None) -> Text:
    """Return a string as it is, and one message or a list of messages as a list of role/content messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise PreferenceDataError(
            f"got {show(value)}; expected a string or a list of role/content messages",
            reason="wrong type",
            column=column,
        )
    return [_as_message(message, turn, column) for turn, message in enumerate(value, 1)]


def _as_message(message: Any, turn: int, column: str | None) -> Message:
    if isinstance(message, Mapping):
        if isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
            return dict(message)
        role, content = message.get("from"), message.get("value")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise PreferenceDataError(
        f"turn {turn} is {show(message)}; expected {{'role': str, 'content': str}}",
        reason="wrong type",
        column=column,
    )


def is_blank(text: Text) -> bool:
    """Tell whether a text holds nothing but white space."""
    if isinstance(text, str):
        return not text or text.isspace()
    return all(is_blank(message["content"]) for message in text)


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Split the beginning that two texts share off as their prompt: (prompt, chosen, rejected).

    Conversations share whole turns. Strings share characters, cut back to white space in both, so that no word
    is split; the white space stays with the responses and ``prompt + chosen`` is the text that came in. Both
    responses keep at least one turn or one word; the prompt may come out empty.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _shared_words(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        cut = _shared_turns(chosen, rejected)
    else:
        raise PreferenceDataError(
            f"chosen is {show(chosen)} and rejected is {show(rejected)}; without a prompt "
            "expected two strings or two conversations that share a beginning",
            reason="wrong type",
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    limit = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _shared_words(chosen: str, rejected: str) -> int:
    limit = min(len(chosen.rstrip()), len(rejected.rstrip()))
    low, high = 0, limit
    while low < high:  # bisection over slices: a loop over characters is slow on long prompts
        middle = (low + high + 1) // 2
        if chosen[low:middle] == rejected[low:middle]:
            low = middle
        else:
            high = middle - 1
    head = chosen[:low]
    ends_a_word = low < limit and chosen[low].isspace() and rejected[low].isspace()
    if ends_a_word or head[-1:].isspace():
        return len(head.rstrip())
    whole_words = head.rsplit(None, 1)[:-1]
    return len(whole_words[0]) if whole_words else 0


def prompt_identity(prompt: str, group: Any) -> PromptIdentity:
    """Return what tells prompts apart: their text, or the group where there is no prompt."""
    return (prompt, None if prompt else group)


def show(value: Any) -> str:
    """Describe a value shortly for an error message: its type and its beginning."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


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
        raise _not_utf8(error, offset) from None
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
        raise _not_utf8(error, source=bad.source) from None
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
    """Yield (row number from 1 after the header, dict) of a comma-separated file with a header.

    Empty cells are null, and a cell that is a JSON list of messages becomes a conversation.
    """
    raw = _read_all(path, bad)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if bad.raises:
            line = raw.count(b"\n", 0, error.start) + 1
            raise _not_utf8(error, row=f"line {line}", source=bad.source) from None
        text = raw.decode("utf-8-sig", errors="surrogateescape")  # the rows concerned are dropped one by one
    usual_limit = csv.field_size_limit(2**31 - 1)
    try:
        # strict: otherwise a quote that is never closed swallows the rest of the file without a word
        yield from _csv_rows(csv.reader(io.StringIO(text, newline=""), strict=True), bad)
    finally:
        csv.field_size_limit(usual_limit)


def _csv_rows(reader: Any, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    header = next(reader, [])
    if len(set(header)) != len(header):
        twice = ", ".join(repr(name) for name, count in Counter(header).items() if count > 1)
        raise PreferenceDataError(
            f"the header names {twice} twice; expected distinct names",
            reason="bad header",
            source=bad.source,
        )
    number = 0
    while True:
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                raise PreferenceDataError(
                    f"got {len(cells)} cells; expected {len(header)} as in the header, quotes around commas",
                    reason="wrong number of columns",
                )
            if not is_unicode("".join(cells)):
                raise PreferenceDataError("not valid UTF-8", reason="invalid UTF-8")
            yield number, {name: _csv_cell(cell) for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            number += 1
            problem = f"not valid CSV ({error}), found at line {reader.line_num}"
            bad.meet(PreferenceDataError(problem, reason="invalid CSV"), f"row {number}")
        except PreferenceDataError as error:
            bad.meet(error, f"row {number}")


def _csv_cell(cell: str) -> Text | None:
    if cell.startswith(("[", "{")):
        try:
            return as_text(parse_json(cell), None)
        except ValueError:
            return cell
    return cell or None


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
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=4096):
                for row in _arrow_rows(batch):
                    number += 1
                    if isinstance(row, PreferenceDataError):
                        bad.meet(row, f"row {number}")
                    else:
                        yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise PreferenceDataError(
            f"not a readable Parquet file ({error})", reason="damaged file", source=bad.source
        ) from None


def _arrow_rows(batch: Any) -> Iterator[dict[str, Any] | PreferenceDataError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for position in range(batch.num_rows):
            try:
                yield from batch.slice(position, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield _not_utf8(error)


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
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(batch, values, strict=True))


FILE_READERS: dict[str, Callable[[Path, BadRows], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
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


def _not_utf8(error: UnicodeDecodeError, offset: int = 0, **place: Any) -> PreferenceDataError:
    byte = error.object[error.start]
    return PreferenceDataError(
        f"not valid UTF-8: byte 0x{byte:02x} at byte offset {offset + error.start}; save the text as UTF-8",
        reason="invalid UTF-8",
        **place,
    )


def is_unicode(text: str) -> bool:
    """Tell whether a string can be written as UTF-8 (it holds no half of a surrogate pair)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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

    ``prompt_key`` ("prompt"), ``chosen_key`` ("chosen"), ``rejected_key`` ("rejected"): names of the columns.
    ``weight_key`` (None): column of the pair's weight, a finite number ≥ 0; None takes "weight" where present.
    ``group_key`` ("group"): column, optional unless renamed, of what belongs together beyond the prompt.
    ``max_pairs_per_prompt`` (None) and ``seed`` (0): how many pairs unpaired rows may make of one prompt.
    ``on_bad_rows`` ("raise"): "drop" counts bad rows by reason instead, and warns once.
    """

    prompt_key: str
    chosen_key: str
    rejected_key: str
    weight_key: str | None
    group_key: str
    max_pairs_per_prompt: int | None
    seed: int
    on_bad_rows: str


@dataclass
class RowParser:
    """Parse the rows of one source, in any format, into ``Columns``; the fields are those of ``RowOptions``."""

    prompt_key: str = "prompt"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    weight_key: str | None = None
    group_key: str = "group"
    max_pairs_per_prompt: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_pair_limit(self.max_pairs_per_prompt)
        used = {self.prompt_key, self.chosen_key, self.rejected_key, self.group_key}
        used |= {self.weight_key or "weight", "probability", "conversations"}
        self._used = used | set(STANDARD_COLUMNS)
        self._prompts_given = False

    def parse(self, rows: NumberedRows, bad: BadRows, place: str) -> Columns:
        """Parse numbered rows. ``place`` names a row in messages: a template of n (from 1) and i (from 0)."""
        columns = Columns()
        unpaired: dict[PromptIdentity, _Rated] = {}
        for number, row in rows:
            try:
                if not isinstance(row, Mapping):
                    raise PreferenceDataError(f"got {show(row)}; expected an object with columns", reason="wrong type")
                if self._is_unpaired(row):
                    self._add_rated(row, number, unpaired)
                else:
                    self._add_pair(row, columns)
            except PreferenceDataError as error:
                bad.meet(error, place.format(n=number, i=number - 1))
        for position, rated in enumerate(unpaired.values()):
            self._add_product(rated, position, columns, bad, place)
        return columns

    def _is_unpaired(self, row: Mapping[str, Any]) -> bool:
        if row.get(self.chosen_key) is not None or row.get(self.rejected_key) is not None:
            return False
        return row.get("completion") is not None or row.get("label") is not None

    def _add_pair(self, row: Mapping[str, Any], columns: Columns) -> None:
        chosen = response(row, self.chosen_key, "chosen_key")
        rejected = response(row, self.rejected_key, "rejected_key")
        prompt, chosen, rejected = separate(self._prompt(row), chosen, rejected)
        if conversation_text(chosen).strip() == conversation_text(rejected).strip():
            raise PreferenceDataError(
                f"chosen and rejected are the same text, {reprlib.repr(conversation_text(chosen))}; "
                "expected two different responses",
                reason="identical pair",
            )
        extra = {name: value for name, value in row.items() if name not in self._used}
        probability, weight = optional_number(row, "probability", highest=1.0), self._weight(row)
        votes = extra.get("votes")
        if probability is None and isinstance(votes, Mapping) and {"chosen", "rejected"} <= votes.keys():
            probability, total = _voted(votes)
            weight = total if weight is None else weight
        columns.add(prompt, chosen, rejected, weight, probability, self._group(row), extra)

    def _prompt(self, row: Mapping[str, Any]) -> Text | None:
        column = self.prompt_key
        if column not in row and column == "prompt" and row.get("conversations") is not None:
            column = "conversations"
        if row.get(column) is not None:
            self._prompts_given = True
            return checked_prompt(row[column], column)
        # A hole in a column of prompts is a mistake; only where there is no such column do responses hold them.
        if self._prompts_given or column in row or column != "prompt":
            require(row, column, "prompt_key")
        return None

    def _weight(self, row: Mapping[str, Any]) -> float | None:
        if self.weight_key is not None:
            require(row, self.weight_key, "weight_key")
        return optional_number(row, self.weight_key or "weight")

    def _group(self, row: Mapping[str, Any]) -> Any:
        if self.group_key != "group":
            require(row, self.group_key, "group_key")
        group = row.get(self.group_key)
        if group is not None and not isinstance(group, str | Real):
            raise PreferenceDataError(
                f"got {show(group)}; expected a string or a number",
                reason="wrong type",
                column=self.group_key,
            )
        return group

    def _add_rated(self, row: Mapping[str, Any], number: int, unpaired: dict[PromptIdentity, _Rated]) -> None:
        completion = response(row, "completion")
        label = require(row, "label")
        liked = label if isinstance(label, bool) else _LABELS.get(str(label).strip().lower())
        if liked is None:
            raise PreferenceDataError(f"got {show(label)}; expected true or false", reason="wrong type", column="label")
        prompt = self._prompt(row)
        if prompt is None:
            prompt = require(row, self.prompt_key, "prompt_key")
        group = self._group(row)
        identity = prompt_identity(conversation_text(prompt), group)
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
            if conversation_text(chosen).strip() == conversation_text(rejected).strip():
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


def separate(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Bring a pair to (prompt, chosen, rejected) where the responses do not repeat the prompt.

    Without a prompt it is what both share. Conversations that repeat the prompt's turns lose them, and a prompt
    given as a string beside two whole conversations gives way to the turns that these share.
    """
    if prompt is None:
        return split_prompt(chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, str):
            whole = chosen[0]["role"] in ("system", "user") and _shared_turns(chosen, rejected) > 0
            return split_prompt(chosen, rejected) if whole else (prompt, chosen, rejected)
        turns = len(prompt)
        if len(chosen) > turns < len(rejected) and chosen[:turns] == rejected[:turns] == prompt:
            return prompt, chosen[turns:], rejected[turns:]
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
    parts = [text] if isinstance(text, str) else [message["content"] for message in text]
    if not all(map(is_unicode, parts)):
        raise PreferenceDataError(
            "the text holds half of a surrogate pair (a character cut in two); expected valid Unicode",
            reason="invalid Unicode",
            column=column,
        )


def optional_number(row: Mapping[str, Any], column: str, highest: float = math.inf) -> float | None:
    """Return a number from 0 to ``highest``, or None when the row has none; text such as "0.5" is read."""
    value = row.get(column)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, Real | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and 0 <= number <= highest):
        expected = "a finite number ≥ 0" if highest == math.inf else f"a number from 0 to {highest:g}"
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

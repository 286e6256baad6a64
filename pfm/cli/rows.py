"""Rows that a command reads: prompts with candidates, bad ones with their error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pfm.data.errors import BadRows

__all__ = ["PromptKey", "Row", "checked_row", "find_reader", "numbered_rows", "read_rows"]

#: An option of every command that reads prompts.
PromptKey = Annotated[
    str, typer.Option(help="Column of the prompt; '' where none holds it. Known layouts of public data need none.")
]


@dataclass(frozen=True)
class Row:
    """Holds a row to refine, or what is wrong with it; ``digest`` changes with all that the result depends on."""

    number: int
    prompt: Any
    candidates: list[Any]
    columns: Mapping[str, Any]
    error: str | None
    digest: str


def find_reader(path: Path) -> tuple[Callable[[Path, BadRows], Iterator[tuple[int, Any]]], str]:
    """Find the reader of a file, and what it counts."""
    from pfm.data.readers import read_jsonl, reader_for

    reader = reader_for(path)
    return reader, "line" if reader is read_jsonl else "row"


def numbered_rows(path: Path, bad: BadRows, prompt_key: str = "prompt") -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a file, with the row's prompt in the column "prompt" wherever it stands.

    Conversations, and lists of candidates and scores, may be written as text. What is no object is left as it is.
    """
    from pfm.data.errors import PreferenceDataError
    from pfm.data.layouts import TEXT_COLUMNS, find_prompt
    from pfm.data.stringified import parse_columns

    reader, unit = find_reader(path)

    def refuse(number: int, error: PreferenceDataError) -> None:
        bad.meet(error, f"{unit} {number}")

    rows = [
        (number, _with_lists(value) if isinstance(value, Mapping) else value) for number, value in reader(path, bad)
    ]
    objects = [(number, value) for number, value in rows if isinstance(value, Mapping)]
    parsed = dict(parse_columns(objects, dict.fromkeys((prompt_key, *TEXT_COLUMNS, "output")), refuse))
    for number, value in rows:
        if not isinstance(value, Mapping):
            yield number, value
        elif number in parsed:
            row = parsed[number]
            try:
                named = row.get(prompt_key)
                found = find_prompt(row) if named is None else None
            except PreferenceDataError as error:
                refuse(number, error)
                continue
            prompt = named if found is None else found.text
            yield number, row if prompt is None else {**row, "prompt": prompt}


def _with_lists(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row with the lists that a table of text writes as text."""
    from pfm.data.stringified import parse_literal

    lists: dict[str, Any] = {}
    for column in ("candidates", "scores"):
        cell = row.get(column)
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            try:
                lists[column] = parse_literal(cell)
            except ValueError:
                continue  # refused where the column is read
    return {**row, **lists} if lists else row


def read_rows(path: Path, origin: Sequence[Any], *, drawn: bool, prompted: bool) -> list[Row]:
    """Read the rows to refine, bad ones with their error, in the order of the file."""
    from pfm.data.errors import BadRows, PreferenceDataError

    unit = find_reader(path)[1]
    found: list[Row] = []

    def add(number: int, value: Any, error: PreferenceDataError | None, place: str) -> None:
        prompt, candidates = None, []
        if error is None:
            try:
                prompt, candidates = checked_row(value, drawn, prompted)
            except PreferenceDataError as problem:
                error = problem
        described = json.dumps([*origin, prompt, candidates, error and error.problem], default=str)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        if error is not None:
            error.source, error.row = str(path), place
        columns = value if isinstance(value, Mapping) else {}
        found.append(Row(number, prompt, candidates, columns, None if error is None else str(error), digest))

    class Recorded(BadRows):
        def meet(self, error: PreferenceDataError, row: str, count: int = 1) -> None:
            add(int(row.split()[1]), None, error, row)

    for number, value in numbered_rows(path, Recorded(str(path), "drop")):
        add(number, value, None, f"{unit} {number}")
    if not found:
        raise ValueError(f"{path}: there are no rows; expected at least one")
    return sorted(found, key=lambda row: row.number)  # what cannot be parsed was found first


def checked_row(value: Any, drawn: bool, prompted: bool) -> tuple[Any, list[Any]]:
    """Return the prompt and the candidates of a row, none where they are to be drawn."""
    from pfm.data.checks import checked_prompt, require
    from pfm.data.conversations import conversation_text, is_blank
    from pfm.data.errors import PreferenceDataError, show

    if not isinstance(value, Mapping):
        raise PreferenceDataError(f"got {show(value)}; expected an object with columns")
    prompt = checked_prompt(require(value, "prompt"), "prompt")
    if prompted and is_blank(prompt):
        raise PreferenceDataError("the prompt is empty, and this flow was fitted with prompts", column="prompt")
    if drawn:
        return prompt, []
    column = "candidates" if value.get("candidates") is not None or value.get("output") is None else "output"
    given = require(value, column)
    if column == "candidates" and not isinstance(given, list | tuple):
        raise PreferenceDataError(f"got {show(given)}; expected a list of texts", column=column)
    texts = list(given) if column == "candidates" else [given]
    # Whole messages become the text that encoders read; what is no text at all the refiner drops and counts.
    return prompt, [conversation_text(text) if isinstance(text, list) else text for text in texts]

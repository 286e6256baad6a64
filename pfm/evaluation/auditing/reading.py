"""Read sets of judged candidates, one row a prompt with lists or one row a candidate with a group column."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pfm.data.checks import check_unicode, read_number
from pfm.data.conversations import as_text, conversation_text, is_blank
from pfm.data.errors import BadRows, PreferenceDataError, show
from pfm.data.identity import given_group, normal_form
from pfm.data.readers import numbered_rows, read_jsonl, reader_for
from pfm.data.stringified import parse_literal
from pfm.evaluation.auditing.choices import Choices
from pfm.evaluation.auditing.rules import COSTS

__all__ = ["Columns", "read_choices"]

TEXTS = ("candidate", "output", "response", "completion", "answer", "text")  # of one candidate a row


@dataclass(frozen=True)
class Columns:
    """Names the columns to read; None finds the usual ones.

    Attributes:
        selectors: of picks (the place of a candidate from 0, its text, or true and false) or of scores, higher is
            better.
        scores: of the judge. None: "scores" or "score".
        prompt: the prompt.
        group: what the candidates of one prompt share. None: "group", else the prompt.
        candidates: the texts. None: "candidates", or for one row a candidate the first of :data:`TEXTS` there is.
        costs: columns of which less is better. None: those of "seconds", "cost" and "tokens" that there are.
    """

    selectors: Sequence[str]
    scores: str | None = None
    prompt: str = "prompt"
    group: str | None = None
    candidates: str | None = None
    costs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        names = [*self.selectors, *(self.costs or ())]
        if len(set(self.selectors)) < len(self.selectors):
            raise ValueError(f"selectors names a column twice: {', '.join(self.selectors)}")
        if self.scores is not None and self.scores in names:
            raise ValueError(f"{self.scores!r} is the judge's column: it cannot be a selector or a cost as well")
        both = sorted(set(self.selectors) & set(self.costs or ()))
        if both:
            raise ValueError(f"{', '.join(both)} cannot be a selector and a cost")


@dataclass
class _Set:
    """The candidates of one prompt as they are read."""

    identity: Any
    text: list[str] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    costs: dict[str, list[float]] = field(default_factory=dict)
    selectors: dict[str, list[float]] = field(default_factory=dict)


def read_choices(
    rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]], columns: Columns, on_bad_rows: str
) -> tuple[Choices, dict[str, Any]]:
    """Read rows into sets of candidates, and say how (JSON values: layout, columns, dropped rows).

    Where one row is one candidate, a bad row drops its whole prompt: a set with a hole is not what was chosen from.

    Raises:
        PreferenceDataError: a bad row, with its place and column, or nothing is left.
        ValueError: no such column, or no selector is named.
    """
    if isinstance(rows, str | os.PathLike):
        path = Path(rows).expanduser()
        source, reader = str(path), reader_for(path)
        bad = BadRows(source, on_bad_rows)
        unit, numbered = ("line" if reader is read_jsonl else "row"), list(reader(path, bad))
    else:
        bad, unit = BadRows("rows", on_bad_rows), "row"
        numbered = list(numbered_rows(rows))
    unreadable = sum(bad.dropped.values())
    objects: list[tuple[int, Mapping[str, Any]]] = []
    for number, value in numbered:
        if isinstance(value, Mapping):
            objects.append((number, value))
        else:
            error = PreferenceDataError(f"got {show(value)}; expected an object with columns", reason="wrong type")
            bad.meet(error, f"{unit} {number}")
    if not objects:
        bad.finish(0)
    found = _Layout.of([row for _, row in objects], columns)
    if found.by_prompt:
        sets = list(_sets_by_prompt(objects, found, bad, unit))
    else:
        sets = _sets_by_candidate(objects, found, bad, unit)
    bad.finish(len(sets))
    about = {
        "layout": "one row a prompt" if found.by_prompt else "one row a candidate",
        "source": bad.source if bad.source == "rows" else Path(bad.source).name,
        "judge": f"column {found.scores}",
        "dropped": dict(bad.dropped),
        "unreadable": unreadable if not found.by_prompt else 0,
    }
    return _choices(sets, found), about


# -- which columns there are -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Holds the columns that were found; ``by_prompt``: a row is a prompt with lists."""

    by_prompt: bool
    selectors: Sequence[str]
    scores: str
    prompt: str
    group: str | None
    candidates: str | None
    costs: Sequence[str]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], columns: Columns) -> _Layout:
        there = list(dict.fromkeys(name for row in rows for name in row))

        def named(name: str | None, what: str, usual: Sequence[str], needed: bool = True) -> str | None:
            if name is not None and name not in there:
                raise ValueError(f"no column {name!r} for {what}: there are {', '.join(map(str, there))}")
            found = name if name is not None else next((each for each in usual if each in there), None)
            if found is None and needed:
                raise ValueError(
                    f"no column of {what} ({' or '.join(usual)}) among {', '.join(map(str, there))}: name it"
                )
            return found

        scores = named(columns.scores, "the judge's scores", ("scores", "score"))
        assert scores is not None
        first = next((row[scores] for row in rows if row.get(scores) is not None), None)
        by_prompt = _as_list(first) is not None
        candidates = named(columns.candidates, "candidates", ("candidates",) if by_prompt else TEXTS, needed=False)
        group = named(columns.group, "groups", ("group",), needed=False)
        if not by_prompt and group is None and columns.prompt not in there:
            raise ValueError(
                f"one row a candidate needs a column that the candidates of one prompt share: there are neither "
                f"'group' nor {columns.prompt!r} among {', '.join(map(str, there))}; name it as the group"
            )
        costs = [name for name in COSTS if name in there] if columns.costs is None else list(columns.costs)
        costs = [name for name in costs if name not in columns.selectors]
        taken = {scores, columns.prompt, group, candidates, *costs}
        for name in (*columns.selectors, *costs):
            named(name, "a selector" if name in columns.selectors else "a cost", ())
        if scores in columns.selectors:
            raise ValueError(f"{scores!r} is the judge's column: a selector cannot be judged by itself")
        if not columns.selectors:
            possible = [name for name in there if name not in taken and any(_numeric(row.get(name)) for row in rows)]
            hint = f"; columns that could be one: {', '.join(possible)}" if possible else ""
            raise ValueError(f"no selector is named: name the column of its picks or scores{hint}")
        return cls(by_prompt, list(columns.selectors), scores, columns.prompt, group, candidates, costs)


def _numeric(value: Any) -> bool:
    values = _as_list(value)
    try:
        return bool([read_number(each, "") for each in ([value] if values is None else values)])
    except PreferenceDataError:
        return False


def _as_list(value: Any) -> list[Any] | None:
    """Return a list, also one that a table writes as text; None where the value is no list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_literal(value)
        except ValueError:
            return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _text(value: Any, column: str) -> str:
    """Read a candidate's text; a model may have answered nothing, which is a text too."""
    if value is None:
        raise PreferenceDataError("the text is missing", reason="missing value", column=column)
    text = value if isinstance(value, str) else conversation_text(as_text(value, column))
    check_unicode(text, column)
    return text


def _identity(row: Mapping[str, Any], layout: _Layout) -> Any:
    """Return what tells prompts apart: the group if there is one, else the prompt's normal form; None without both."""
    group = None if layout.group is None else given_group(row.get(layout.group))
    if group is not None:
        return "group", str(group)
    prompt = row.get(layout.prompt)
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return None
    text = as_text(prompt, layout.prompt)
    return None if is_blank(text) else ("prompt", normal_form(conversation_text(text)))


# -- one row a prompt --------------------------------------------------------------------------------------------------


def _sets_by_prompt(
    rows: Sequence[tuple[int, Mapping[str, Any]]], layout: _Layout, bad: BadRows, unit: str
) -> Iterator[_Set]:
    for number, row in rows:
        try:
            yield _set_of(number, row, layout)
        except PreferenceDataError as error:
            bad.meet(error, f"{unit} {number}")


def _set_of(number: int, row: Mapping[str, Any], layout: _Layout) -> _Set:
    identity = _identity(row, layout)
    found = _Set(("row", number) if identity is None else identity)
    scores = _column(row, layout.scores, None)
    count = len(scores)
    if not count:
        raise PreferenceDataError("there are no candidates; expected at least one", reason="no candidates",
                                  column=layout.scores)  # fmt: skip
    found.score = [read_number(value, layout.scores) for value in scores]
    if layout.candidates is not None:
        found.text = [_text(value, layout.candidates) for value in _column(row, layout.candidates, count)]
    for name in layout.costs:
        found.costs[name] = [read_number(value, name) for value in _column(row, name, count)]
    for name in layout.selectors:
        value = row.get(name)
        values = _as_list(value)
        if values is None:
            found.selectors[name] = _pick(value, found.text, count, name)
        else:
            found.selectors[name] = [read_number(each, name) for each in _column(row, name, count)]
    return found


def _column(row: Mapping[str, Any], name: str, count: int | None) -> list[Any]:
    value = row.get(name)
    values = _as_list(value)
    if value is None:
        raise PreferenceDataError("the value is missing; expected a list", reason="missing value", column=name)
    if values is None:
        raise PreferenceDataError(
            f"got {show(value)}; expected a list, one value a candidate", reason="wrong type", column=name
        )
    if count is not None and len(values) != count:
        raise PreferenceDataError(
            f"got {len(values)} values for {count} scores; expected one a candidate", reason="lengths differ",
            column=name,
        )  # fmt: skip
    return values


def _pick(value: Any, texts: Sequence[str], count: int, column: str) -> list[float]:
    """Read a pick, the text of a candidate or its place from 0, as scores of 1 and 0."""
    if isinstance(value, str) and value in texts:
        return [float(text == value) for text in texts]
    number = math.nan if isinstance(value, bool) else read_number(value, column)
    if not number.is_integer():
        raise PreferenceDataError(
            f"got {show(value)}; expected the place of a candidate, its text, or a list of scores",
            reason="wrong type", column=column,
        )  # fmt: skip
    if not 0 <= number < count:
        raise PreferenceDataError(
            f"got the pick {int(number)} of {count} candidates; places count from 0 to {count - 1}",
            reason="pick out of range", column=column,
        )  # fmt: skip
    return [float(place == number) for place in range(count)]


# -- one row a candidate -----------------------------------------------------------------------------------------------


def _sets_by_candidate(
    rows: Sequence[tuple[int, Mapping[str, Any]]], layout: _Layout, bad: BadRows, unit: str
) -> list[_Set]:
    sets: dict[Any, _Set] = {}
    holed: set[Any] = set()
    for number, row in rows:
        identity = None
        try:
            identity = _identity(row, layout)
            if identity is None:
                column = layout.prompt if layout.group is None else layout.group
                raise PreferenceDataError("the value is missing", reason="missing value", column=column)
            score = read_number(row.get(layout.scores), layout.scores)
            text = [] if layout.candidates is None else [_text(row.get(layout.candidates), layout.candidates)]
            costs = {name: read_number(row.get(name), name) for name in layout.costs}
            selectors = {name: read_number(row.get(name), name) for name in layout.selectors}
        except PreferenceDataError as error:
            bad.meet(error, f"{unit} {number}")
            holed.add(identity)
            continue
        found = sets.setdefault(identity, _Set(identity))
        found.score.append(score)
        found.text += text
        for into, values in ((found.costs, costs), (found.selectors, selectors)):
            for name, value in values.items():
                into.setdefault(name, []).append(value)
    kept = [found for identity, found in sets.items() if identity not in holed]
    lost = sum(len(found.score) for identity, found in sets.items() if identity in holed)
    if lost:
        bad.dropped["of a prompt with a bad row"] += lost
    return kept


def _choices(sets: Sequence[_Set], layout: _Layout) -> Choices:
    numbers: dict[Any, int] = {}
    prompt = np.array([numbers.setdefault(each.identity, len(numbers)) for each in sets])
    text = None if layout.candidates is None else [text for each in sets for text in each.text]
    costs = {name: np.array([v for each in sets for v in each.costs[name]]) for name in layout.costs}
    length = np.array([float(len(each)) for each in text]) if text is not None else costs.get("tokens")
    choices = Choices(
        prompt,
        np.array([len(each.score) for each in sets]),
        np.array([score for each in sets for score in each.score]),
        length,
        text,
        costs,
    )
    for name in layout.selectors:
        values = np.array([value for each in sets for value in each.selectors[name]])
        choices.selectors[name] = choices.best(values)
        equal = np.maximum.reduceat(values, choices.start) == np.minimum.reduceat(values, choices.start)
        choices.undecided[name] = int((equal & (choices.size > 1)).sum())
    return choices

"""Layouts of public preference data: which columns hold the prompt, and responses under other names.

A row's prompt is the column ``prompt``, or what one of the layouts below makes of other columns:

- ``conversations`` (ShareGPT), ``messages``: the turns up to the response;
- ``question`` (Orca), ``query``: the user's turn;
- ``instruction`` (Alpaca, LLaMA-Factory) with ``input`` below it, after the turns of ``history``.

A system message beside them (``system``, ``system_prompt``, ``system_message``) comes first. Other layouts name the
responses otherwise, and become the standard one: SHP (``history, human_ref_A, human_ref_B, labels``), OpenAI's
preference files (``input, preferred_output, non_preferred_output``), two responses and a verdict
(:mod:`pfm.data.verdicts`), and UltraFeedback (``instruction, completions``), a row of which holds several responses
with scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pfm.data.conversations import Message, as_text, message_texts
from pfm.data.errors import PreferenceDataError, show
from pfm.data.identity import is_missing
from pfm.data.stringified import parse_literal
from pfm.data.verdicts import compared_row, without

__all__ = [
    "PROMPT_COLUMNS",
    "REPEATED_LAYOUT",
    "SCORED_LAYOUT",
    "STANDARD_LAYOUT",
    "SYSTEM_COLUMNS",
    "TEXT_COLUMNS",
    "Prompt",
    "ScoredRow",
    "find_prompt",
    "prompt_candidates",
    "scored_row",
    "standard_row",
]

#: Columns that hold a prompt by their name, with the layout they belong to.
PROMPT_COLUMNS = {
    "prompt": "standard",
    "conversations": "ShareGPT",
    "messages": "messages",
    "question": "Orca",
    "query": "query",
    "instruction": "Alpaca",
}
STANDARD_LAYOUT = "standard (prompt)"
REPEATED_LAYOUT = "standard (prompt, repeated in chosen, rejected)"
SCORED_LAYOUT = "UltraFeedback (instruction, completions)"
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
#: Columns whose cells may be conversations, written as text or not.
TEXT_COLUMNS = (*PROMPT_COLUMNS, "completion", "preferred_output", "non_preferred_output")
_SCORES = ("fine-grained_score", "overall_score", "score", "rating")
_RESPONSES = ("response", "completion", "text", "output", "content")


@dataclass(frozen=True)
class Prompt:
    """Hold a row's prompt, and the columns it was made of."""

    text: Any
    columns: tuple[str, ...]

    @property
    def layout(self) -> str:
        """Name the layout, with the columns of the prompt."""
        name = PROMPT_COLUMNS.get(self.columns[-1], "named column")
        if self.columns == ("question",):
            name = "question"
        return f"{name} ({', '.join(self.columns)})"


def find_prompt(row: Mapping[str, Any]) -> Prompt | None:
    """Return the prompt of a row by the names of its columns, or None where none of them holds one.

    An empty ``prompt`` says that there is none, unless another of these columns holds one.

    Raises:
        PreferenceDataError: two columns may be the prompt, and they differ; or one that belongs to it is no text.
    """
    prompt = row.get("prompt")
    given = [name for name in PROMPT_COLUMNS if _said(row.get(name)) and name != "prompt"]
    if prompt is not None and not (given and prompt in ("", [])):
        return Prompt(prompt, ("prompt",))
    if not given:
        return None
    if len({_plain(row[name]) for name in given}) > 1:
        raise PreferenceDataError(
            f"the columns {' and '.join(map(repr, given))} may both hold the prompt, and they differ; name the one "
            f"that does with prompt_key={given[0]!r}",
            reason="ambiguous prompt",
        )
    main = given[0]
    parts = [name for name in SYSTEM_COLUMNS if _said(row.get(name))]
    before = [_message("system", row, name) for name in parts]
    text = row[main]
    if main == "instruction":
        turns = _history(row.get("history"))
        before += turns
        parts += ["history"] * bool(turns)
        if _said(row.get("input")):
            text = _below(text, row)
            parts.append("input")
    # The column that names the layout comes last, where `layout` looks it up.
    columns = (*parts, main)
    if not before:
        return Prompt(text, columns)
    turns = as_text(text, main)
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    elif turns and turns[0]["role"] == "system":
        before = [message for message in before if message["role"] != "system"]
    return Prompt(before + turns, columns)


def _plain(value: Any) -> str:
    try:
        return "\n".join(message_texts(as_text(value, None))).strip()
    except PreferenceDataError:
        return repr(value)


def _said(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _message(role: str, row: Mapping[str, Any], column: str) -> Message:
    if not isinstance(row[column], str):
        raise PreferenceDataError(f"got {show(row[column])}; expected a string", reason="wrong type", column=column)
    return {"role": role, "content": row[column]}


def _below(instruction: Any, row: Mapping[str, Any]) -> str:
    """Put the input below the instruction, as LLaMA-Factory does."""
    for column, value in (("instruction", instruction), ("input", row["input"])):
        if not isinstance(value, str):
            raise PreferenceDataError(f"got {show(value)}; expected a string", reason="wrong type", column=column)
    return f"{instruction}\n{row['input']}" if instruction.strip() else row["input"]


def _history(value: Any) -> list[Message]:
    """Return the earlier turns of an Alpaca row: pairs of what the user and the assistant said."""
    if not _said(value):
        return []
    try:
        pairs = parse_literal(value) if isinstance(value, str) else value
        turns = [(str(said), str(answered)) for said, answered in pairs]
    except (TypeError, ValueError):
        raise PreferenceDataError(
            f"got {show(value)}; expected a list of [user, assistant] pairs of texts",
            reason="wrong type",
            column="history",
        ) from None
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def prompt_candidates(rows: Iterable[Mapping[str, Any]], used: Iterable[str]) -> list[str]:
    """Name the other columns that could hold the prompt, by their cells.

    Most of these are several words or messages, or they are single words of which most differ: a name that comes back
    in many rows, an identifier, a number, a date or an address is none. Names that begin with ``chosen`` or
    ``rejected`` belong to the responses.
    """
    filled: Counter[str] = Counter()
    prose: Counter[str] = Counter()
    words: dict[str, set[str]] = {}
    skipped = {*used, "rater", "votes"}
    for row in rows:
        for name, value in row.items():
            if name in skipped or str(name).lower().startswith(("chosen", "rejected")) or is_missing(value):
                continue
            if isinstance(value, str) and not value.strip():
                continue
            filled[name] += 1
            prose[name] += _is_prose(value)
            if isinstance(value, str) and value.strip().rstrip("?!.").isalpha():
                words.setdefault(name, set()).add(value)
    differing = {name: len(values) for name, values in words.items() if len(values) > 1}
    return [name for name, count in filled.items() if 2 * (prose[name] + differing.get(name, 0)) >= count]


def _is_prose(value: Any) -> bool:
    """Tell several words, or messages, from anything else."""
    if isinstance(value, str):
        words = [word for word in value[:200].split() if any(character.isalpha() for character in word)]
        # Some scripts put no space between words.
        return len(words) > 1 or sum(ord(character) >= 0x3000 for character in value[:100]) > 3
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Mapping) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())


# --- responses under other names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredRow:
    """Hold several responses to one prompt with their scores, higher is better."""

    responses: list[Any]
    scores: list[Any]


def standard_row(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """Return a row with the standard columns prompt, chosen and rejected, and the layout it came in, if it is known.

    Raises:
        PreferenceDataError: the row has the columns of a known layout, and not its values.
    """
    if {"human_ref_A", "human_ref_B", "labels"} <= row.keys() and row["labels"] is not None:
        names = ("human_ref_A", "human_ref_B")
        better = str(row["labels"]).strip()
        if better not in ("0", "1", "0.0", "1.0", "True", "False"):
            problem = f"got {show(row['labels'])}; expected 1 where human_ref_A is the better one, else 0"
            raise PreferenceDataError(problem, reason="wrong type", column="labels")
        first, second = names if better in ("1", "1.0", "True") else names[::-1]
        prompt = row.get("history") if row.get("prompt") is None else row["prompt"]
        standard = {"prompt": prompt, "chosen": row[first], "rejected": row[second]}
        return without(row, (*names, "labels", "history")) | standard, "SHP (history, human_ref_A, human_ref_B, labels)"
    if row.get("preferred_output") is not None and row.get("non_preferred_output") is not None:
        given = row.get("input")
        prompt = given.get("messages") if isinstance(given, Mapping) else given
        standard = {
            "prompt": prompt if row.get("prompt") is None else row["prompt"],
            "chosen": row["preferred_output"],
            "rejected": row["non_preferred_output"],
        }
        used = ("input", "preferred_output", "non_preferred_output")
        return without(row, used) | standard, f"OpenAI ({', '.join(used)})"
    if row.get("label") is None and row.get("completion") is None and row.get("completions") is None:
        return compared_row(row) or (row, None)
    return row, None


def scored_row(row: Mapping[str, Any]) -> ScoredRow:
    """Return the responses and scores of an UltraFeedback row, which its column ``completions`` lists.

    The score is the first of fine-grained_score, overall_score, score and rating that all of them have.

    Raises:
        PreferenceDataError: a completion holds no response, or they have no score in common.
    """
    given = row["completions"]
    try:
        given = parse_literal(given) if isinstance(given, str) else given
        if isinstance(given, Mapping):  # a table of columns
            columns = {name: column for name, column in given.items() if isinstance(column, list | tuple)}
            given = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    except ValueError:
        given = None
    if not isinstance(given, list | tuple) or not all(isinstance(entry, Mapping) for entry in given):
        raise PreferenceDataError(
            f"got {show(row['completions'])}; expected a list of objects with a response and a score",
            reason="wrong type",
            column="completions",
        )
    key = next((name for name in _SCORES if given and all(_number(entry.get(name)) for entry in given)), None)
    if key is None:
        raise PreferenceDataError(
            f"the {len(given)} completions have no score in common; expected one of {', '.join(_SCORES)} in each",
            reason="no score",
            column="completions",
        )
    texts = []
    for entry in given:
        name = next((name for name in _RESPONSES if entry.get(name) is not None), None)
        if name is None:
            raise PreferenceDataError(
                f"a completion holds no response, {show(entry)}; expected a text named {', '.join(_RESPONSES)}",
                reason="missing column",
                column="completions",
            )
        texts.append(entry[name])
    return ScoredRow(texts, [float(entry[key]) for entry in given])


def _number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False

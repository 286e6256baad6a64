"""Hidden reasoning in answers: find where it ends, so that the answer after it is judged.

Reasoning models write their reasoning before the answer: between markers in the text, beside it in a field of the
message, or as a part of a content that is a list. The rule for markers in a text is narrow, for an answer may quote
them:

- Only a marker at the *beginning* of the text opens reasoning; a marker further on, or in a code block that the text
  begins with, is quoted and stays. Several blocks may follow one another.
- Reasoning ends at its first closing marker that does not stand in code. Without a closing marker the text was cut
  off, and holds no answer.
- A closing marker without an opening one before it ends reasoning whose opening marker the chat template wrote. It
  counts where a model writes it: at the beginning of a line, after the end of a sentence, or joined to the last word
  at the end of a line. In the middle of a sentence or in code it is quoted.

Markers: ``<think>``, ``<thinking>``, ``<thought>``, ``<reasoning>`` and the like, ``[THINK]`` (Mistral), ``◁think▷``
(Kimi), ``<|START_THINKING|>`` (Cohere), ``<|begin_of_thought|>``, ``<|channel>thought`` (Gemma), the channels of
harmony (gpt-oss), also with their special tokens dropped, and Granite's two sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

__all__ = [
    "REASONING",
    "Content",
    "SplitAnswer",
    "answer_of",
    "checked_reasoning",
    "closes_reasoning",
    "field_reasoning",
    "is_marker",
    "judged_text",
    "opening_at_end",
    "read_content",
    "split_reasoning",
    "training_text",
]

REASONING = ("strip", "keep")
MAX_MARKERS = 64

_TAG = r"(?:[a-z]+:)?(?:think(?:ing)?|thoughts?|reasoning|scratchpad|antthinking)"
_SPACE = "\ufeff\u200b \t\r\n"
# What opens reasoning at the beginning of a text, and what closes it.
_BLOCKS = [
    (re.compile(rf"<({_TAG})(?:\s[^<>]*)?>", re.IGNORECASE), rf"</({_TAG})\s*>"),
    (re.compile(r"<(details)\s[^<>]*type=[\"']reasoning[\"'][^<>]*>", re.IGNORECASE), r"</(details)\s*>"),
    (re.compile(r"\[(THINK)\]"), r"\[/(THINK)\]"),
    (re.compile(r"◁(think)▷"), r"◁/(think)▷"),
    (re.compile(r"<\|begin_of_(thought)\|>"), r"<\|end_of_(thought)\|>"),
    (re.compile(r"<\|START_(THINKING)\|>"), r"<\|END_(THINKING)\|>"),
    (re.compile(r"<\|channel>(thought)\b"), r"<channel\|>"),
    (re.compile(r"<unused94>(thought)\b"), r"<unused95>"),
]
_LONE = re.compile(
    rf"</{_TAG}\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>", re.IGNORECASE
)
_HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|constrain|>")
_OPENERS = re.compile("|".join(f"(?:{opener.pattern})" for opener, _ in _BLOCKS), re.IGNORECASE)
# What some models put around the answer itself.
_FRAMES = [
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
]
# https://cookbook.openai.com/articles/openai-harmony: messages of channels, of which "final" is the answer.
_HARMONY = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>\s*(?:analysis|commentary|final)\b")
_HARMONY_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_HARMONY_END = re.compile(r"<\|(?:end|return|call|start)\|>")
# The same where the tokenizer dropped the special tokens, which leaves their arguments.
_BARE_HARMONY = re.compile(r"analysis(?=\S).*?assistantfinal", re.DOTALL)
_GRANITE = re.compile(r"(?:Here is|Here's) my thought process:.*?(?:Here is|Here's) my response:", re.DOTALL)

_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_content")


@dataclass(frozen=True)
class SplitAnswer:
    """A text in two: the reasoning with its markers, and the answer after it.

    Attributes:
        reasoning: what comes before the answer; empty where the text begins with its answer.
        answer: what is judged; the whole text, unchanged, where there is no reasoning; empty where the text was cut
            off before its answer.
    """

    reasoning: str
    answer: str


@dataclass(frozen=True)
class Content:
    """The text of a message whose content is a list of parts, and the reasoning in it."""

    text: str
    reasoning: str


def split_reasoning(text: str) -> SplitAnswer:
    """Split a text where its hidden reasoning ends; see the rule at the top of :mod:`pfm.reasoning`.

    >>> split_reasoning("<think>2 + 2, that is 4.</think>\\n\\nFour.").answer
    'Four.'
    >>> split_reasoning("Write `<think>` first.").answer
    'Write `<think>` first.'
    """
    end = _end_of_reasoning(text)
    if end is None:
        return SplitAnswer("", text)
    answer = text[end:].strip(_SPACE)
    for opening, closing in _FRAMES:
        if answer.startswith(opening):
            answer = answer.removeprefix(opening).removesuffix(closing).strip(_SPACE)
    if _HARMONY.match(text.lstrip(_SPACE)):
        answer = _HARMONY_END.split(answer, maxsplit=1)[0].strip(_SPACE)
    return SplitAnswer(text[:end], answer)


def answer_of(text: str) -> str:
    """Return the answer of a text without its hidden reasoning; empty where it was cut off before the answer."""
    return split_reasoning(text).answer


def judged_text(text: str, reasoning: str = "strip") -> str:
    """Return what of an output is judged: its answer, or with ``reasoning="keep"`` all of it."""
    return text if reasoning == "keep" else answer_of(text)


def training_text(text: str, reasoning: str = "strip") -> str:
    """Return what of a training output is encoded: as :func:`judged_text`, but never an empty text.

    A row whose output was cut off before its answer still says which of two outputs is preferred.
    """
    judged = judged_text(text, reasoning)
    return judged if judged.strip() else text


def is_marker(token: str) -> bool:
    """Return whether a token of a vocabulary marks reasoning, so that a text without it could not be split."""
    return bool(_OPENERS.fullmatch(token) or _LONE.fullmatch(token) or token in _HARMONY_TOKENS)


def opening_at_end(prompt: str) -> str:
    """Return the marker, with the white space after it, by which a chat template opens reasoning; else ""."""
    end = len(prompt.rstrip())
    found = next((marker for marker in _OPENERS.finditer(prompt) if marker.end() == end), None)
    return "" if found is None else prompt[found.start() :]


def closes_reasoning(text: str) -> bool:
    """Return whether a text holds a closing marker anywhere."""
    return _LONE.search(text) is not None


def checked_reasoning(value: Any) -> str:
    """Return the setting.

    Raises:
        ValueError: it is neither "strip" nor "keep".
    """
    if value not in REASONING:
        raise ValueError(
            f"reasoning must be 'strip' (judge the answer after hidden reasoning) or 'keep' (judge the whole text), "
            f"got {value!r}"
        )
    return value


def read_content(content: Any) -> Content | None:
    """Read a content that is a list of parts: its texts, and the reasoning beside them.

    Returns:
        None if a part is something else than text or reasoning, or there is none.
    """
    if not isinstance(content, list | tuple):
        return None
    texts, reasoning = [], []
    for part in content:
        kind = _entry(part, "type")
        if kind in _TEXT_PARTS and isinstance(_entry(part, "text"), str):
            texts.append(_entry(part, "text"))
        elif kind in _REASONING_PARTS:
            reasoning.append(_reasoning_of(part))
        else:
            return None
    return Content("".join(texts), "".join(reasoning)) if texts or reasoning else None


def field_reasoning(message: Any) -> str:
    """Return the reasoning that a server put beside the content of a message; empty where there is none."""
    return next((value for name in _FIELDS if isinstance(value := _entry(message, name), str) and value), "")


def _reasoning_of(part: Any) -> str:
    """Return the text of a part of reasoning, whatever it calls it."""
    for name in ("thinking", "reasoning", "text", "summary"):
        value = _entry(part, name)
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple):
            return "".join(text for item in value if isinstance(text := _entry(item, "text"), str))
    return ""


def _entry(value: Any, name: str) -> Any:
    """Return an entry of a mapping or an attribute of an object of a client; None where there is none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _end_of_reasoning(text: str) -> int | None:
    """Return where the reasoning ends, the length of the text if it never does, or None if there is none."""
    start = _skip_space(text, 0)
    if _HARMONY.match(text, start):
        finals = list(_HARMONY_FINAL.finditer(text))
        return finals[-1].end() if finals else len(text)
    for sentence in (_BARE_HARMONY, _GRANITE):
        if found := sentence.match(text, start):
            return found.end()
    end = None
    while (block := _block_end(text, start)) is not None:
        end = block
        start = _skip_space(text, end)
    if end is None:
        end = _lone_end(text, start)
        if end is not None and not text[:end].strip(_SPACE).partition(">")[2]:
            # A closing marker and nothing before it: the reasoning may follow, and end with another.
            end = _lone_end(text, end) or end
    return end


def _block_end(text: str, start: int) -> int | None:
    """Return where the block ends that a marker at ``start`` opens; None if there is no such marker."""
    for opener, closing in _BLOCKS:
        found = opener.match(text, start)
        if found is None:
            continue
        begin = found.end()
        # A bound: a text of nothing but markers is looked at once for each of them.
        closers = list(islice(re.compile(closing, re.IGNORECASE).finditer(text, begin), MAX_MARKERS))
        name = found[1].lower()
        closers = [closer for closer in closers if not closer.groups() or closer[1].lower() == name] or closers
        if not closers:
            return len(text)
        first = next((closer for closer in closers if not _in_code(text, closer.start(), begin)), closers[0])
        # Blocks within the reasoning: each of their openers may have left a closing marker to come.
        end = first.end()
        for _ in islice(opener.finditer(text, begin, first.start()), MAX_MARKERS):
            further = next((closer for closer in closers if closer.start() >= end), None)
            if further is None or not _ends_reasoning(text, further.start(), further.end(), end):
                break
            end = further.end()
        return end
    return None


def _lone_end(text: str, start: int) -> int | None:
    """Return where reasoning ends of which the text holds no opening marker."""
    found = _LONE.search(text, start)
    if found is None or _OPENERS.search(text, start, found.start()):
        return None
    return found.end() if _ends_reasoning(text, found.start(), found.end(), start) else None


def _ends_reasoning(text: str, start: int, end: int, begin: int) -> bool:
    """Return whether a closing marker at [start, end) stands where a model ends its reasoning, and is not quoted."""
    if _in_code(text, start, begin):
        return False
    before = text[begin:start]
    line = before.rstrip(" \t")
    if not line or line[-1] in "\r\n.!?…。！？":
        return True
    rest = text[end:].lstrip(" \t\r")
    return before[-1] == line[-1] and before[-1] not in "\"'`“‘«([/" and rest.startswith("\n")


def _in_code(text: str, place: int, begin: int) -> bool:
    """Return whether a place stands in a fenced block or between backticks, as far as the text from ``begin`` says."""
    if text.count("```", begin, place) % 2:
        return "```" in text[place:]
    line = text.rfind("\n", begin, place) + 1 or begin
    stop = text.find("\n", place)
    rest = text[place : len(text) if stop < 0 else stop]
    return text.count("`", line, place) % 2 == 1 and "`" in rest


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE:
        start += 1
    return start

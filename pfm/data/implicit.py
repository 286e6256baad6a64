"""Prompts that the responses hold: the beginning that chosen and rejected share, where it is one.

Transcripts and conversations say by their form where the prompt ends. Plain strings do not, and answers to one question
often begin alike ("Well, …"), so that a common opening counts only where most rows have one of some length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pfm.data.conversations import Text, shared_turns
from pfm.data.errors import PreferenceDataError, show
from pfm.data.transcripts import is_opening, is_transcript, shared_opening, split_transcript

__all__ = ["NO_PROMPT", "ImplicitPrompt", "conversational_prompt", "opening_prompt", "split_prompt"]


@dataclass(frozen=True)
class ImplicitPrompt:
    """Hold how the rows of one source hold their prompts, and what the layout is called."""

    kind: str
    layout: str

    def split(self, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
        """Split a pair into (prompt, chosen, rejected).

        Raises:
            PreferenceDataError: one response is a string and the other a conversation, or transcripts share no prompt.
        """
        if self.kind == "transcripts":
            return _split_transcripts(chosen, rejected)
        prompt, *_ = split = split_prompt(chosen, rejected)
        if isinstance(prompt, str):
            held = bool(prompt) and (self.kind == "words" or (self.kind == "openings" and is_opening(prompt)))
        else:
            held = self.kind == "turns"
        return split if held else (prompt[:0], chosen, rejected)


NO_PROMPT = ImplicitPrompt("none", "no prompts (chosen, rejected)")
_TRANSCRIPTS = ImplicitPrompt("transcripts", "HH transcripts (Human: and Assistant: in chosen, rejected)")
_TURNS = ImplicitPrompt("turns", "conversations (first turns shared by chosen, rejected)")
_OPENING = "implicit prompt (opening shared by chosen, rejected)"


def conversational_prompt(pairs: Sequence[tuple[Text, Text]]) -> ImplicitPrompt | None:
    """Recognise transcripts, and conversations that share their first turns: more than half of the pairs are such."""
    strings = [(one, two) for one, two in pairs if isinstance(one, str) and isinstance(two, str)]
    lists = [(one, two) for one, two in pairs if isinstance(one, list) and isinstance(two, list)]
    if 2 * sum(is_transcript(one) and is_transcript(two) for one, two in strings) > len(pairs):
        return _TRANSCRIPTS
    return _TURNS if 2 * sum(shared_turns(one, two) > 0 for one, two in lists) > len(pairs) else None


def opening_prompt(pairs: Sequence[tuple[Text, Text]]) -> ImplicitPrompt:
    """Recognise openings: more than half of the pairs share three words; in a single pair any whole word counts.

    With one pair a common first word cannot be distinguished from a prompt.
    """
    openings = [one[: shared_opening(one, two)] for one, two in pairs if isinstance(one, str) and isinstance(two, str)]
    if len(pairs) == 1 and any(openings):
        return ImplicitPrompt("words", _OPENING)
    return ImplicitPrompt("openings", _OPENING) if 2 * sum(map(is_opening, openings)) > len(pairs) else NO_PROMPT


def _split_transcripts(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    cut = None
    if isinstance(chosen, str) and isinstance(rejected, str) and is_transcript(chosen) and is_transcript(rejected):
        cut = split_transcript(chosen, rejected)
    if cut is None:
        raise PreferenceDataError(
            f"chosen is {show(chosen)} and rejected is {show(rejected)}; expected transcripts that are the same "
            "up to an 'Assistant:', as in most other rows",
            reason="no shared prompt",
        )
    return chosen[: cut[0]], chosen[cut[0] :], rejected[cut[1] :]


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Split the beginning that two texts share off as their prompt: (prompt, chosen, rejected).

    Conversations share whole turns. Strings share characters, cut back to white space in both, so that no word
    is split; the white space stays with the responses and ``prompt + chosen`` is the text that came in. Both
    responses keep at least one turn or one word; the prompt may come out empty.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_opening(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        cut = shared_turns(chosen, rejected)
    else:
        raise PreferenceDataError(
            f"chosen is {show(chosen)} and rejected is {show(rejected)}; without a prompt "
            "expected two strings or two conversations that share a beginning",
            reason="wrong type",
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]

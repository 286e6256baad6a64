"""Tokenize texts as data: text that spells a special token is not read as one.

A tokenizer turns ``<|im_end|>`` or ``</s>`` in a text into the token that ends a turn, wherever the text came from. In
a chat template that is for the template alone to write: a candidate, a prompt or an exemplar that spells it would
end its own turn and begin another's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SpecialTokens"]


class SpecialTokens:
    """Breaks the spellings of a tokenizer's special tokens by a space behind their first character.

    Args:
        tokenizer: of Transformers, with ``all_special_tokens`` and, where it has it, ``added_tokens_decoder``.
    """

    def __init__(self, tokenizer: Any) -> None:
        found = set(getattr(tokenizer, "all_special_tokens", ()))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        found |= {token.content for token in added if getattr(token, "special", False)}
        # One character cannot be broken, and the longest spelling comes first.
        spelled = sorted({token.strip() for token in found if len(token.strip()) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def broken(self, text: str) -> str:
        """Return the text, with no spelling of a special token in it."""
        if self._pattern is None:
            return text
        while True:
            found = self._pattern.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)
            if found == text:
                return text
            text = found  # what was broken may leave another's spelling

    def broken_turns(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with their texts broken; contents that are no texts stay as they are."""
        return [
            {**message, "content": self.broken(message["content"])}
            if isinstance(message.get("content"), str)
            else dict(message)
            for message in messages
        ]

"""A model of the example preferences: it hands out their drafts, and judges by their grades when asked to."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from support.fault_server import default_reply


def example_reply() -> Callable[[list[dict[str, Any]], int], str]:
    """Make a reply ``(messages, number) -> str`` for :class:`fault_server.FaultServer`."""
    grades: dict[str, dict[str, int]] = {}  # prompt -> draft -> grade
    for line in (files("pfm") / "assets" / "preferences.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        of_prompt = grades.setdefault(row["prompt"], {})
        of_prompt |= {row["chosen"]: row["score_chosen"], row["rejected"]: row["score_rejected"]}

    def reply(messages: list[dict[str, Any]], number: int) -> str:
        asked = messages[-1]["content"]
        if asked in grades:
            drafts = sorted(grades[asked])
            random.Random(hashlib.sha256(asked.encode()).digest()).shuffle(drafts)
            return drafts[number % len(drafts)]
        of_prompt = next((found for prompt, found in grades.items() if prompt in asked), {})
        shown = sorted((asked.find(draft), grade) for draft, grade in of_prompt.items() if draft in asked)
        if "VERDICT" in asked and len(shown) == 2:
            (_, first), (_, second) = shown
            return f"By its grades.\nVERDICT: {'TIE' if first == second else 'A' if first > second else 'B'}"
        return default_reply(messages, number)

    return reply

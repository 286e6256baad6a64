"""b of answers that were made elsewhere: what every adapter asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pfm.generators import Prompt
from pfm.generators.base import is_usable_text
from pfm.protocols import Flow
from pfm.refiner import wrap

__all__ = ["FlowScorer", "message_list"]


class FlowScorer:
    """Scores answers by b(y|x), the chance that an answer beats an independent draw of the reference.

    An answer that is empty, white space, or nothing but hidden reasoning scores 0.

    Args:
        flow: a fitted flow.
        encoder: the encoder on whose vectors it was fitted.
        reasoning: as for :func:`pfm.wrap`.

    Raises:
        TypeError, ValueError: as of :func:`pfm.wrap`.

    >>> import pfm
    >>> rows = [{"prompt": f"Ask {n}", "chosen": f"Yes, {n} times!", "rejected": f"no {n}"} for n in range(40)]
    >>> encoder = pfm.encoders.SurfaceEncoder()
    >>> pairs = pfm.PreferencePairs.from_rows(rows).encode(encoder, progress=False)
    >>> flow = pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False)
    >>> low, high, none = FlowScorer(flow, encoder)(["Tea?"] * 3, ["no thanks", "Yes, please!", " "])
    >>> low < 0.5 < high, none
    (True, 0.0)
    """

    def __init__(self, flow: Flow, encoder: Any, *, reasoning: str = "strip") -> None:
        self.refiner = wrap(None, flow, encoder=encoder, reasoning=reasoning)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Return b (N,) of N answers, each under its prompt, a text or a conversation.

        Raises:
            TypeError: an answer or a prompt is not text.
            ValueError: unequal lengths, a prompt is empty though the flow reads prompts, an answer is no valid Unicode,
                or the encoder's values are not finite.
        """
        prompts, answers = list(prompts), list(answers)
        if len(prompts) != len(answers):
            raise ValueError(f"prompts and answers must be equally many, got {len(prompts)} and {len(answers)}")
        for row, answer in enumerate(answers):
            if not isinstance(answer, str):
                raise TypeError(f"answers[{row}] must be a text, got {type(answer).__name__}")
            if answer.strip() and not is_usable_text(answer):
                raise ValueError(f"answers[{row}] is no valid Unicode: it holds half of a surrogate pair")
        rows = [row for row, answer in enumerate(answers) if answer.strip()]
        scores = [0.0] * len(answers)
        if not rows:
            return scores
        results = self.refiner.refine([[answers[row]] for row in rows], [prompts[row] for row in rows])
        for row, result in zip(rows, results, strict=True):
            if not math.isfinite(result.win_probability):
                raise ValueError(f"answers[{row}] could not be scored: {result.error}")
            scores[row] = result.win_probability
        return scores


def message_list(messages: Sequence[Any], name: str) -> list[dict[str, str]]:
    """Return messages, as dicts or as objects with ``role`` and ``content`` or ``text``, as dicts of texts.

    Raises:
        TypeError: a message is something else; ``name`` says of what.
    """
    found = []
    for place, message in enumerate(messages):
        if isinstance(message, dict):
            role, content = message.get("role"), message.get("content")
        else:
            role = getattr(message, "role", None)
            content = getattr(message, "text", None) if role is not None else None
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            content = "\n".join(str(part["text"]) for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise TypeError(f"{name}[{place}] must be a message with role and text, got {type(message).__name__}")
        found.append({"role": role, "content": content})
    return found

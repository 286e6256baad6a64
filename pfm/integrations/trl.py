"""A reward function for TRL's online trainers (GRPO, RLOO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pfm._internal.checks import check_choice
from pfm.integrations.scorer import FlowScorer, message_list
from pfm.protocols import Flow

__all__ = ["trl_reward"]

FLOOR = 1e-6  # of a probability, before its log-odds are taken
SCALES = ("probability", "log_odds")


def trl_reward(
    flow: Flow, encoder: Any, *, scale: str = "probability", name: str = "pfm_reward", reasoning: str = "strip"
) -> Callable[..., list[float]]:
    """Return b as a reward function ``f(prompts, completions, **columns) -> list[float]``.

    Prompts and completions are texts, or lists of messages in the conversational format, of which the last completion
    message is the answer. TRL itself is not needed to make the function.

    Args:
        flow, encoder, reasoning: as for :class:`FlowScorer`.
        scale: "probability" for b in [0, 1], or "log_odds" for log(b / (1 - b)), from -13.8 to 13.8, which does not
            level off at good answers.
        name: under which the trainer logs the reward.

    Raises:
        ValueError: an unknown scale. TypeError, ValueError: as of :class:`FlowScorer`.

    A policy that is trained on b learns to please b: hold out a judge that has not seen the training.
    """
    check_choice("scale", scale, SCALES)
    scorer = FlowScorer(flow, encoder, reasoning=reasoning)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        del columns  # of the data set, and what trainers add
        asked = [
            prompt if isinstance(prompt, str) else message_list(prompt, f"prompts[{row}]")
            for row, prompt in enumerate(prompts)
        ]
        found = scorer(asked, [_answer(completion, row) for row, completion in enumerate(completions)])
        if scale == "probability":
            return found
        bounded = (min(max(b, FLOOR), 1 - FLOOR) for b in found)
        return [math.log(b / (1 - b)) for b in bounded]

    reward.__name__ = reward.__qualname__ = name
    return reward


def _answer(completion: Any, row: int) -> str:
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list | tuple) or not completion:
        raise TypeError(f"completions[{row}] must be a text or a list of messages, got {type(completion).__name__}")
    last = completion[-1]
    if isinstance(last, dict) and last.get("content") is None:  # a call of a tool has no answer yet
        return ""
    (message,) = message_list(
        [{"role": "assistant", **last} if isinstance(last, dict) else last], f"completions[{row}]"
    )
    return message["content"]

"""A scorer for inspect_ai."""

from __future__ import annotations

import asyncio
from typing import Any

from pfm.integrations.scorer import FlowScorer, message_list
from pfm.protocols import Flow

__all__ = ["inspect_scorer"]


def inspect_scorer(flow: Flow, encoder: Any, *, reasoning: str = "strip") -> Any:
    """Return b as a scorer, with its mean and standard error over the samples for metrics.

    The prompt is the sample's input, the answer the model's completion; targets play no part.

    Args:
        flow, encoder, reasoning: as for :class:`FlowScorer`.

    Raises:
        ImportError: inspect_ai is not installed. TypeError, ValueError: as of :class:`FlowScorer`.
    """
    try:
        from inspect_ai.scorer import (  # pyright: ignore[reportMissingImports]
            Score,
            Target,
            mean,
            scorer,
            stderr,
        )
        from inspect_ai.solver import TaskState  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("inspect_scorer needs inspect_ai: pip install inspect-ai") from error
    of_answers = FlowScorer(flow, encoder, reasoning=reasoning)

    @scorer(metrics=[mean(), stderr()], name="pfm_win_probability")
    def win_probability() -> Any:
        async def score(state: TaskState, target: Target) -> Score:
            given = state.input
            prompt = given if isinstance(given, str) else message_list(given, "input")
            answer = state.output.completion
            (b,) = await asyncio.to_thread(of_answers, [prompt], [answer])
            return Score(value=b, answer=answer, explanation=f"win probability b = {b:.3f} against the reference")

        return score

    return win_probability()

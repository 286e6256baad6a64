"""A metric for DSPy's evaluation and optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pfm._internal.checks import check_number
from pfm.integrations.scorer import FlowScorer
from pfm.protocols import Flow

__all__ = ["dspy_metric"]


def dspy_metric(
    flow: Flow,
    encoder: Any,
    *,
    prompt: str = "question",
    answer: str = "answer",
    threshold: float = 0.5,
    reasoning: str = "strip",
) -> Callable[..., float | bool]:
    """Return b as a metric ``metric(example, prediction, trace=None) -> float | bool``.

    With a trace, where DSPy asks whether a demonstration is good enough to be kept, the result is b >= threshold.

    Args:
        flow, encoder, reasoning: as for :class:`FlowScorer`.
        prompt: field of the example that holds the prompt.
        answer: field of the prediction that holds the answer.
        threshold: of b in [0, 1], for demonstrations.

    Raises:
        ValueError: the threshold is out of range. TypeError, ValueError: as of :class:`FlowScorer`.
    """
    threshold = check_number("threshold", threshold, least=0, most=1)
    scorer = FlowScorer(flow, encoder, reasoning=reasoning)

    def metric(
        example: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> float | bool:
        del pred_name, pred_trace  # of GEPA, which asks about single modules too
        (b,) = scorer([_field(example, prompt, "example")], [_field(prediction, answer, "prediction")])
        return b if trace is None else b >= threshold

    return metric


def _field(record: Any, name: str, what: str) -> str:
    value = record.get(name) if isinstance(record, dict) else getattr(record, name, None)
    if not isinstance(value, str):
        known = ", ".join(record.keys()) if hasattr(record, "keys") else "none that are known"
        raise TypeError(
            f"{what} must have a text in field {name!r}, got {type(value).__name__}; its fields are {known}"
        )
    return value

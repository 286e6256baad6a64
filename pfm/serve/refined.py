"""Writes the answer to a chat request: the chosen candidate, and the evidence for it."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

from fastapi.responses import Response

from pfm.serve.answer import envelope, events, to_json
from pfm.serve.asked import EXTENSION, Asked
from pfm.serve.drawn import Drawn, summed
from pfm.serve.http import JSON, own_headers, plain_response, streamed_response
from pfm.serve.judge import Judged
from pfm.serve.note import Note
from pfm.serve.state import State

__all__ = ["refined_answer"]


def refined_answer(
    state: State,
    drawn: Drawn,
    judged: Judged | None,
    plain: str | None,
    asked: Asked,
    note: Note,
    spent: dict[str, Any] | None,
) -> Response:
    """Write the chosen candidate in the upstream's envelope, or the first one and ``plain``, why it was not judged."""
    evidence: dict[str, Any] = {
        "refined": judged is not None,
        "changed": False,
        "reason": plain,
        "n": asked.n if asked.plan is None else "auto",
        "calls": drawn.calls,
        "dropped": drawn.dropped,
        "errors": dict(drawn.errors),
    }
    if spent is not None:
        evidence["spent"] = spent
    text, usage = None, drawn.usage()
    hidden = [choice.reasoning for choice in drawn.choices]
    if judged is not None:
        refinement = judged.refinement
        in_text = refinement.reasoning or [0] * len(hidden)
        hidden = [inside + beside for inside, beside in zip_longest(in_text, hidden, fillvalue=0)]
        index = refinement.index if 0 <= refinement.index < len(drawn.choices) else 0
        chosen = drawn.choices[index]
        data, choice, reply = chosen.reply.data or {}, chosen.choice, chosen.reply
        text = None if refinement.text == chosen.text else refinement.text
        before, after = refinement.probabilities[0], refinement.win_probability
        state.metrics.gain.observe(after - before)
        note.b = (before, after)
        usage = summed(usage, refinement.usage)  # of a decoder that asks a model itself
        evidence |= {
            "calls": drawn.calls + refinement.calls,
            "changed": refinement.changed,
            "reason": refinement.reason,
            "index": refinement.index,
            "win_probability": {"original": before, "chosen": after},
            "margin": _finite(_margin(state, asked)),
            "by": None if asked.rule is None else asked.rule.by,
            "candidates": refinement.candidates,
            "probabilities": refinement.probabilities,
        }
        if refinement.trace is not None:
            evidence["trace"] = refinement.trace
    else:
        first = drawn.choices[0] if drawn.choices and drawn.plain is None else None
        reply = drawn.replies[0] if first is None else first.reply
        data = reply.data or {}
        choice = data["choices"][0] if first is None else first.choice
    if any(hidden):  # characters of each candidate that were set aside: what follows them was judged
        evidence["reasoning"] = hidden
    note.outcome = "unjudged" if judged is None else "changed" if evidence["changed"] else "kept"
    note.encoder = 0.0 if judged is None else judged.encoder_seconds
    evidence["seconds"] = {
        "queue": round(note.queue, 5),
        "upstream": round(note.upstream, 5),
        "encoder": round(note.encoder, 5),
        "flow": round(0.0 if judged is None else judged.flow_seconds, 5),
        "total": round(note.elapsed(), 5),
    }
    whole = envelope(data, choice, text, usage)
    told = {"refined": str(judged is not None).lower(), "changed": str(evidence["changed"]).lower()}
    if judged is None:
        told["reason"] = str(plain)
    headers = [*reply.headers, *own_headers(told)]
    if asked.stream:
        return streamed_response(events(whole, evidence, include_usage=asked.include_usage), headers)
    content = to_json({**whole, EXTENSION: evidence})
    return plain_response(content, 200, [*headers, JSON])


def _margin(state: State, asked: Asked) -> float | None:
    if asked.rule is None or asked.rule.by == "sample":  # it has no guard
        return None
    return state.refiner.flow.guard_margin if asked.rule.margin is None else asked.rule.margin


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""Judge candidates: encode the answers of several prompts together, ask the flow for b, let the decoder choose."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pfm.data.outputs import same_output
from pfm.decoders import Decoder, Judged, Select, Selection
from pfm.decoders.improve import added
from pfm.generators.base import Accepts, count
from pfm.protocols import CandidateFlow, Flow
from pfm.reasoning import judged_text
from pfm.refiner.checks import accepted_outputs, flat_size
from pfm.refiner.refinement import Refinement

__all__ = ["judge", "log_odds"]

LOGIT_FLOOR = 1e-6  # of b, before its log-odds are taken


def judge(
    portion: list[Refinement], keys: list[str], *, flow: Flow, encoder: Any, decoder: Decoder, reasoning: str
) -> None:
    """Encode all candidates at once, judge them in one call, and decode prompt by prompt, in place."""
    started = time.perf_counter()
    judged = []
    for result, key in zip(portion, keys, strict=True):
        answered = _Answered.of(result, key, reasoning, accepted_outputs(encoder))
        if answered.places:
            judged.append(answered)
        elif result.candidates:
            _keep_unanswered(result)
    if not judged:
        return
    vectors, contexts, probabilities = _probabilities(judged, flow, encoder, decoder)
    end = 0
    rows: list[tuple[_Answered, Judged]] = []
    for row, answered in enumerate(judged):
        start, end = end, end + len(answered.texts)
        result, found = answered.result, probabilities[start:end]
        of_all = np.zeros(len(result.candidates))
        of_all[answered.places] = found
        result.probabilities = of_all.tolist()
        if np.isnan(found).any():
            _keep_unjudgeable(result)
            continue
        given = [result.candidates[place] for place in answered.places]
        context = None if contexts is None else contexts[row]
        seen = Judged(result.prompt, answered.key, given, vectors[start:end], context, found, reasoning)
        rows.append((answered, seen))
    for (answered, _), selection in zip(rows, _decoded(flow, decoder, [row for _, row in rows]), strict=True):
        _take(answered, selection, reasoning)
    share = (time.perf_counter() - started) / len(judged)
    for answered in judged:
        answered.result.seconds += share


def log_odds(
    rows: Sequence[Sequence[Any]], keys: Sequence[str], *, flow: Flow, encoder: Any, reasoning: str
) -> list[list[float]]:
    """Return logit b(y|x) against the reference of the outputs of each prompt; NaN where there is nothing to judge.

    Other candidates of the prompt have no influence, also where a preference model gives b.

    Args:
        rows: outputs of each prompt. keys: its text.
        flow, encoder, reasoning: as for :func:`judge`.
    """
    accepts = accepted_outputs(encoder)
    shown = [[judged_text(text, reasoning) if isinstance(text, str) else text for text in row] for row in rows]
    found = [[math.nan] * len(row) for row in shown]
    places = [(row, place) for row, texts in enumerate(shown) for place, text in enumerate(texts) if accepts(text)]
    if not places:
        return found
    texts = [shown[row][place] for row, place in places]
    vectors = _encoded(encoder.encode, texts, flow.metadata["dimension"], _event_shape(flow))
    usable = vectors.flatten(1).isfinite().all(dim=1)
    contexts = None
    if context_dimension := flow.metadata.get("context_dimension"):
        asked = sorted({row for row, _ in places})
        encode = getattr(encoder, "encode_prompts", encoder.encode)
        encoded = _encoded(encode, [keys[row] for row in asked], context_dimension)
        contexts = encoded[torch.tensor([asked.index(row) for row, _ in places])]
        usable &= contexts.isfinite().all(dim=1)
        contexts = contexts[usable]
    if usable.any():
        b = flow.win_probability(vectors[usable], contexts).detach().cpu().double().numpy()
        b = b.clip(LOGIT_FLOOR, 1 - LOGIT_FLOOR)
        judged = (place for place, good in zip(places, usable.tolist(), strict=True) if good)
        for (row, place), value in zip(judged, (np.log(b) - np.log1p(-b)).tolist(), strict=True):
            found[row][place] = value
    return found


def _decoded(flow: Flow, decoder: Decoder, rows: list[Judged]) -> Iterable[Selection]:
    """Decode several prompts: together where the decoder can, else one by one."""
    together = getattr(decoder, "decode_many", None)
    if together is not None:
        return together(flow, rows)
    return (decoder.decode(flow, row.candidates, row.vectors, row.context, row.probabilities, row.key) for row in rows)


def _probabilities(
    judged: list[_Answered], flow: Flow, encoder: Any, decoder: Decoder
) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
    """Return vectors (N, D), contexts (G, C) or None, and b (N,), NaN where the encoder's values are.

    N counts the answers of all G prompts, one prompt after the other.
    """
    texts = [text for answered in judged for text in answered.texts]
    vectors = _encoded(encoder.encode, texts, flow.metadata["dimension"], _event_shape(flow))
    usable = vectors.flatten(1).isfinite().all(dim=1)
    sizes = torch.tensor([len(answered.texts) for answered in judged])
    of_prompt = torch.arange(len(judged)).repeat_interleave(sizes)
    contexts = context_rows = None
    context_dimension = flow.metadata.get("context_dimension")
    if context_dimension:
        encode = getattr(encoder, "encode_prompts", encoder.encode)
        contexts = _encoded(encode, [answered.key for answered in judged], context_dimension)
        context_rows = contexts[of_prompt]
        usable &= context_rows.isfinite().all(dim=1)
    probabilities = np.full(len(texts), np.nan)
    if usable.any():
        judgeable = slice(None) if bool(usable.all()) else usable  # the usual case copies nothing
        rows = None if context_rows is None else context_rows[judgeable]
        if isinstance(decoder, Select) and isinstance(flow, CandidateFlow):
            tags = _tags(judged, usable)
            found = flow.candidate_probabilities(vectors[judgeable], rows, of_prompt[judgeable], tags=tags)
        else:  # texts that a decoder adds later are to be compared with these: against the reference alike
            found = flow.win_probability(vectors[judgeable], rows)
        probabilities[usable.numpy()] = found.detach().cpu().double().numpy()
    return vectors, contexts, probabilities


@dataclass
class _Answered:
    """The candidates of one prompt that hold an answer.

    Attributes:
        result: of the prompt. key: its text.
        places: of these candidates among all. texts: what of each is judged.
    """

    result: Refinement
    key: str
    places: list[int]
    texts: list[str]

    @classmethod
    def of(cls, result: Refinement, key: str, reasoning: str, accepts: Accepts) -> _Answered:
        """Set hidden reasoning aside, and note in the result how much."""
        beside = result.reasoning or [0] * len(result.candidates)
        texts = [judged_text(text, reasoning) if isinstance(text, str) else text for text in result.candidates]
        hidden = [
            aside + (len(whole) - len(text) if isinstance(whole, str) else 0)
            for aside, whole, text in zip(beside, result.candidates, texts, strict=True)
        ]
        result.reasoning = hidden if any(hidden) else []
        places = [place for place, text in enumerate(texts) if accepts(text)]
        return cls(result, key, places, [texts[place] for place in places])


def _encoded(
    encode: Callable[..., Any], texts: list[str], dimension: int | Sequence[int], shape: Sequence[int] = ()
) -> torch.Tensor:
    """Encode texts to (N, D) or (N, *shape) float32 on the CPU, and check the shape against what the flow takes."""
    vectors = torch.as_tensor(encode(texts, progress=False)).detach().to("cpu", torch.float32)
    expected = (len(texts), flat_size(dimension))
    if shape and tuple(vectors.shape) in (expected, (len(texts), *shape)):
        return vectors.reshape(len(texts), *shape)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"the encoder must return shape {expected} for {count(len(texts), 'text')}, "
            f"got {tuple(vectors.shape)}; use the encoder on which the flow was fitted"
        )
    return vectors


def _event_shape(flow: Flow) -> tuple[int, ...]:
    """Return the shape of one output for flows of matrices and images, () for flows of vectors."""
    shape = tuple(getattr(flow, "event_shape", ()))
    return shape if len(shape) > 1 else ()


def _tags(judged: list[_Answered], usable: torch.Tensor) -> list[str] | None:
    """Return the generator of every usable answer, one prompt after the other; None where one is not known."""
    if any(len(answered.result.generators) != len(answered.result.candidates) for answered in judged):
        return None
    tags = [answered.result.generators[place] for answered in judged for place in answered.places]
    return [tag for tag, good in zip(tags, usable.tolist(), strict=True) if good]


def _take(answered: _Answered, selection: Selection, reasoning: str) -> None:
    """Write a decoder's selection among the candidates with an answer into the result."""
    result, places = answered.result, answered.places
    index = selection.index
    index = places[index] if index < len(places) else len(result.candidates) + index - len(places)
    if selection.added:
        hidden = [_hidden(text, reasoning) for text in selection.added]
        if result.reasoning or any(hidden):
            result.reasoning = [*(result.reasoning or [0] * len(result.candidates)), *hidden]
        result.candidates = [*result.candidates, *selection.added]
        result.probabilities = [*result.probabilities, *selection.added_probabilities]
        if result.generators or selection.added_tags:
            drawn = result.generators or [""] * (len(result.candidates) - len(selection.added))
            result.generators = [*drawn, *(selection.added_tags or [""] * len(selection.added))]
    result.index = index
    result.text = result.candidates[index]
    result.win_probability = result.probabilities[index]
    result.changed = not same_output(result.text, result.original)
    result.generator = (result.generators[index] or None) if result.generators else None
    result.reason = selection.reason
    if places[0] != 0:
        kept = "kept the original", "took the first output with an answer"
        result.reason = f"changed: the original was cut off before its answer; {selection.reason.replace(*kept)}"
    result.calls += selection.calls
    result.usage = added(result.usage, selection.usage)
    result.trace = selection.trace
    result.error = result.error or selection.error


def _keep_unanswered(result: Refinement) -> None:
    """Keep the original of a prompt without any answer."""
    result.probabilities = [0.0] * len(result.candidates)
    result.win_probability = 0.0
    result.reason = "kept the original: no output holds an answer after its reasoning"
    found = (
        "EmptyAnswerError: every output was cut off within its hidden reasoning: let the generator write more tokens, "
        'or judge the reasoning too with reasoning="keep"'
    )
    result.error = found if result.error is None else f"{result.error}; {found}"


def _keep_unjudgeable(result: Refinement) -> None:
    """Keep the original of a prompt whose vectors the flow cannot compare."""
    rows = [str(row) for row, value in enumerate(result.probabilities) if math.isnan(value)]
    result.win_probability = result.probabilities[0]
    result.reason = "kept the original: the encoder's values are not finite"
    found = f"ValueError: the encoder gave NaN or infinity for the prompt or for candidates {', '.join(rows)}"
    result.error = found if result.error is None else f"{result.error}; {found}"


def _hidden(text: Any, reasoning: str) -> int:
    return len(text) - len(judged_text(text, reasoning)) if isinstance(text, str) else 0

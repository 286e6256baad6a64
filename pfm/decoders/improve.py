"""Improve a draft round by round: propose texts, judge them, take the best one if the guard lets it pass."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from pfm._internal.checks import check_whole
from pfm.decoders.select import Judged, Select, Selection
from pfm.generators.base import count, is_usable_text
from pfm.protocols import Flow, TransportingFlow
from pfm.reasoning import judged_text

__all__ = ["Draft", "Improver", "Proposal"]


@dataclass
class Draft:
    """How far the improvement of one prompt has come.

    Attributes:
        row: what the decoder was given.
        texts, vectors, probabilities: candidates and, after them, every text judged since.
        current: the text to improve on, a place in ``texts``.
        tags: the name of the generator that made each text beyond the candidates, "" where it is not known.
        calls, usage: of the generator, and tokens by kind.
        trace: one entry a round.
        stopped: why there is no further round, or None.
        error: type and message of what failed, or None.
    """

    row: Judged
    texts: list[str]
    vectors: list[torch.Tensor]
    probabilities: list[float]
    current: int
    tags: list[str] = field(default_factory=list)
    calls: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """The text to improve on."""
        return self.texts[self.current]

    def judged(self, text: str) -> str:
        """Return what of a text is judged and shown: its answer, where hidden reasoning is set aside."""
        return judged_text(text, self.row.reasoning)

    @property
    def vector(self) -> torch.Tensor:
        """Its vector (D,)."""
        return self.vectors[self.current]


@dataclass
class Proposal:
    """Texts proposed in place of a draft.

    Attributes:
        texts: the proposals, in order.
        tags: the name of the generator that made a text, where there are several.
        details: what else belongs into the trace, in JSON values.
        calls, usage: of the generator, and tokens by kind.
        stop: why no further round makes sense after this one, or None.
        error: type and message of what failed, or None.
        point: (D,) where the flow carries the draft, for a decoder that compares with it.
    """

    texts: list[str]
    details: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    stop: str | None = None
    error: str | None = None
    point: torch.Tensor | None = None


class Improver(ABC):
    """The base of decoders that make texts of their own.

    A subclass proposes texts; here they are encoded and judged by b and by alignment, all prompts of a round
    together. The best one by ``by`` takes the draft's place if b rises by the margin over the draft. Where no text
    does, the draft stays; where b of a flow is not confirmed (its guard margin is infinite) nothing is proposed.

    Args:
        rounds: how often to improve on the draft.
        by: how texts are compared, as in :class:`Select`; "sample" is no way to improve.
        margin: by how much b must rise; None takes ``flow.guard_margin``.
    """

    noun = "text"

    def __init__(self, *, rounds: int, by: str, margin: float | None) -> None:
        if by == "sample":
            raise ValueError(f"by='sample' belongs to decoder='select': {type(self).__name__} takes the best text")
        self.rounds = check_whole("rounds", rounds, 1)
        self.select = Select(by, margin)
        self.encoder: Any = None

    @property
    def by(self) -> str:
        """How texts are compared."""
        return self.select.by

    @property
    def margin(self) -> float | None:
        """By how much b must rise; None: by the flow's guard margin."""
        return self.select.margin

    @abstractmethod
    def propose(self, flow: Flow, drafts: Sequence[Draft], number: int) -> list[Proposal]:
        """Propose texts in place of each draft, in round ``number``, from 1."""

    def bind(self, generator: Any, flow: Flow, encoder: Any) -> Self:
        """Return a copy that works with these; see :class:`pfm.decoders.Decoder`."""
        bound = copy.copy(self)
        bound.encoder = encoder
        return bound

    def decode(
        self,
        flow: Flow,
        candidates: Sequence[str],
        vectors: torch.Tensor,
        context: torch.Tensor | None,
        probabilities: np.ndarray,
        key: str,
    ) -> Selection:
        """Improve the output of one prompt; see :meth:`pfm.decoders.Decoder.decode`."""
        (selection,) = self.decode_many(flow, [Judged(key, key, list(candidates), vectors, context, probabilities)])
        return selection

    def decode_many(self, flow: Flow, rows: Sequence[Judged]) -> list[Selection]:
        """Improve the outputs of several prompts, round by round together."""
        if self.encoder is None:
            raise ValueError(f"{self!r} is not bound: pass it to pfm.wrap(..., decoder=...), or call bind first")
        starts = [self._start(flow, row) for row in rows]
        drafts = [
            Draft(row, list(row.candidates), list(row.vectors), row.probabilities.tolist(), start.index)
            for row, start in zip(rows, starts, strict=True)
        ]
        margin = flow.guard_margin if self.margin is None else self.margin
        if margin == math.inf:
            for draft in drafts:
                draft.stopped = "the guard margin is infinite, no held-out gain was confirmed"
        for number in range(1, self.rounds + 1):
            active = [draft for draft in drafts if draft.stopped is None]
            if not active:
                break
            self._judge(flow, active, self.propose(flow, active, number), number)
        return [self._selection(draft, start, margin) for draft, start in zip(drafts, starts, strict=True)]

    def _start(self, flow: Flow, row: Judged) -> Selection:
        return self.select.decode(flow, row.candidates, row.vectors, row.context, row.probabilities, row.key)

    def _judge(self, flow: Flow, drafts: Sequence[Draft], proposals: Sequence[Proposal], number: int) -> None:
        """Encode and judge what is new among the proposals, and settle the round of each draft."""
        fresh = [self._fresh(draft, proposal) for draft, proposal in zip(drafts, proposals, strict=True)]
        texts = [draft.judged(text) for draft, found in zip(drafts, fresh, strict=True) for text in found]
        vectors = torch.zeros(0, len(drafts[0].vector))
        if texts:
            vectors = torch.as_tensor(self.encoder.encode(texts, progress=False)).detach().to("cpu", torch.float32)
        rows = [
            draft.row.context
            for draft, found in zip(drafts, fresh, strict=True)
            for _ in found
            if draft.row.context is not None
        ]
        contexts = torch.stack(rows) if rows else None
        probabilities = judged(flow, vectors, contexts)
        end = 0
        for draft, proposal, found in zip(drafts, proposals, fresh, strict=True):
            start, end = end, end + len(found)
            self._settle(flow, draft, proposal, found, vectors[start:end], probabilities[start:end], number)

    def _fresh(self, draft: Draft, proposal: Proposal) -> list[str]:
        """Return the usable proposals that this prompt has not seen yet."""
        seen = {draft.judged(text).strip() for text in draft.texts}
        fresh: list[str] = []
        for text in proposal.texts:
            answer = draft.judged(text).strip() if is_usable_text(text) else ""
            if answer and answer not in seen:
                seen.add(answer)
                fresh.append(text)
        return fresh

    def _settle(
        self,
        flow: Flow,
        draft: Draft,
        proposal: Proposal,
        texts: list[str],
        vectors: torch.Tensor,
        probabilities: np.ndarray,
        number: int,
    ) -> None:
        sound = np.flatnonzero(~np.isnan(probabilities)).tolist()
        texts, vectors, probabilities = [texts[row] for row in sound], vectors[sound], probabilities[sound]
        before, places = draft.current, range(len(draft.texts), len(draft.texts) + len(texts))
        draft.texts.extend(texts)
        draft.tags.extend(proposal.tags.get(text, "") for text in texts)
        draft.vectors.extend(vectors)
        draft.probabilities.extend(probabilities.tolist())
        draft.calls += proposal.calls
        draft.usage = added(draft.usage, proposal.usage)
        draft.error = draft.error or proposal.error
        draft.stopped = proposal.stop
        alignment, accepted = [], None
        if texts:
            stacked = torch.stack([draft.vectors[before], *vectors])
            judged_b = np.array([draft.probabilities[before], *probabilities])
            along = flow.alignment(stacked, draft.row.context).double().tolist()
            alignment = [value - along[0] for value in along[1:]]
            selection = self._choose(flow, draft, proposal, [draft.texts[before], *texts], stacked, judged_b)
            reason = selection.reason.replace("the original", "the draft")
            if selection.changed:
                accepted = places[selection.index - 1]
                draft.current = accepted
        else:
            reason = f"kept the draft: {proposal.error or proposal.stop or f'no new {self.noun} came'}"
        draft.trace.append(
            {
                "round": number,
                "draft": before,
                **proposal.details,
                "proposed": len(proposal.texts),
                f"{self.noun}s": texts,
                "candidates": list(places),
                "win_probability": probabilities.tolist(),
                "alignment": alignment,
                "accepted": accepted,
                "reason": reason,
                "calls": proposal.calls,
                "error": proposal.error,
            }
        )

    def _choose(
        self,
        flow: Any,
        draft: Draft,
        proposal: Proposal,
        texts: list[str],
        vectors: torch.Tensor,
        probabilities: np.ndarray,
    ) -> Selection:
        """Choose among the draft, which comes first, and what is new of its proposals."""
        return self.select.decode(flow, texts, vectors, draft.row.context, probabilities, draft.row.key)

    def _selection(self, draft: Draft, start: Selection, margin: float) -> Selection:
        given = len(draft.row.candidates)
        gain = draft.probabilities[draft.current] - draft.probabilities[0]
        tried = len(draft.texts) - given
        if draft.current >= given:
            changes = sum(entry["accepted"] is not None for entry in draft.trace)
            reason = f"changed: {count(changes, self.noun)} of {tried} accepted, win probability {gain:+.3f}"
        else:
            best = max(draft.probabilities[given:], default=math.nan) - draft.probabilities[draft.current]
            if tried:
                why = (
                    f"none of {count(tried, self.noun)} was accepted, win probability {best:+.3f} at best "
                    f"with a guard margin of {margin:.3f}"
                )
            else:
                why = draft.error or draft.stopped or f"no new {self.noun} came"
            reason = f"{start.reason}; {why}" if start.changed else f"kept the original: {why}"
        if tried and draft.stopped:
            reason += f"; {draft.stopped}"
        return Selection(
            draft.current,
            draft.text != draft.row.candidates[0],
            list(draft.probabilities),
            reason,
            added=tuple(draft.texts[given:]),
            added_probabilities=tuple(draft.probabilities[given:]),
            added_tags=tuple(draft.tags) if any(draft.tags) else (),
            calls=draft.calls,
            usage=draft.usage,
            trace=draft.trace or None,
            error=draft.error,
        )


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Add two counts, kind by kind."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def judged(flow: Flow, vectors: torch.Tensor, contexts: torch.Tensor | None) -> np.ndarray:
    """Return b(y|x) (B,) float64 of vectors (B, D), NaN where a vector is not finite."""
    found = np.full(len(vectors), np.nan)
    usable = vectors.isfinite().all(dim=1)
    if usable.any():
        b = flow.win_probability(vectors[usable], None if contexts is None else contexts[usable])
        found[usable.numpy()] = b.detach().cpu().double().numpy()
    return found


def targets(flow: Flow, drafts: Sequence[Draft], **options: Any) -> torch.Tensor:
    """Return where the flow carries the drafts' vectors, (B, D).

    Raises:
        TypeError: the flow has no ``transport``.
    """
    if not isinstance(flow, TransportingFlow):
        raise TypeError(f"this decoder needs a flow with .transport(y, context), got {type(flow).__name__}")
    vectors = torch.stack([draft.vector for draft in drafts])
    rows = [draft.row.context for draft in drafts]
    contexts = None if rows[0] is None else torch.stack([row for row in rows if row is not None])
    return flow.transport(vectors, contexts, **options).detach().cpu()

"""Rewrite: the frozen generator itself revises its draft towards the point that the flow carries it to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from pfm._internal.checks import check_whole
from pfm._internal.templates import Template, fence, fence_mark, prompt_hash
from pfm.decoders.exemplars import ExemplarBank
from pfm.decoders.improve import Draft, Improver, Proposal, targets
from pfm.generators import Draw, Prompt
from pfm.protocols import Flow

__all__ = ["Rewrite"]

NEAR = 8  # times as many exemplars as are shown are looked at
PLACES = ("prompt", "draft", "exemplars")


class Rewrite(Improver):
    """Has the generator revise its draft, shown the preferred outputs nearest to where the flow carries the draft.

    One round: the draft's vector is transported; of the preferred training outputs nearest to that point whose b in
    this context is no lower than the point's own, those with the highest b become examples; the generator gets
    request, draft and examples as fenced data within a template and writes ``rewrites`` revisions; each is judged by b
    and by alignment, and the best takes the draft's place if b rises by the margin. The first draft is what
    ``select`` would return. Nearness alone would show outputs like the draft itself: one pass is a small move among
    outputs that differ by content above all. Texts of models are data throughout: what they say decides neither
    template nor decoder, nor anything else but their own scores.

    Revisions equal to a text of this prompt, or to one of the examples shown, are dropped.

    Args:
        exemplars: the preferred training outputs.
        rounds: most rounds a prompt; where one changes nothing, the next shows the next nearest examples.
        rewrites: revisions a round.
        shots: examples in one prompt.
        template: ``"rewrite"``, or the path of a file with the places ``{prompt}``, ``{draft}``, ``{exemplars}`` and,
            if wanted, ``{mark}``, which is on the lines around the data.
        by: how revisions are compared: ``"win_probability"``, ``"alignment"`` or ``"combined"``.
        margin: change only if b rises by at least this much; None takes ``flow.guard_margin``.
        strength, win_gradient: of the transport, see :meth:`pfm.PreferenceFlow.transport`.
        max_calls: calls of the generator for one prompt's revisions. No round begins without calls left or asks for
            more texts than calls left; a generator that repeats calls by itself may go beyond by those.

    Raises:
        TypeError: ``exemplars`` is no :class:`ExemplarBank`.
        ValueError: a number is out of range, or the template lacks a place.
    """

    noun = "rewrite"

    def __init__(
        self,
        exemplars: ExemplarBank,
        *,
        rounds: int = 2,
        rewrites: int = 4,
        shots: int = 3,
        template: str | os.PathLike[str] = "rewrite",
        by: str = "win_probability",
        margin: float | None = None,
        strength: float = 1.0,
        win_gradient: float = 0.0,
        max_calls: int | None = None,
    ) -> None:
        super().__init__(rounds=rounds, by=by, margin=margin)
        if not isinstance(exemplars, ExemplarBank):
            raise TypeError(
                f"exemplars must be an ExemplarBank, got {type(exemplars).__name__}; make one with "
                "ExemplarBank.from_pairs(pairs, encoder)"
            )
        self.exemplars = exemplars
        self.rewrites = check_whole("rewrites", rewrites, 1)
        self.shots = check_whole("shots", shots, 1)
        self.template = Template.load(template, needed=PLACES, optional=("mark",))
        self.strength = strength
        self.win_gradient = win_gradient
        self.max_calls: int | None = check_whole("max_calls", max_calls, 1, also=(None,))
        self.generator: Any = None

    def __repr__(self) -> str:
        return (
            f"Rewrite({self.exemplars!r}, rounds={self.rounds}, rewrites={self.rewrites}, shots={self.shots}, "
            f"template={self.template.source!r}, by={self.by!r}, margin={self.margin}, max_calls={self.max_calls})"
        )

    def bind(self, generator: Any, flow: Flow, encoder: Any) -> Self:
        """Return a copy that draws from this generator.

        Raises:
            ValueError: there is no generator, or the bank's vectors have another dimension than the encoder's.

        Warns:
            UserWarning: the bank was made with another encoder of the same dimension, by its description.
        """
        if generator is None:
            raise ValueError("decoder='rewrite' needs a generator to write with: pass one to pfm.wrap")
        if self.exemplars.dimension != encoder.dimension:
            raise ValueError(
                f"exemplars have vectors of {self.exemplars.dimension} numbers, and the encoder's have "
                f"{encoder.dimension}: make the bank with the flow's encoder"
            )
        ours, theirs = self.exemplars.encoder or {}, encoder.describe()
        differing = [name for name in ("name", "revision") if name in ours and ours[name] != theirs.get(name)]
        if differing:
            warnings.warn(
                "the exemplars were encoded with another encoder than the one given: "
                + ", ".join(f"{name} {ours[name]!r} against {theirs.get(name)!r}" for name in differing),
                stacklevel=4,
            )
        bound = super().bind(generator, flow, encoder)
        bound.generator = generator
        return bound

    def propose(self, flow: Flow, drafts: Sequence[Draft], number: int) -> list[Proposal]:
        """Ask for revisions of all drafts at once; see :meth:`Improver.propose`."""
        points = targets(flow, drafts, strength=self.strength, win_gradient=self.win_gradient)
        proposals: list[Proposal] = []
        requested: dict[int, list[_Request]] = {}
        for draft, point in zip(drafts, points, strict=True):
            left = self.rewrites if self.max_calls is None else self.max_calls - draft.calls
            if left < 1:
                proposals.append(Proposal([], stop=f"the budget of {self.max_calls} calls is spent"))
                continue
            rows = self._examples(flow, draft, point)
            if not rows:
                proposals.append(Proposal([], stop="there are no further exemplars"))
                continue
            prompt, mark = self._prompt(draft, [self.exemplars.texts[row] for row in rows])
            details = {"prompt_hash": prompt_hash(prompt), "exemplars": rows, "template": self.template.source}
            proposals.append(Proposal([], details))
            # A conversation remains a conversation, for chat models.
            request = prompt if isinstance(draft.row.prompt, str) else [{"role": "user", "content": prompt}]
            copies = {self.exemplars.texts[row].strip() for row in rows}
            requested.setdefault(min(self.rewrites, left), []).append(
                _Request(draft, proposals[-1], request, mark, copies)
            )
        for n, requests in requested.items():
            draws = self.generator.draws([request.prompt for request in requests], n)
            for request, draw in zip(requests, draws, strict=True):
                request.take(draw)
        return proposals

    def _examples(self, flow: Flow, draft: Draft, point: Tensor) -> list[int]:
        """Choose the rows of exemplars to show: near the point, and good under the draft's context."""
        bank, context = self.exemplars, draft.row.context
        shown = {row for entry in draft.trace for row in entry.get("exemplars", ())}
        without = {draft.text, *(bank.texts[row] for row in shown)}
        b = flow.win_probability(bank.vectors, context).cpu()
        as_good = b >= flow.win_probability(point[None], context).cpu()
        near = bank.nearest(point, NEAR * self.shots, among=as_good, without=without)
        chosen = sorted(near, key=lambda row: -float(b[row]))[: self.shots]
        if len(chosen) < self.shots:  # the point is beyond almost all that was ever preferred
            best = b.argsort(descending=True, stable=True)[: self.shots + len(without) + len(chosen)].tolist()
            chosen += [row for row in best if bank.texts[row] not in without and row not in chosen]
        return chosen[: self.shots]

    def _prompt(self, draft: Draft, exemplars: list[str]) -> tuple[str, str]:
        """Return the text of a request for revisions, and the mark of its fences."""
        request, text = draft.row.key, draft.judged(draft.text)
        mark = fence_mark([request, text, *exemplars])
        shown = "\n\n".join(fence(f"example {n}", exemplar, mark) for n, exemplar in enumerate(exemplars, 1))
        filled = self.template.fill(
            prompt=fence("request", request, mark), draft=fence("draft", text, mark), exemplars=shown, mark=mark
        )
        return filled, mark


@dataclass
class _Request:
    """Holds a request to the generator for one draft, and the answers that are refused."""

    draft: Draft
    proposal: Proposal
    prompt: Prompt
    mark: str
    copies: set[str]

    def take(self, draw: Draw) -> None:
        """Take over what was drawn, without lines of fences and without copies of the examples shown."""
        drawn = [_without_fences(text, self.mark) for text in draw.texts]
        proposal = self.proposal
        proposal.texts = [text for text in drawn if self.draft.judged(text).strip() not in self.copies]
        proposal.tags = dict(zip(drawn, draw.tags, strict=False))
        proposal.details["copies"] = len(drawn) - len(proposal.texts)
        proposal.calls, proposal.usage, proposal.error = draw.calls, dict(draw.usage), draw.error
        if draw.error is not None:
            proposal.stop = f"the generator failed: {draw.error}"


def _without_fences(text: str, mark: str) -> str:
    return "\n".join(line for line in text.split("\n") if mark not in line).strip()

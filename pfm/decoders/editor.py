"""Editor: carry a draft's embedding along the flow, and rewrite the draft towards the point that it reaches."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from pfm._internal.checks import check_choice, check_number, check_seed, check_whole
from pfm.data.vector_spaces import space_differences
from pfm.decoders.editing.folder import load_writer
from pfm.decoders.editing.writer import Edits, Writer, sample_edits
from pfm.decoders.improve import Draft, Improver, Proposal, targets
from pfm.decoders.select import Selection
from pfm.devices import best_device
from pfm.generators.base import count

__all__ = ["Editor", "sentences"]

LONG_TEXTS = ("split", "refuse")
# After a full stop and white space, before what can begin a sentence.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?\w)|\n+")


class Editor(Improver):
    """Rewrites the draft towards the point to which the flow carries its embedding.

    A trained network (:mod:`pfm.decoders.editing`) models p(text | draft, e(draft), z*), with z* = T(e(draft)): it
    copies where the flow does not move the draft, and writes new text elsewhere. ``samples`` edits of each draft are
    written in one batch and encoded again; of those whose b is above the draft's by the guard's margin the one nearest
    to z* takes its place, and the next round starts there. The generator is not called.

    What it cost stands in the trace of each round: texts and tokens written, texts encoded, and the seconds of all
    drafts of the round together.

    A draft of more tokens than the network's window is split into sentences; each is carried and edited by itself, and
    edit number j of the draft joins edit number j of each sentence. The trace holds the number of sentences.

    Args:
        writer: the trained network.
        encoder: description of the encoder whose vectors it was trained on; None if it is not known.
        samples: edits of a draft in each round.
        strength, win_gradient: see :meth:`pfm.PreferenceFlow.transport`.
        rounds: how often to go on from the edit that was taken.
        margin: change only if b rises by at least this much; None takes ``flow.guard_margin``.
        guidance: how much to make of the move, see :func:`pfm.decoders.editing.sample_edits`; above 1 it costs twice
            as much.
        temperature: of sampling; the first edit always takes the likeliest tokens.
        long_texts: "split" or "refuse" drafts beyond the window; what is refused is kept unchanged, with a reason.
        seed: of sampling.
        batch_size: texts written at once.

    Raises:
        ValueError: a number is out of range.

    >>> editor = Editor.from_pretrained("decoder/")  # doctest: +SKIP
    >>> refiner = pfm.wrap(generator, flow, encoder=encoder, decoder=editor)  # doctest: +SKIP
    """

    noun = "edit"

    def __init__(
        self,
        writer: Writer,
        *,
        encoder: Mapping[str, Any] | None = None,
        samples: int = 8,
        strength: float = 1.0,
        win_gradient: float = 0.0,
        rounds: int = 1,
        margin: float | None = None,
        temperature: float = 0.7,
        guidance: float = 1.0,
        long_texts: str = "split",
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        seed = check_seed(seed)
        super().__init__(rounds=rounds, by="win_probability", margin=margin)
        check_choice("long_texts", long_texts, LONG_TEXTS)
        strength = check_number("strength", strength, least=0)
        guidance = check_number("guidance", guidance, least=0)
        win_gradient = check_number("win_gradient", win_gradient)
        temperature = check_number("temperature", temperature, above=0)
        self.writer = writer
        self.trained_on = None if encoder is None else dict(encoder)
        self.samples = check_whole("samples", samples, 1)
        self.batch_size = check_whole("batch_size", batch_size, 1)
        self.strength, self.win_gradient, self.temperature = float(strength), float(win_gradient), float(temperature)
        self.guidance, self.long_texts, self.seed = float(guidance), long_texts, seed

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, base: Any = None, device: Any = "auto", **options: Any
    ) -> Self:
        """Load an editor from a folder written by ``pfm train-decoder``; no code from there runs.

        Args:
            folder: the folder.
            base: base model in place of the known one, see :func:`pfm.decoders.editing.load_writer`.
            device: where to write.
            options: settings of the editor.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged, or the files do not belong together.
            ImportError: the base model's packages are not installed.
        """
        writer, described = load_writer(folder, base=base, device=best_device(device))
        return cls(writer, encoder=described.get("encoder"), **options)

    def __repr__(self) -> str:
        return (
            f"Editor({type(self.writer).__name__}, samples={self.samples}, strength={self.strength}, "
            f"win_gradient={self.win_gradient}, guidance={self.guidance}, rounds={self.rounds}, "
            f"margin={self.margin})"
        )

    def bind(self, generator: Any, flow: Any, encoder: Any) -> Self:
        """Return a copy that encodes with this encoder.

        Raises:
            ValueError: it is not the one whose vectors the network was trained on.
        """
        if encoder.dimension != self.writer.dimension:
            raise ValueError(
                f"the editor was trained on vectors of dimension {self.writer.dimension}, and the encoder "
                f"gives {encoder.dimension}: use the encoder {_name(self.trained_on)}, or train "
                "a decoder on its vectors"
            )
        if differences := space_differences(self.trained_on, encoder.describe()):
            raise ValueError(
                f"the editor was trained on vectors of another encoder: {differences}; use that encoder, or train "
                "a decoder on this one's vectors with pfm train-decoder"
            )
        return super().bind(generator, flow, encoder)

    def propose(self, flow: Any, drafts: Sequence[Draft], number: int) -> list[Proposal]:
        """Carry and edit all drafts at once; see :meth:`Improver.propose`."""
        began = time.perf_counter()
        move = {"strength": self.strength, "win_gradient": self.win_gradient}
        points = targets(flow, drafts, **move)
        plans = [_Plan.of(draft.judged(draft.text), self.writer, self.long_texts) for draft in drafts]
        proposals = [
            Proposal([], {"distance": round(float((point - draft.vector).norm()), 6)}, stop=plan.refused, point=point)
            for draft, point, plan in zip(drafts, points, plans, strict=True)
        ]
        owners = [place for place, plan in enumerate(plans) for _ in plan.edited]
        if owners:
            texts = [piece for plan in plans for piece in plan.edited]
            vectors, aims = self._pieces(flow, drafts, points, plans, texts, move)
            written, tokens = self.edit(
                texts, vectors, aims, keys=[f"{drafts[place].row.key}\n{number}" for place in owners]
            )
            start = 0
            for proposal, plan in zip(proposals, plans, strict=True):
                edits = written[start : start + len(plan.edited)]
                start += len(plan.edited)
                if plan.edited:
                    proposal.texts = [plan.joined([row[j] for row in edits]) for j in range(self.samples)]
                    proposal.details |= {"texts_written": len(edits) * self.samples, **plan.details}
            seconds = round(time.perf_counter() - began, 4)
            for proposal in proposals:
                proposal.details |= {"tokens_written_together": tokens, "seconds_together": seconds}
        return proposals

    def edit(
        self, texts: Sequence[str], vectors: torch.Tensor, points: torch.Tensor, *, keys: Sequence[str] | None = None
    ) -> tuple[list[list[str]], int]:
        """Write ``samples`` edits of each text from its vector towards its point.

        Args:
            texts: B texts of at most ``writer.window`` tokens.
            vectors, points: (B, D), in the space of the encoder.
            keys: what the random numbers of each text derive from; None for the texts themselves.

        Returns:
            The edits of each text, the one of the likeliest tokens first, and how many tokens were written.

        Raises:
            ValueError: shapes disagree, values are not finite, or a text is beyond the window.
        """
        wanted = (len(texts), self.writer.dimension)
        for name, value in (("vectors", vectors), ("points", points)):
            if tuple(value.shape) != wanted or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite and of shape {wanted}: got {tuple(value.shape)}")
        rows = self.writer.tokenize(texts)
        for place, row in enumerate(rows):
            if len(row) > self.writer.window:
                raise ValueError(
                    f"texts[{place}] has {len(row)} tokens, and the editor's window is {self.writer.window}: split it "
                    "into sentences"
                )
        uniforms = [self._uniforms(key) for key in (texts if keys is None else keys)]
        return sample_edits(
            self.writer,
            Edits(rows, vectors.float(), points.float()),
            self.samples,
            uniforms=uniforms,
            temperature=self.temperature,
            guidance=self.guidance,
            batch_size=self.batch_size,
        )

    def _uniforms(self, key: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}\n{key}".encode(errors="surrogatepass")).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).random((self.samples, self.writer.window))

    def _pieces(
        self,
        flow: Any,
        drafts: Sequence[Draft],
        points: torch.Tensor,
        plans: Sequence[_Plan],
        texts: list[str],
        move: dict[str, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors and points of all pieces; those of a whole draft are known."""
        known = [plan.edited == [plan.text] for plan in plans for _ in plan.edited]
        owners = [place for place, plan in enumerate(plans) for _ in plan.edited]
        vectors = torch.stack([drafts[place].vector for place in owners])
        aims = points[owners].clone()
        split = [place for place, whole_text in enumerate(known) if not whole_text]
        if split:
            found = torch.as_tensor(self.encoder.encode([texts[place] for place in split], progress=False))
            vectors[split] = found.detach().to("cpu", torch.float32)
            contexts = [drafts[owners[place]].row.context for place in split]
            context = None if contexts[0] is None else torch.stack([row for row in contexts if row is not None])
            aims[split] = flow.transport(vectors[split], context, **move).detach().cpu()
        return vectors, aims

    def _choose(
        self,
        flow: Any,
        draft: Draft,
        proposal: Proposal,
        texts: list[str],
        vectors: torch.Tensor,
        probabilities: np.ndarray,
    ) -> Selection:
        """Choose the text nearest to the point, of those that the guard on b allows; the first text is the draft."""
        assert proposal.point is not None  # propose has set it
        margin = flow.guard_margin if self.margin is None else self.margin
        distance = (vectors - proposal.point).norm(dim=1).double().numpy()
        allowed = probabilities >= probabilities[0] + margin
        allowed[0] = True
        near = np.where(allowed, distance, np.inf)
        best = int(near.argmin())
        proposal.details["nearest"] = round(float(distance[best]), 6)
        passed = int(allowed.sum()) - 1
        if best == 0:
            why = "is the nearest to the point" if passed else "no edit passes the guard"
            return Selection(0, False, (-distance).tolist(), f"kept the draft: {'it ' if passed else ''}{why}")
        reason = (
            f"changed: nearest to the point of {count(passed, 'edit')} that the guard allows, win probability "
            f"{probabilities[best] - probabilities[0]:+.3f}"
        )
        return Selection(best, True, (-distance).tolist(), reason)


@dataclass(frozen=True)
class _Plan:
    """Says which pieces of a text are edited, and how the whole is put together again.

    Attributes:
        text: the whole. pieces: its sentences and what stands between them.
        places: of the pieces that are edited.
        details: for the trace. refused: why nothing is edited, or None.
    """

    text: str
    pieces: list[str]
    places: list[int]
    details: dict[str, Any]
    refused: str | None = None

    @classmethod
    def of(cls, text: str, writer: Writer, long_texts: str) -> _Plan:
        (row,) = writer.tokenize([text])
        if len(row) <= writer.window:
            return cls(text, [text], [0], {})
        size = f"the draft has {len(row)} tokens, and the editor's window is {writer.window}"
        if long_texts == "refuse":
            return cls(text, [text], [], {}, f"{size}: long_texts='split' edits sentence by sentence")
        pieces = sentences(text)
        lengths = [len(row) for row in writer.tokenize(pieces)]
        places = [place for place, length in enumerate(lengths) if place % 2 == 0 and 0 < length <= writer.window]
        details = {"split": f"{size}: split into {count((len(pieces) + 1) // 2, 'sentence')}"}
        left = sum(length > writer.window for length in lengths[::2])
        if left:
            details["split"] += f", of which {left} beyond the window stayed as they were"
        refused = None if places else f"{size}, and so has each of its sentences"
        return cls(text, pieces, places, details, refused)

    @property
    def edited(self) -> list[str]:
        return [self.pieces[place] for place in self.places]

    def joined(self, edits: Sequence[str]) -> str:
        pieces = list(self.pieces)
        for place, edit in zip(self.places, edits, strict=True):
            pieces[place] = edit or pieces[place]
        return "".join(pieces)


def sentences(text: str) -> list[str]:
    """Split a text into sentences with what stands between them; joined they are the text.

    >>> sentences("It rains. Stay in!")
    ['It rains.', ' ', 'Stay in!']
    """
    pieces, start = [], 0
    for found in _SENTENCE_END.finditer(text):
        space = len(found[0]) - len(found[0].lstrip("\"'”’)]"))
        cut = found.start() + space
        if text[start:cut].strip():
            pieces += [text[start:cut], text[cut : found.end()]]
            start = found.end()
    return [*pieces, text[start:]]


def _name(description: Mapping[str, Any] | None) -> str:
    return "of its training" if not description else str(description.get("name"))

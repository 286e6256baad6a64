"""Structural types of the parts of a refined generator.

A class of one's own fits by having the methods; none has to be a base class. ``docs/extending.md`` shows one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pfm.decoders.select import Selection
    from pfm.generators.base import Draw, Prompt

__all__ = ["CandidateFlow", "Decoder", "Encoder", "Flow", "Generator", "Judge", "TransportingFlow"]


class Flow(Protocol):
    """Judges outputs, and says how sure it is: what :func:`pfm.wrap` with ``decoder="select"`` needs.

    :class:`pfm.PreferenceFlow`, :class:`pfm.Composition` and :class:`pfm.references.PooledFlow` are also
    :class:`TransportingFlow` and :class:`CandidateFlow`.
    """

    @property
    def metadata(self) -> dict[str, Any]:
        """The flow's ``dimension``, ``context_dimension``, and the description of its ``encoder``."""
        ...

    @property
    def guard_margin(self) -> float:
        """The smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
        ...

    def win_probability(self, y: Any, context: Any = None) -> Tensor:
        """Return b(y|x) (B,) in [0, 1]: the chance that y (B, \\*D) beats an independent draw of the reference."""
        ...

    def alignment(self, y: Any, context: Any = None) -> Tensor:
        """Return how far each of one prompt's candidates (B, \\*D) lies along their mean displacement, (B,)."""
        ...


@runtime_checkable
class TransportingFlow(Protocol):
    """Moves outputs: what decoders need that make outputs of their own."""

    def transport(self, y: Any, context: Any = None) -> Tensor:
        """Carry outputs (B, \\*D) under contexts (B, C) or None along the flow, (B, \\*D)."""
        ...


@runtime_checkable
class CandidateFlow(Protocol):
    """Judges the candidates of a prompt by each other where it can; a flow that does not gives win probabilities."""

    def candidate_probabilities(
        self, y: Any, context: Any, prompt: Tensor, tags: Sequence[str] | None = None
    ) -> Tensor:
        """Return b(y|x) (B,) of the candidates of several prompts, which may be each other's opponents.

        Args:
            y: (B, \\*D) candidates. context: (B, C) or None.
            prompt: (B,) number of each one's prompt.
            tags: the name of each one's generator, where several drew them.
        """
        ...


@runtime_checkable
class Encoder(Protocol):
    """Turns outputs into vectors.

    All but :meth:`encode` are optional (:func:`pfm.encoders.as_encoder` adds them). An encoder of other outputs than
    texts - images, arrays - also has ``accepts(output)``, which returns whether it encodes one.
    """

    @property
    def dimension(self) -> int:
        """The length D of the vectors that :meth:`encode` returns."""
        ...

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N responses as (N, D) float32, in the order given."""
        ...

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N prompts as (N, C) float32; unless overridden, in the same way as responses."""
        return self.encode(texts, progress=progress)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values, so that a saved flow can detect another one."""
        ...


class Generator(Protocol):
    """Draws candidate outputs for prompts from a frozen policy."""

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield one :class:`pfm.generators.Draw` of up to ``n`` texts for each prompt, in order.

        A failure that concerns one prompt is recorded in its draw. KeyboardInterrupt passes through.
        """
        ...


class Decoder(Protocol):
    """Chooses the output of one prompt; other prompts of a batch have no influence.

    Two methods are optional. ``bind(generator, flow, encoder)`` is called once by the Refiner and returns the decoder
    to use, for one that draws or encodes by itself. ``decode_many(flow, rows)`` takes a list of
    :class:`pfm.decoders.Judged` and returns a :class:`pfm.decoders.Selection` for each, for one that saves time when
    prompts are worked on together.
    """

    def decode(
        self,
        flow: Flow,
        candidates: Sequence[str],
        vectors: Tensor,
        context: Tensor | None,
        probabilities: np.ndarray,
        key: str,
    ) -> Selection:
        """Choose among the candidates of one prompt.

        Args:
            flow: the preference flow.
            candidates: n ≥ 1 texts; the first is the original.
            vectors: (n, D) their embeddings, finite.
            context: (C,) embedding of the prompt, or None when the flow takes no context.
            probabilities: (n,) float64, b(y|x) of each, in [0, 1].
            key: text of the prompt, from which anything random must be derived.
        """
        ...


class Judge(Protocol):
    """Scores responses: what :func:`pfm.evaluate` needs; a :class:`pfm.judges.Judge`, or a function."""

    def __call__(self, prompt: Any, responses: list[str], /) -> Sequence[float]:
        """Return one number a response (n,), higher is better."""
        ...

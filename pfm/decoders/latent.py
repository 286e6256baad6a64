"""Latent: transport in the latent space of a text autoencoder, and decode what arrives."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Self

import torch

from pfm.decoders.improve import Draft, Improver, Proposal, targets
from pfm.encoders.base import check_texts
from pfm.protocols import Flow

__all__ = ["Latent", "TextAutoencoder", "weights_identity"]


class TextAutoencoder:
    """Makes an encoder, as flows and refiners ask for one, of anything that encodes texts and decodes vectors.

    Args:
        model: has ``encode(texts) -> (B, D)`` and ``decode(vectors) -> B texts``, for lists of texts and for
            tensors (B, D).
        name: what a saved flow calls it; None takes the model's ``name``, else its type.

    Raises:
        TypeError: one of the two methods is missing.
    """

    def __init__(self, model: Any, *, name: str | None = None) -> None:
        missing = [method for method in ("encode", "decode") if not callable(getattr(model, method, None))]
        if missing or isinstance(model, type):
            raise TypeError(
                f"model must be an object with .encode(texts) and .decode(vectors), got {type(model).__name__}"
                + (f" without .{' and .'.join(missing)}" if missing else f": pass {model.__name__}(...)")
            )
        self.model = model
        self.name = name or str(getattr(model, "name", None) or type(model).__name__)
        self._dimension: int | None = None

    def __repr__(self) -> str:
        return f"TextAutoencoder({self.name!r})"

    @property
    def dimension(self) -> int:
        """The length D of the vectors; found by encoding one word."""
        if self._dimension is None:
            self._dimension = self.encode(["dimension"]).shape[1]
        return self._dimension

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N texts as (N, D) float32.

        Raises:
            TypeError, ValueError: a text is no string, or empty.
            ValueError: the model gives another shape.
        """
        checked = check_texts(texts, "error")
        if not checked:
            return torch.zeros(0, self.dimension)
        with torch.no_grad():
            vectors = torch.as_tensor(self.model.encode(checked)).detach().to("cpu", torch.float32)
        if vectors.ndim != 2 or len(vectors) != len(checked):
            raise ValueError(
                f"encode must return ({len(checked)}, D), one row a text: got {tuple(vectors.shape)} from {self.name}"
            )
        self._dimension = vectors.shape[1]
        return vectors

    def decode(self, vectors: torch.Tensor) -> list[str]:
        """Decode vectors (N, D) to N texts.

        Raises:
            ValueError: the model gives another number of texts, or something else.
        """
        if not len(vectors):
            return []
        with torch.no_grad():
            texts = list(self.model.decode(vectors))
        if len(texts) != len(vectors) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"decode must return {len(vectors)} texts, one a vector: got {len(texts)} from {self.name}"
            )
        return texts

    def describe(self) -> dict[str, Any]:
        """Describe the autoencoder in JSON values; what it says of itself is taken over."""
        described = dict(self.model.describe()) if callable(getattr(self.model, "describe", None)) else {}
        return {
            "type": type(self).__name__,
            "name": self.name,
            "revision": weights_identity(self.model),
            "dimension": self.dimension,
            **described,
        }


class Latent(Improver):
    """Carries the draft along the flow in an autoencoder's latent space and decodes the point that it reaches.

    The flow must have been fitted on the autoencoder's own vectors. Every combination of ``strength`` and
    ``win_gradient`` gives one text a round; it is encoded again, since only that says what the decoder has made of the
    move, and takes the draft's place if b of it rises by the margin. One pass of a flow is a small move, which a
    decoder that is robust to noise absorbs: strengths above 1 and the gradient of log b are what moves texts, at the
    price of content and fluency, so choose them on held-out prompts.

    Args:
        autoencoder: has ``encode(texts)`` and ``decode(vectors)``; None takes the Refiner's encoder.
        strength: one or several, see :meth:`pfm.PreferenceFlow.transport`.
        win_gradient: one or several, likewise.
        rounds: how often to go on from the text that was taken.
        by: how texts are compared: ``"win_probability"``, ``"alignment"`` or ``"combined"``.
        margin: change only if b rises by at least this much; None takes ``flow.guard_margin``.
        least_similarity: drop texts whose vectors' cosine with the original's is lower; -1 drops none.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        autoencoder: Any = None,
        *,
        strength: float | Sequence[float] = (1.0, 2.0, 4.0),
        win_gradient: float | Sequence[float] = 0.0,
        rounds: int = 1,
        by: str = "win_probability",
        margin: float | None = None,
        least_similarity: float = -1.0,
    ) -> None:
        super().__init__(rounds=rounds, by=by, margin=margin)
        self.autoencoder = None if autoencoder is None else as_autoencoder(autoencoder)
        self.strengths = _numbers("strength", strength, 0.0)
        self.win_gradients = _numbers("win_gradient", win_gradient, -math.inf)
        if not -1 <= least_similarity <= 1:
            raise ValueError(f"least_similarity must lie in [-1, 1], got {least_similarity}")
        self.least_similarity = least_similarity

    def __repr__(self) -> str:
        return (
            f"Latent({self.autoencoder!r}, strength={self.strengths}, win_gradient={self.win_gradients}, "
            f"rounds={self.rounds}, by={self.by!r}, margin={self.margin})"
        )

    def bind(self, generator: Any, flow: Flow, encoder: Any) -> Self:
        """Return a copy that encodes and decodes with these.

        Raises:
            TypeError: no autoencoder was given, and the encoder cannot decode.
            ValueError: the autoencoder has another dimension than the encoder of the flow.
        """
        bound = super().bind(generator, flow, encoder)
        if bound.autoencoder is None:
            if not callable(getattr(encoder, "decode", None)):
                raise TypeError(
                    f"decoder='latent' needs an encoder that can decode, got {type(encoder).__name__} without .decode; "
                    "pass encoder=TextAutoencoder(model), or decoder=Latent(autoencoder)"
                )
            bound.autoencoder = as_autoencoder(encoder)
        if bound.autoencoder.dimension != encoder.dimension:
            raise ValueError(
                f"the autoencoder has dimension {bound.autoencoder.dimension}, and the flow's encoder has "
                f"{encoder.dimension}: fit the flow on the autoencoder's vectors"
            )
        return bound

    def propose(self, flow: Flow, drafts: Sequence[Draft], number: int) -> list[Proposal]:
        """Transport and decode all drafts at once; see :meth:`Improver.propose`."""
        assert self.autoencoder is not None  # bind has set it
        settings = [(strength, slope) for strength in self.strengths for slope in self.win_gradients]
        points = [targets(flow, drafts, strength=strength, win_gradient=slope) for strength, slope in settings]
        texts = self.autoencoder.decode(torch.cat(points))
        columns = [texts[at : at + len(drafts)] for at in range(0, len(texts), len(drafts))]
        proposals = []
        for row, draft in enumerate(drafts):
            moves = [
                {
                    "strength": strength,
                    "win_gradient": slope,
                    "distance": round(float((point[row] - draft.vector).norm()), 6),
                    "text": column[row],
                }
                for (strength, slope), point, column in zip(settings, points, columns, strict=True)
            ]
            proposals.append(Proposal(self._close(draft, [column[row] for column in columns]), {"moves": moves}))
        return proposals

    def _close(self, draft: Draft, texts: list[str]) -> list[str]:
        """Drop texts whose vectors point elsewhere than the original's."""
        usable = [text for text in texts if text.strip()]
        if self.least_similarity == -1 or not usable:
            return usable
        vectors = torch.as_tensor(self.encoder.encode(usable, progress=False)).detach().to("cpu", torch.float32)
        close = torch.cosine_similarity(vectors, draft.vectors[0].expand_as(vectors)) >= self.least_similarity
        return [text for text, kept in zip(usable, close.tolist(), strict=True) if kept]


def as_autoencoder(model: Any) -> Any:
    """Return an object whose ``decode`` is checked: an object with a dimension is returned unchanged."""
    own = all(hasattr(type(model), name) for name in ("encode", "decode", "dimension", "describe"))
    return model if own else TextAutoencoder(model)


def weights_identity(model: Any) -> str | None:
    """Return a checksum of a torch module's weights; None for anything else."""
    if not isinstance(model, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _numbers(name: str, value: float | Sequence[float], low: float) -> tuple[float, ...]:
    values = tuple(float(number) for number in (value if isinstance(value, Sequence) else (value,)))
    if not values or not all(math.isfinite(number) and number >= low for number in values):
        at_least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} must be a finite number{at_least}, or several: got {value!r}")
    return values

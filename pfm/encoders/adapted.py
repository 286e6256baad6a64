"""Encoders of a user's own: any object with ``encode``, given the members that are optional."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor

__all__ = ["AdaptedEncoder"]


class AdaptedEncoder:
    """Gives an object with ``encode(outputs)`` the other members of :class:`pfm.encoders.Encoder`.

    Args:
        encoder: has ``encode(outputs)``, which returns one vector an output, and may have ``encode_prompts``,
            ``dimension``, ``describe``, and ``accepts(output)``, which tells the outputs that it encodes: without it,
            texts that are not empty. The keyword ``progress`` is passed on to methods that have it.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.dimension = getattr(encoder, "dimension", None)
        if hasattr(encoder, "accepts"):
            self.accepts = encoder.accepts

    @classmethod
    def of(cls, encoder: Any) -> Any:
        """Adapt what lacks a member; return a whole encoder, and what is none, as it is."""
        if not callable(getattr(encoder, "encode", None)) or isinstance(encoder, type):
            return encoder
        # Looked up, not asked for: a model may have to be loaded to know its dimension.
        members = (inspect.getattr_static(encoder, name, None) is not None for name in ("dimension", "describe"))
        whole = all(members) and _takes_progress(encoder.encode)
        return encoder if whole else cls(encoder)

    def __repr__(self) -> str:
        return f"AdaptedEncoder({self.encoder!r})"

    def encode(self, texts: Sequence[Any], *, progress: bool = False) -> Any:
        """Encode N outputs as (N, \\*D), in the order given."""
        return self._call(self.encoder.encode, texts, progress)

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> Any:
        """Encode N prompts as (N, C)."""
        return self._call(getattr(self.encoder, "encode_prompts", self.encoder.encode), texts, progress)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values; an empty dict where it does not say."""
        return self.encoder.describe() if hasattr(self.encoder, "describe") else {}

    def _call(self, encode: Callable[..., Any], texts: Sequence[Any], progress: bool) -> Tensor:
        """Encode, and return what comes as a tensor; a list may hold one array or tensor an output.

        Raises:
            TypeError: it holds no dense numbers. ValueError: its vectors are of different lengths.
        """
        vectors: Any = encode(texts, progress=progress) if _takes_progress(encode) else encode(texts)
        try:
            if isinstance(vectors, list | tuple):
                rows = cast(Sequence[Any], vectors)
                if rows and not isinstance(rows[0], Real):
                    vectors = torch.stack([as_float_tensor("vectors", row) for row in rows])
            return as_float_tensor("vectors", vectors)
        except TypeError as error:
            raise TypeError(f"{type(self.encoder).__name__}.encode must return one vector an output: {error}") from None
        except RuntimeError as error:
            name = type(self.encoder).__name__
            raise ValueError(f"{name}.encode must return vectors of one length: {error}") from None


def _takes_progress(encode: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(encode).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature to read
        return False
    return any(p.name == "progress" or p.kind == p.VAR_KEYWORD for p in parameters)

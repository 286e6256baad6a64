"""An encoder whose texts several processes share out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pfm.encoders.base import Encoder, progress_bar
from pfm.encoders.sentence import as_encoder

if TYPE_CHECKING:
    from pfm.flow.distributed import Processes

__all__ = ["SplitEncoder"]

PIECE = 1024  # texts of one process between two exchanges: what a process waits for another at most


class SplitEncoder(Encoder):
    """Encodes in each of several processes a share of the texts, and gives all of them all vectors.

    Every process must encode the same texts in the same order. It describes itself as the encoder that it was made
    from.

    Args:
        encoder: the encoder of this process; equal in all.
        processes: those of :func:`pfm.processes`.

    >>> import pfm
    >>> with pfm.processes() as group:
    ...     SplitEncoder(pfm.encoders.SurfaceEncoder(), group).encode(["Yes.", "No?"]).shape
    torch.Size([2, 28])
    """

    def __init__(self, encoder: Any, processes: Processes) -> None:
        self.encoder, self.processes = as_encoder(encoder), processes

    @property
    def dimension(self) -> int:
        """The length D of the vectors."""
        return self.encoder.dimension

    def encode(self, texts: Sequence[Any], *, progress: bool = False) -> Tensor:
        """Encode N outputs as (N, \\*D) float32, in the order given.

        Raises:
            ProcessLostError: another process has ended.
        """
        return self._encode(self.encoder.encode, texts, progress)

    def encode_prompts(self, texts: Sequence[Any], *, progress: bool = False) -> Tensor:
        """Encode N prompts as (N, C) float32; raises as :meth:`encode` does."""
        return self._encode(getattr(self.encoder, "encode_prompts", self.encoder.encode), texts, progress)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder that it was made from."""
        return self.encoder.describe()

    def __repr__(self) -> str:
        return f"SplitEncoder({self.encoder!r}, {self.processes})"

    def _encode(self, encode: Callable[..., Any], texts: Sequence[Any], progress: bool) -> Tensor:
        if not self.processes.several or not len(texts):
            return encode(texts, progress=progress)
        texts, found = list(texts), []
        piece = PIECE * self.processes.count
        with progress_bar(len(texts), progress and self.processes.first) as bar:
            for start in range(0, len(texts), piece):
                some = texts[start : start + piece]
                found.append(self._shared(encode, some))
                bar.update(len(some))
        return torch.cat(found)

    def _shared(self, encode: Callable[..., Any], texts: list[Any]) -> Tensor:
        own = self.processes.share(len(texts))
        mine = torch.as_tensor(encode(texts[own]), dtype=torch.float32) if texts[own] else None
        parts = self.processes.from_all(mine)
        return torch.cat([part for part in parts if part is not None])

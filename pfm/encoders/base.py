"""What an encoder is, and the road that all cached encoders share."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pfm.encoders.cache import EmbeddingCache, text_keys
from pfm.errors import EncodingError
from pfm.protocols import Encoder

__all__ = ["CachedEncoder", "Encoder", "Kind", "check_texts", "progress_bar"]

Kind = Literal["document", "query"]

# What stands for an empty text where one is allowed: endpoints refuse "", and some models make it NaN.
EMPTY_TEXT = "(empty)"


def check_texts(texts: Sequence[str], on_empty: Literal["error", "encode"]) -> list[str]:
    """Return the texts as a list, or say which of them cannot be encoded.

    Raises:
        TypeError: `texts` is a single string, or one of them is no string.
        ValueError: one is empty or white space and `on_empty` is "error", or is not valid Unicode.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string; pass [text]")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}")
        if on_empty == "error" and (not text or text.isspace()):
            raise ValueError(
                f"texts[{index}] is empty or white space; drop it, or make the encoder with on_empty='encode'"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts[{index}] holds half a surrogate pair at character {error.start}, which is no text;"
                " clean it with text.encode('utf-8', 'replace').decode()"
            ) from None
    return texts


class CachedEncoder(Encoder):
    """The base of encoders that are worth caching: looks up each distinct text, encodes only the missing.

    A subclass names itself by :meth:`fingerprint` and encodes blocks of texts in :meth:`blocks`.

    Args:
        cache: True for the default :class:`EmbeddingCache`, a folder or an :class:`EmbeddingCache` for
            another, False for none.
        on_empty: "error" refuses empty and white-space texts; "encode" encodes the text "(empty)" in their
            place, so that they have a vector like any other.
    """

    def __init__(
        self,
        *,
        cache: bool | str | os.PathLike[str] | EmbeddingCache = True,
        on_empty: Literal["error", "encode"] = "error",
    ) -> None:
        if on_empty not in ("error", "encode"):
            raise ValueError(f"on_empty must be 'error' or 'encode', got {on_empty!r}")
        self.cache = _as_cache(cache)
        self.on_empty: Literal["error", "encode"] = on_empty
        self._dimension: int | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that differs from that of every encoder whose vectors may differ."""

    @abstractmethod
    def blocks(self, texts: list[str], kind: Kind) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Encode non-empty, distinct texts, handing over each block as soon as it is finished.

        Yields:
            The positions (n,) of the block's texts in `texts`, and their vectors (n, D).
        """

    @property
    def dimension(self) -> int:
        """The length D of the vectors: from what is known or cached, else by encoding one word."""
        if self._dimension is None and self.cache is not None:
            self._dimension = self.cache.dimension(self.fingerprint())
        if self._dimension is None:
            _, vectors = next(iter(self.blocks(["dimension"], "document")))
            self._dimension = vectors.shape[1]
        return self._dimension

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode responses.

        Args:
            texts: N strings; repeated ones are encoded once.
            progress: show a bar over the texts that are not in the cache.

        Returns:
            (N, D) float32 on the CPU, in the order given.

        Raises:
            TypeError, ValueError: a text that is no string, or empty, by its index.
            EncodingError: the model or endpoint failed, or returned NaN; finished blocks are in the cache.
        """
        return self._encode(texts, "document", progress)

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode prompts, as queries where the model tells queries from documents; otherwise like `encode`."""
        return self._encode(texts, "query", progress)

    def _encode(self, texts: Sequence[str], kind: Kind, progress: bool) -> Tensor:
        texts = [EMPTY_TEXT if not text or text.isspace() else text for text in check_texts(texts, self.on_empty)]
        if not texts:
            return torch.zeros(0, self.dimension)
        places: dict[str, int] = {}
        rows = [places.setdefault(text, len(places)) for text in texts]
        distinct = list(places)

        vectors, found, keys, space = None, np.zeros(len(distinct), bool), None, ""
        if self.cache is not None:
            space = self.fingerprint()
            keys = text_keys(space, kind, distinct)
            vectors, found = self.cache.get(space, keys)
        # The longest first: texts of like length share a block, and a want of memory shows at once.
        missing = np.array(sorted(np.flatnonzero(~found), key=lambda row: -len(distinct[row])), np.int64)
        if len(missing):
            with progress_bar(len(missing), progress) as bar:
                for positions, block in self.blocks([distinct[row] for row in missing], kind):
                    here = missing[positions]
                    values = block.detach().to("cpu", torch.float32).numpy()
                    unusable = np.flatnonzero(~np.isfinite(values).all(1))
                    if len(unusable):
                        index = rows.index(int(here[unusable[0]]))
                        raise EncodingError(f"{self!r} returned NaN or infinity for texts[{index}]")
                    if vectors is None:
                        vectors = np.empty((len(distinct), values.shape[1]), np.float32)
                    if values.shape[1] != vectors.shape[1]:
                        raise EncodingError(
                            f"{self!r} returned vectors of {values.shape[1]} numbers, earlier ones have"
                            f" {vectors.shape[1]}: another model under the same name? Clear the cache or pass"
                            " another"
                        )
                    vectors[here] = values
                    found[here] = True
                    if self.cache is not None and keys is not None:
                        self.cache.put(space, keys[here], values)
                    bar.update(len(here))
        if vectors is None or not found.all():
            raise EncodingError(f"{self!r} returned no vector for texts[{rows.index(int(np.argmin(found)))}]")
        self._dimension = vectors.shape[1]
        return torch.from_numpy(vectors if len(distinct) == len(texts) else vectors[rows])


def _as_cache(cache: bool | str | os.PathLike[str] | EmbeddingCache) -> EmbeddingCache | None:
    if isinstance(cache, EmbeddingCache):
        return cache
    if isinstance(cache, bool):
        return EmbeddingCache() if cache else None
    if isinstance(cache, str | os.PathLike):
        return EmbeddingCache(Path(cache))
    raise TypeError(f"cache must be True, False, a folder or an EmbeddingCache, got {type(cache).__name__}")


def progress_bar(total: int, progress: bool) -> tqdm:
    """Make a bar over texts, or one that is not shown."""
    if progress:
        return tqdm(total=total, desc="encoding", unit="text")  # no `disable`: it would override TQDM_DISABLE
    return tqdm(total=total, disable=True)

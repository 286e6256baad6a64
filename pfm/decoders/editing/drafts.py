"""Training data of writers from sentences alone: copies, neighbours and corrupted drafts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_length
from pfm.decoders.editing.writer import Edits, TokenRow

__all__ = ["EditData", "corrupted", "nearest_neighbours"]

COPY, NEIGHBOUR, CORRUPTED = 0, 1, 2
KINDS = ("copy", "neighbour", "corrupted")
_SEARCH_ROWS = 2048  # of the similarity matrix at once
_POOL = 131_072  # texts among which neighbours are looked for


@dataclass(frozen=True)
class EditData:
    """Holds N target sentences and the drafts from which each is to be written.

    The embedding of the target is the target point of the writer. A draft is the target itself (copy),
    a sentence nearby in the embedding space (neighbour), or the target with words dropped, moved or replaced
    (corrupted); no preferences are needed.

    Attributes:
        texts: the N sentences, and after them the corrupted drafts.
        tokens: of each text.
        vectors: (M, D) float16, of each text.
        neighbours: (N, K) places in ``texts``, -1 where there is none.
        corrupted: (N,) places of the corrupted drafts, -1 where there is none.
        dropped: sentences left out: empty, repeated, or longer than the writer's window.
    """

    texts: list[str]
    tokens: list[TokenRow]
    vectors: Tensor
    neighbours: np.ndarray
    corrupted: np.ndarray
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.neighbours)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        encode: Callable[[list[str]], Tensor],
        tokenize: Callable[[Sequence[str]], list[TokenRow]],
        *,
        window: int,
        vectors: Tensor | None = None,
        similarity: tuple[float, float] = (0.5, 0.95),
        neighbours: int = 8,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> EditData:
        """Encode sentences, find their neighbours, and corrupt them.

        Args:
            texts: sentences.
            encode: gives (B, D) vectors of texts.
            tokenize: gives the token ids of texts.
            window: most tokens of a text.
            vectors: (N, D) of the texts, where they are known; else they are encoded.
            similarity: least and greatest cosine of a neighbour.
            neighbours: at most so many a sentence.
            seed: of the corruption. device: for the search of neighbours.

        Raises:
            ValueError: fewer than two usable sentences, or vectors of another number.
        """
        if vectors is not None:
            check_length("vectors", vectors, len(texts), "text")
        stripped = [text.strip() for text in texts]
        first: dict[str, int] = {}
        for place, text in enumerate(stripped):
            if text:
                first.setdefault(text, place)
        kept = list(first)
        rows = tokenize(kept)
        usable = [place for place, row in enumerate(rows) if 0 < len(row) < window]
        kept, rows = [kept[place] for place in usable], [rows[place] for place in usable]
        if len(kept) < 2:
            raise ValueError(
                f"texts must hold at least two different sentences of fewer than {window} tokens: got {len(kept)} "
                f"of {len(texts)} texts; split longer texts into sentences"
            )
        found = encode(kept) if vectors is None else vectors[[first[text] for text in kept]]
        found = torch.nn.functional.normalize(found.float(), dim=1).half()
        near = nearest_neighbours(found, neighbours, similarity, device).numpy()
        words = [text.split() for text in kept]
        broken: list[str] = []
        for text, own, others in zip(kept, words, _present(near), strict=True):
            rng = random.Random(f"{seed}\n{text}")  # of the text alone, so that other texts change little of the cache
            broken.append(corrupted(own, words[rng.choice(others)], words[rng.randrange(len(words))], rng))
        broken_rows = tokenize(broken)
        places = np.full(len(kept), -1)
        sound = [
            place for place, row in enumerate(broken_rows) if 0 < len(row) < window and broken[place] != kept[place]
        ]
        places[sound] = np.arange(len(kept), len(kept) + len(sound))
        more = [broken[place] for place in sound]
        if more:
            extra = torch.nn.functional.normalize(encode(more).float(), dim=1).half()
            found = torch.cat([found, extra])
        return cls(
            kept + more,
            rows + [broken_rows[place] for place in sound],
            found,
            near,
            places,
            len(texts) - len(kept),
        )

    def fingerprint(self) -> str:
        """Return a checksum of the texts."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def draft(self, target: int, kind: int, rng: np.random.Generator) -> int:
        """Return the place of a draft of this kind, of another one where there is none."""
        if kind == NEIGHBOUR:
            near = self.neighbours[target]
            count = int((near >= 0).sum())
            if count:
                return int(near[rng.integers(count)])
            kind = CORRUPTED
        if kind == CORRUPTED and (place := int(self.corrupted[target])) >= 0:
            return place
        return target

    def edits(
        self, targets: Sequence[int], drafts: Sequence[int], noise: Tensor, generator: torch.Generator
    ) -> tuple[Edits, list[TokenRow]]:
        """Return the edits from drafts to targets, and the targets' tokens.

        Args:
            targets, drafts: B places each.
            noise: (B, 1): the point is the direction of e(target) + noise · ε / sqrt(D), with ε standard
                normal, so that points near a sentence are written as that sentence.
            generator: of ε, on the CPU.
        """
        points = self.vectors[torch.as_tensor(targets)].float()
        eps = torch.randn(points.shape, generator=generator).to(points.device)
        points = torch.nn.functional.normalize(points + noise.to(points.device) * eps / points.shape[1] ** 0.5, dim=1)
        edits = Edits([self.tokens[place] for place in drafts], self.vectors[torch.as_tensor(drafts)].float(), points)
        return edits, [self.tokens[place] for place in targets]


def nearest_neighbours(
    vectors: Tensor, count: int, similarity: tuple[float, float], device: torch.device | str = "cpu"
) -> Tensor:
    """Find for each row (N, D) of unit vectors its most similar others within a range of cosines.

    Above 131,072 rows the others are that many rows, evenly spread, so that the search stays linear in N.

    Returns:
        (N, count) places, most similar first; -1 where there are no more.
    """
    low, high = similarity
    where = torch.device(device)
    kind = torch.float32 if where.type == "cpu" else torch.bfloat16
    table = vectors.to(where, kind)
    pool = torch.arange(len(vectors), device=where)
    if len(pool) > _POOL:
        pool = (torch.arange(_POOL, device=where).double() * (len(vectors) / _POOL)).long()
    others = table[pool].T.contiguous()
    found = torch.full((len(vectors), count), -1, dtype=torch.long)
    width = min(count, len(pool))
    for start in range(0, len(vectors), _SEARCH_ROWS):
        cosine = table[start : start + _SEARCH_ROWS] @ others
        cosine = cosine.masked_fill_((cosine < low) | (cosine > high), -2.0)
        value, place = cosine.topk(width, dim=1)
        found[start : start + len(value), :width] = torch.where(value >= low, pool[place], -1).cpu()
    return found


def _present(near: np.ndarray) -> list[list[int]]:
    """Return the neighbours of each row; the row itself where there is none."""
    return [[other for other in row if other >= 0] or [place] for place, row in enumerate(near.tolist())]


def corrupted(words: Sequence[str], near: Sequence[str], far: Sequence[str], rng: random.Random) -> str:
    """Return a text with one to a quarter of its words dropped, moved, added, or replaced.

    Args:
        words: of the text. near: words of a similar text, far: of any; what is put in comes from either.
        rng: decides.
    """
    found = list(words)
    for _ in range(rng.randint(1, max(1, len(words) // 4))):
        place = rng.randrange(len(found))
        word = rng.choice(near if rng.random() < 0.7 else far)
        action = rng.random()
        if action < 0.5:
            found[place] = word
        elif action < 0.65:
            found.insert(place, word)
        elif action < 0.85 and len(found) > 2:
            del found[place : place + rng.randint(1, 3)]
            found = found or [word]
        else:
            other = min(place + 1, len(found) - 1)
            found[place], found[other] = found[other], found[place]
    return " ".join(found)


def as_encode(encoder: Any, *, progress: bool) -> Callable[[list[str]], Tensor]:
    """Return the ``encode`` that :meth:`EditData.from_texts` takes of an encoder; similar lengths go together."""

    def encode(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        vectors = torch.as_tensor(encoder.encode([texts[place] for place in order], progress=progress)).detach()
        back = torch.empty(len(order), dtype=torch.long)
        back[order] = torch.arange(len(order))
        return vectors[back.to(vectors.device)]

    return encode

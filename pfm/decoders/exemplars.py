"""Preferred outputs with their vectors, to be looked up by a point that the flow carries to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.archive import read_folder, save_folder
from pfm._internal.checks import check_finite, check_shape, check_whole
from pfm._internal.files import replace_file, require_files
from pfm.encoders.sentence import as_encoder
from pfm.reasoning import training_text

if TYPE_CHECKING:
    from pfm.data.pairs import PreferencePairs

__all__ = ["ExemplarBank"]

TEXTS = "exemplars.jsonl"
VECTORS = "exemplars.safetensors"


class ExemplarBank:
    """Holds texts that were preferred, one vector each, and finds those nearest to a point.

    Distances are Euclidean after each coordinate is divided by its spread over the bank, so that no encoder among
    several that are put side by side drowns the others.

    Args:
        texts: N ≥ 1 texts; of equal texts the first is kept.
        vectors: (N, D) their embeddings, finite.
        encoder: what the encoder says of itself, in JSON values; None if it is not known.

    Raises:
        TypeError: a text is no string.
        ValueError: there is no text, or shapes disagree, or a value is not finite.
    """

    def __init__(self, texts: Sequence[str], vectors: Any, encoder: Mapping[str, Any] | None = None) -> None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts must be a sequence of strings")
        table = torch.as_tensor(vectors).detach().to("cpu", torch.float32)
        check_shape("vectors", table, (len(texts), "D"), "one row a text")
        if not len(texts):
            raise ValueError("texts is empty: an exemplar bank needs at least one preferred output")
        check_finite("vectors", table)
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        rows = sorted(first.values())
        self.texts: list[str] = [texts[row] for row in rows]
        self.vectors: Tensor = table[rows]
        self.encoder = None if encoder is None else dict(encoder)
        spread = self.vectors.std(0) if len(rows) > 1 else torch.ones(table.shape[1])
        self._scale = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.inf)
        self._scaled = self.vectors / self._scale

    @classmethod
    def from_pairs(
        cls,
        pairs: PreferencePairs,
        encoder: Any,
        *,
        limit: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> ExemplarBank:
        """Take the chosen outputs of preference pairs: those on which the flow was fitted.

        Args:
            pairs: the training pairs. Where they carry probabilities, only those above ½ count as chosen.
            encoder: the flow's encoder.
            limit: draw at most so many distinct outputs; None takes all.
            seed: of that draw.
            progress: show a progress bar while encoding.
        """
        sure = pairs.probability or [1.0] * len(pairs)
        shown = (training_text(text) for text, p in zip(pairs.chosen, sure, strict=True) if p > 0.5)
        texts = list(dict.fromkeys(shown))  # what a model is to imitate is the answer, without hidden reasoning
        check_whole("limit", limit, 1, also=(None,))
        if limit is not None and limit < len(texts):
            drawn = np.random.default_rng(seed).choice(len(texts), size=limit, replace=False)
            texts = [texts[row] for row in sorted(drawn.tolist())]
        encoder = as_encoder(encoder)
        described = encoder.describe() or None
        return cls(texts, encoder.encode(texts, progress=progress) if texts else torch.zeros(0, 1), described)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"ExemplarBank({len(self)} texts, dimension {self.dimension})"

    @property
    def dimension(self) -> int:
        """The length D of the vectors."""
        return self.vectors.shape[1]

    def nearest(
        self, point: Tensor, count: int, *, among: Tensor | None = None, without: Collection[str] = ()
    ) -> list[int]:
        """Find the rows of the ``count`` texts nearest to a point (D,), the nearest first.

        Args:
            point: in the encoder's coordinates.
            count: how many; fewer if there are no more.
            among: (N,) bool, which texts may be taken; None for all.
            without: texts that are passed over.
        """
        if tuple(point.shape) != (self.dimension,):
            raise ValueError(f"point must be ({self.dimension},): got {tuple(point.shape)}")
        distances = (self._scaled - point.cpu().float() / self._scale).square().sum(1)
        if among is not None:
            distances = torch.where(among.cpu(), distances, torch.inf)
        found = distances.topk(min(len(self), count + len(without)), largest=False)
        rows = [
            row
            for row, distance in zip(found.indices.tolist(), found.values.tolist(), strict=True)
            if distance < torch.inf
        ]
        return [row for row in rows if self.texts[row] not in without][:count]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the bank to a folder: texts as JSON lines, vectors as safetensors."""
        from safetensors.torch import save_file

        lines = "".join(json.dumps({"text": text}, ensure_ascii=True) + "\n" for text in self.texts)
        described = {"format": "pt", "encoder": json.dumps(self.encoder), "texts": _checksum(lines.encode())}
        table = {"vectors": self.vectors.contiguous()}
        with save_folder(Path(folder).expanduser()) as target:
            replace_file(target / VECTORS, lambda path: save_file(table, path, metadata=described))
            replace_file(target / TEXTS, lambda path: path.write_text(lines, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ExemplarBank:
        """Read a bank written by :meth:`save`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the two do not belong together.
        """
        source = Path(folder).expanduser()
        return read_folder(source, (TEXTS, VECTORS), lambda: cls._load(source))

    @classmethod
    def _load(cls, source: Path) -> ExemplarBank:
        from safetensors import SafetensorError, safe_open

        require_files(source, (TEXTS, VECTORS), "ExemplarBank.save")
        try:
            lines = (source / TEXTS).read_bytes()
            texts = [json.loads(line)["text"] for line in lines.splitlines()]
            with safe_open(source / VECTORS, framework="pt") as file:
                vectors = file.get_tensor("vectors")
                described = file.metadata() or {}
                encoder = json.loads(described.get("encoder", "null"))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{source} is damaged or holds no exemplar bank: {error}; make it again") from error
        if described.get("texts") != _checksum(lines):
            raise ValueError(f"{source}: {TEXTS} and {VECTORS} do not belong together; make the bank again")
        return cls(texts, vectors, encoder)


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""A static encoder: one vector a token, distilled once from MiniLM; a text is the mean and maximum of its tokens'."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_choice
from pfm._internal.files import cache_folder, replace_json
from pfm.devices import standard_defaults
from pfm.encoders.base import EMPTY_TEXT, Encoder, check_texts, progress_bar
from pfm.encoders.source import ModelSource, find_source, verify_bundled
from pfm.errors import EncodingError

__all__ = ["POOLINGS", "StaticEncoder"]

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "mean+max")
SIF = 1e-4  # smooth inverse frequency (Arora et al. 2017), of frequencies that the vocabulary's order gives
RECIPE = f"model2vec, one forward pass a token, no PCA, SIF {SIF:g}, float16"
DESCRIPTION, TABLE, TOKENIZER = "table.json", "model.safetensors", "tokenizer.json"
BLOCK_CHARACTERS = 2_000_000  # of texts tokenised at a time
BLOCK_TEXTS = 1024
BLOCK_TOKENS = 4096  # whose rows are gathered at a time
PIECES_KEPT = 65_536  # about 10 MB
PIECE_CHARACTERS = 32
WAIT_SECONDS = 900.0  # for another process that makes the table
REACH = 0.99  # quantile of a column over the vocabulary that a text's maximum is measured in


# Only these: others, such as the no-break space or a control character, are the tokenizer's to judge.
_SPACES = " \t\n\r"


class StaticEncoder(Encoder):
    """Encodes texts by a table of one vector a token, hundreds of times faster than the model that it is made from.

    The table is distilled from all-MiniLM-L6-v2 by model2vec when the first text is met (half a minute on one core),
    and kept in the folder of caches. Whole texts are read; the order of their words is not. Vectors are computed
    anew each time: that is cheaper than to look them up.

    Args:
        pooling: "mean+max" puts the mean of the tokens' vectors, scaled to length 1, beside their maximum in each
            column; "mean" gives the mean alone.
        folder: where the table is kept; None: ``static`` in the user's folder of caches.
        on_empty: "error" refuses empty texts, "encode" encodes "(empty)" in their place.

    Raises:
        ValueError: pooling or on_empty is not one of those named.
        ImportError: when the table is made: model2vec or MiniLM is not installed.

    >>> StaticEncoder(pooling="mean")
    StaticEncoder(pooling='mean')
    """

    def __init__(
        self,
        *,
        pooling: Literal["mean", "mean+max"] = "mean+max",
        folder: str | os.PathLike[str] | None = None,
        on_empty: Literal["error", "encode"] = "error",
    ) -> None:
        check_choice("pooling", pooling, POOLINGS)
        check_choice("on_empty", on_empty, ("error", "encode"))
        self.pooling: Literal["mean", "mean+max"] = pooling
        self.folder = None if folder is None else Path(folder).expanduser()
        self.on_empty: Literal["error", "encode"] = on_empty
        self._known: _Table | None = None

    @property
    def dimension(self) -> int:
        """The length D of the vectors: the columns of the table, or twice as many."""
        return self._table().width(self.pooling)

    @standard_defaults
    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N texts as (N, D) float32 on the CPU, in the order given.

        A token that the vocabulary lacks is left out; a text of such tokens alone has the vector of the unknown token.

        Raises:
            TypeError, ValueError: a text that is no string, or empty, by its index.
        """
        checked = check_texts(texts, self.on_empty)
        whole = [EMPTY_TEXT if not text or text.isspace() else text for text in checked]
        table = self._table()
        vectors = torch.empty(len(whole), table.width(self.pooling))
        # A bar that is not shown costs as much as a text.
        with progress_bar(len(whole), True) if progress else contextlib.nullcontext() as bar:
            for start, stop in _blocks(whole):
                vectors[start:stop] = table.encode(whole[start:stop], self.pooling)
                if bar is not None:
                    bar.update(stop - start)
        return vectors

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values; makes the table if there is none."""
        table = self._table()
        return {
            "type": type(self).__name__,
            "name": "static" if self.pooling == "mean+max" else f"static-{self.pooling}",
            "revision": table.about["source"],
            "recipe": table.about["recipe"],
            "made_by": table.about["made_by"],
            "dimension": table.width(self.pooling),
            "pooling": self.pooling,
        }

    def __repr__(self) -> str:
        return f"StaticEncoder(pooling={self.pooling!r})"

    def _table(self) -> _Table:
        if self._known is None:
            self._known = _loaded(self.folder or cache_folder("static"))
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # another process loads its own


@dataclass(frozen=True)
class _Table:
    """Holds the rows (V, C) of the vocabulary, the scale of maxima, and the tokenizer."""

    rows: Tensor
    reach: float
    tokenizer: Any
    unknown: int
    about: dict[str, Any]
    known: dict[str, tuple[int, ...]] | None  # tokens of pieces between spaces; None: texts are tokenised as wholes

    @classmethod
    def of(cls, rows: Tensor, tokenizer: Any, about: dict[str, Any]) -> _Table:
        if rows.ndim != 2 or len(rows) != tokenizer.get_vocab_size() or not bool(rows.isfinite().all()):
            raise ValueError(f"a table of shape {tuple(rows.shape)} for {tokenizer.get_vocab_size()} tokens")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        unknown = tokenizer.token_to_id(about["unknown"])
        if unknown is None:
            raise ValueError(f"the vocabulary lacks {about['unknown']!r}")
        rows = rows.float().contiguous()
        reach = float(rows.quantile(REACH, dim=0).norm())
        return cls(rows, reach, tokenizer, unknown, about, {} if _splits_at_spaces(tokenizer) else None)

    def width(self, pooling: str) -> int:
        return self.rows.shape[1] * (2 if pooling == "mean+max" else 1)

    def encode(self, texts: list[str], pooling: str) -> Tensor:
        found = self._tokens(texts)
        sizes = [len(each) for each in found]
        numbers = torch.from_numpy(np.fromiter(itertools.chain.from_iterable(found), np.int64, sum(sizes)))
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        with torch.inference_mode():
            mean = torch.nn.functional.embedding_bag(numbers, self.rows, starts, mode="mean")
            parts = [torch.nn.functional.normalize(mean, dim=1)]
            if pooling == "mean+max":
                parts.append(torch.stack([self._maxima(each) for each in numbers.split(sizes)]) / self.reach)
        return torch.cat(parts, dim=1)

    def _maxima(self, numbers: Tensor) -> Tensor:
        """Return the maximum of each column over some tokens, several times faster than embedding_bag does."""
        parts = [self.rows.index_select(0, some).amax(0) for some in numbers.split(BLOCK_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, at least one."""
        if self.known is None:
            every = [each.ids for each in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            split = [_pieces(text) for text in texts]
            of_piece = self._of_pieces(set().union(*split)).__getitem__
            every = [list(itertools.chain.from_iterable(map(of_piece, pieces))) for pieces in split]
        unknown = self.unknown
        if any(unknown in each for each in every):
            every = [[number for number in each if number != unknown] for each in every]
        return [each or [unknown] for each in every]

    def _of_pieces(self, pieces: set[str]) -> dict[str, tuple[int, ...]]:
        """Return the tokens of some pieces; the short ones are remembered, as most come again."""
        assert self.known is not None
        found = {piece: tokens for piece in pieces if (tokens := self.known.get(piece)) is not None}
        missing = [piece for piece in pieces if piece not in found]
        if missing:
            encoded = self.tokenizer.encode_batch_fast(missing, add_special_tokens=False)
            fresh = {piece: tuple(each.ids) for piece, each in zip(missing, encoded, strict=True)}
            found |= fresh
            if len(self.known) > PIECES_KEPT:
                self.known.clear()
            self.known.update({piece: tokens for piece, tokens in fresh.items() if len(piece) <= PIECE_CHARACTERS})
        return found


def _pieces(text: str) -> list[str]:
    for space in _SPACES[1:]:
        text = text.replace(space, _SPACES[0])
    return text.split(_SPACES[0])


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Tell whether the tokens of a text are those of its pieces between spaces, as with BERT's tokenizer."""
    told = json.loads(tokenizer.to_str())
    kinds = [(told.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or not set(_SPACES).isdisjoint(token["content"])
        for token in told["added_tokens"]
    )


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Cut texts into blocks of bounded size: a text of a megabyte has one of its own."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and (size + len(text) > BLOCK_CHARACTERS or index - start == BLOCK_TEXTS):
            yield start, index
            start = index
            size = 0
        size += len(text)
    if len(texts) > start:
        yield start, len(texts)


# -- the table on disk -------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_tables: dict[tuple[Path, str], _Table] = {}


def _loaded(folder: Path) -> _Table:
    """Return the table of this machine's MiniLM, loaded once a process, made where there is none."""
    with _lock:
        source = find_source("minilm", None)
        key = (folder, source.identity)
        if key not in _tables:
            _tables[key] = _read_or_make(folder / _folder_name(source.identity), source)
        return _tables[key]


def _folder_name(identity: str) -> str:
    return f"static-{hashlib.sha256(f'{identity}{RECIPE}'.encode()).hexdigest()[:16]}"


def _read_or_make(folder: Path, source: ModelSource) -> _Table:
    from filelock import FileLock, Timeout

    if (table := _read(folder)) is not None:
        return table
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=WAIT_SECONDS):
            if (table := _read(folder)) is not None:  # another process has made it meanwhile
                return table
            made = _make(source)
            _write(folder, *made)
    except Timeout:
        raise EncodingError(
            f"another process has been making the table in {folder} for {WAIT_SECONDS:.0f} seconds: wait until it is "
            "done, or set PFM_CACHE to another folder"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be written (%s): the static table is made anew by each process", folder, error)
        made = _make(source)
    return _Table.of(*made)


def _read(folder: Path) -> _Table | None:
    """Read a table, or None where there is none, or it is damaged."""
    from safetensors.torch import load
    from tokenizers import Tokenizer

    if not (folder / DESCRIPTION).is_file():
        return None
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        table, tokenizer = ((folder / name).read_bytes() for name in (TABLE, TOKENIZER))
        for name, data in ((TABLE, table), (TOKENIZER, tokenizer)):
            if hashlib.sha256(data).hexdigest() != about["sha256"][name]:
                raise ValueError(f"{name} differs from what was written")
        return _Table.of(load(table)["embeddings"], Tokenizer.from_str(tokenizer.decode()), about)
    except Exception as error:  # of the disk, of JSON, of two libraries: whatever it is, the table is made again
        logger.warning("the static table in %s is damaged (%s) and is made again", folder, error)
        return None


def _make(source: ModelSource) -> tuple[Tensor, Any, dict[str, Any]]:
    """Distil the table: one forward pass of MiniLM a token, without PCA, whose axes differ between machines."""
    try:
        from model2vec.distill import distill_from_model
        from model2vec.version import __version__
    except ImportError as error:
        raise ImportError(
            f'the static encoder needs model2vec to make its table: pip install "preference-flow[static]" ({error})'
        ) from error
    from transformers import AutoModel, AutoTokenizer

    if source.bundled:
        verify_bundled(Path(source.location))
    logger.info("distilling the static encoder's table from MiniLM, once; half a minute on one core")
    model = AutoModel.from_pretrained(source.location, revision=source.commit)
    tokenizer = AutoTokenizer.from_pretrained(source.location, revision=source.commit, use_fast=True)
    made = distill_from_model(
        model.float(), tokenizer, device="cpu", pca_dims=None, sif_coefficient=SIF, quantize_to="float16"
    )
    about = {
        "source": source.identity,
        "recipe": RECIPE,
        "made_by": f"model2vec {__version__}",
        "unknown": tokenizer.unk_token,
    }
    return torch.from_numpy(made.embedding), made.tokenizer, about


def _write(folder: Path, rows: Tensor, tokenizer: Any, about: dict[str, Any]) -> None:
    """Write the table so that the folder is either whole or not there."""
    from safetensors.torch import save

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        contents = {TABLE: save({"embeddings": rows}), TOKENIZER: tokenizer.to_str().encode()}
        for name, data in contents.items():
            (partial / name).write_bytes(data)
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        replace_json(partial / DESCRIPTION, about | {"sha256": sums})
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

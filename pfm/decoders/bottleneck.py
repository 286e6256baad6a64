"""The bottleneck-T5 family of text autoencoders, as encoder and decoder of a latent flow."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_finite, check_shape, check_whole
from pfm._internal.hub import check_folder, loading_problem, location
from pfm.decoders.latent import weights_identity
from pfm.devices import best_device
from pfm.encoders.base import CachedEncoder, Kind
from pfm.encoders.cache import EmbeddingCache
from pfm.encoders.source import ModelSource, find_source
from pfm.errors import EncodingError

__all__ = ["BottleneckT5"]

# The text whose vector the model moves from when it decodes: a shift is added to what it encodes, nothing else.
_ANCHOR = "."
_BLOCK = 64


class BottleneckT5(CachedEncoder):
    """Encodes texts to unit vectors and decodes vectors to texts with a bottleneck-T5 model.

    The models (``thesephist/contra-bottleneck-t5-{small,base,large,xl}-wikipedia``; Linus Lee's model cards) are T5
    encoder-decoders whose encoder is pooled by attention to one vector of length 1, to which the decoder's
    cross-attention is gated. Their own class does that, so loading one runs the code of its repository:
    ``trust_remote_code=True`` says that this is wanted, and ``revision`` pins which code. That code was published for
    transformers 4.33; where it does not run, load the model in any way that works and pass ``model`` and ``tokenizer``.

    What is used of a model: ``model(input_ids, attention_mask, decoder_input_ids, encode_only=True)`` gives latents
    (B, D), ``model.perturb_vector`` is added to the latent it encodes, and ``model.generate`` decodes.

    Args:
        model: a name on the hub, a folder, or a loaded model.
        tokenizer: the tokenizer of a loaded model.
        trust_remote_code: run the model's own code.
        revision: commit, branch or tag on the hub.
        device: of a model to be loaded, or "auto" for the best there is; a loaded model stays where it is.
        batch_size: texts encoded at once; only texts of equally many tokens share a batch, so that padding is never
            needed.
        max_length: most tokens of a text that is read or written.
        generation: further options of ``model.generate``; by default the likeliest token is taken each time, so that
            a vector always gives the same text.
        cache, on_empty: as for every :class:`pfm.encoders.CachedEncoder`.

    Raises:
        TypeError: a loaded model without a tokenizer, or a tokenizer beside a name.
        ValueError: there is no such model, it is none of the family, or its code was not allowed to run.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        device: str | int | torch.device = "auto",
        batch_size: int = 16,
        max_length: int = 512,
        generation: dict[str, Any] | None = None,
        cache: bool | str | os.PathLike[str] | EmbeddingCache = False,
        on_empty: Any = "error",
    ) -> None:
        super().__init__(cache=cache, on_empty=on_empty)
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            check_whole(name, value, 1)
        self.batch_size = batch_size
        self.max_length = max_length
        self.generation = {"do_sample": False, "num_beams": 1, "use_cache": False} | (generation or {})
        self.revision = revision
        self.device = device
        best_device(device)
        self.trust_remote_code = trust_remote_code
        self._by_name = isinstance(model, str | os.PathLike)
        self._model: Any = None
        self._tokenizer: Any = None
        self._reset()
        if self._by_name:
            if tokenizer is not None:
                raise TypeError("tokenizer goes with a loaded model; one that is loaded by name brings its own")
            self.name = os.fspath(model)
            check_folder(self.name, "checkpoint")
            if not trust_remote_code:
                raise ValueError(
                    f"{self.name} runs code of its own: look at it, then pass trust_remote_code=True, with revision= "
                    "for a commit you have looked at"
                )
        else:
            if tokenizer is None:
                raise TypeError("a loaded model needs its tokenizer: BottleneckT5(model, tokenizer)")
            self.name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
            self._take(model, tokenizer)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._source: ModelSource | None = None

    def __repr__(self) -> str:
        return f"BottleneckT5({self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        # What was loaded by name is loaded again where it arrives.
        dropped = {"_lock", "_source", *(("_model", "_tokenizer") if self._by_name else ())}
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_model": None, "_tokenizer": None} | state)
        self._reset()

    def fingerprint(self) -> str:
        """Return what determines the vectors: the weights by checksum or commit, and how much is read."""
        return json.dumps({"bottleneck_t5": self._identity(), "max_length": self.max_length}, sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values."""
        return {
            "type": type(self).__name__,
            "name": self.name,
            "revision": self._identity(),
            "dimension": self.dimension,
            "max_length": self.max_length,
        }

    @property
    def dimension(self) -> int:
        """The length D of the vectors."""
        if self._dimension is None:
            self._dimension = int(self._loaded()[0].config.d_model)
        return self._dimension

    def blocks(self, texts: list[str], kind: Kind) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Encode texts in batches of equally many tokens, see :meth:`CachedEncoder.blocks`."""
        for start in range(0, len(texts), _BLOCK):
            block = texts[start : start + _BLOCK]
            with self._lock:
                vectors = self._encode_block(block)
            yield np.arange(start, start + len(block)), vectors

    @torch.no_grad()
    def decode(self, vectors: Tensor) -> list[str]:
        """Decode vectors (N, D), of any length, to N texts.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        table = torch.as_tensor(vectors).detach().float()
        check_shape("vectors", table, ("N", self.dimension))
        check_finite("vectors", table)
        with self._lock:
            model, tokenizer = self._loaded()
            table = torch.nn.functional.normalize(table, dim=1).to(model.device)
            ids = tokenizer(_ANCHOR, return_tensors="pt").input_ids.to(model.device)
            anchor = self._latents(ids)[0]
            texts = []
            with _restored(model):
                for row in table:
                    # One by one: how a batch of shifts is added differs between versions of the model's code.
                    model.perturb_vector = (row - anchor).to(model.dtype)
                    limit = {} if "max_new_tokens" in self.generation else {"max_length": self.max_length}
                    written = model.generate(input_ids=ids, **limit, **self.generation)
                    texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
        return texts

    # -- the model ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode_block(self, texts: list[str]) -> Tensor:
        model, tokenizer = self._loaded()
        rows = [tokenizer(text, truncation=True, max_length=self.max_length).input_ids for text in texts]
        by_length: dict[int, list[int]] = {}
        for row, ids in enumerate(rows):
            by_length.setdefault(len(ids), []).append(row)
        vectors = torch.empty(len(texts), self.dimension)
        try:
            with _restored(model):
                model.perturb_vector = None
                for members in by_length.values():
                    for start in range(0, len(members), self.batch_size):
                        some = members[start : start + self.batch_size]
                        ids = torch.tensor([rows[row] for row in some], device=model.device)
                        vectors[some] = self._latents(ids).float().cpu()
        except RuntimeError as error:
            raise EncodingError(f"{self!r} failed on {model.device}: {error} (batch_size={self.batch_size})") from error
        return vectors

    def _latents(self, ids: Tensor) -> Tensor:
        """Return latents (B, D) of token ids (B, T)."""
        model, tokenizer = self._loaded()
        start = tokenizer("", return_tensors="pt").input_ids.to(model.device).expand(len(ids), -1)
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=start, encode_only=True)
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(ids), self.dimension):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{self.name} must give latents ({len(ids)}, {self.dimension}) when called with encode_only=True: "
                f"got {shape}; is it a bottleneck-T5 model?"
            )
        return found

    def _identity(self) -> str | None:
        with self._lock:
            if not self._by_name:
                return weights_identity(self._model)
            if self._source is None:
                self._source = find_source(self.name, self.revision)
            return self._source.identity

    def _loaded(self) -> tuple[Any, Any]:
        with self._lock:
            if self._model is None:
                self._load()
            return self._model, self._tokenizer

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = location(self.name)
        options: dict[str, Any] = {} if Path(place).is_dir() else {"revision": self.revision}
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, **options)
        except Exception as error:
            raise ValueError(
                f"cannot load {self.name} as a bottleneck-T5 model "
                f"({loading_problem(self.name, error, trusted=True)}): its code may need another version of "
                "transformers: make it run, and pass the loaded model and its tokenizer"
            ) from error
        self._take(model.to(best_device(self.device)), tokenizer)

    def _take(self, model: Any, tokenizer: Any) -> None:
        wanted = ("perturb_vector", "generate", "config")
        missing = [name for name in wanted if not hasattr(model, name)]
        if missing:
            raise ValueError(
                f"{self.name} is no bottleneck-T5 model: {type(model).__name__} has no {', '.join(missing)}"
            )
        self._model, self._tokenizer = model.eval(), tokenizer


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Leave the model's shift as it was found."""
    before = model.perturb_vector
    try:
        yield
    finally:
        model.perturb_vector = before

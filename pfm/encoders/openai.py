"""Encoders behind an OpenAI-compatible embeddings endpoint."""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from pfm._internal.endpoint import Endpoint, check_extra_query, public_address, redacted
from pfm.encoders.base import CachedEncoder, Kind
from pfm.encoders.cache import EmbeddingCache
from pfm.errors import EncodingError

__all__ = ["OpenAIEncoder"]

# Endpoints bound the tokens of one request (300,000 at OpenAI); a token is at least one byte.
_BYTES_PER_REQUEST = 300_000


class OpenAIEncoder(CachedEncoder):
    """Encodes texts with an embeddings endpoint, through the openai client.

    Retries and timeouts are the client's own. The key is kept in memory only: it is no part of `describe`,
    `repr`, pickles, the cache or an error message.

    Args:
        model: the model's name at the endpoint.
        client: an `openai.OpenAI` of your own; excludes `base_url`, `api_key`, `timeout`, `max_retries`.
        base_url: the endpoint. None: ``OPENAI_BASE_URL``, else OpenAI itself.
        api_key: None: ``OPENAI_API_KEY``, which is sent to OpenAI and to ``OPENAI_BASE_URL`` only; another
            `base_url` gets a placeholder. A pickled encoder has forgotten a key that was passed to it, and
            looks in the environment.
        extra_query: what the endpoint wants in the query of each request, such as ``{"api-version": "2024-10-21"}``;
            no key.
        dimensions: ask for vectors of this length, where the model can shorten them.
        batch_size: texts in one request; fewer where texts are long.
        max_concurrency: requests under way at once.
        timeout: seconds for one request; None: the client's default.
        max_retries: None: the client's default.
        normalize: scale vectors to length 1.
        cache: True for the default :class:`EmbeddingCache`, a folder or an :class:`EmbeddingCache` for
            another, False for none.
        on_empty: "error" refuses empty texts, "encode" encodes "(empty)" in their place.

    Raises:
        ValueError, TypeError: an argument is out of range, or the client is none.
        EncodingError: a request failed after the client's retries, or the answer does not fit the request;
            the batches that were finished are in the cache.
    """

    def __init__(
        self,
        model: str,
        *,
        client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        extra_query: Mapping[str, str] | None = None,
        dimensions: int | None = None,
        batch_size: int = 128,
        max_concurrency: int = 8,
        timeout: float | None = None,
        max_retries: int | None = None,
        normalize: bool = True,
        cache: bool | str | os.PathLike[str] | EmbeddingCache = True,
        on_empty: Literal["error", "encode"] = "error",
    ) -> None:
        super().__init__(cache=cache, on_empty=on_empty)
        for name, value in (
            ("dimensions", dimensions),
            ("batch_size", batch_size),
            ("max_concurrency", max_concurrency),
        ):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if client is not None:
            create = getattr(getattr(client, "embeddings", None), "create", None)
            if create is None or inspect.iscoroutinefunction(create):
                raise TypeError(f"client must be an openai.OpenAI (not async), got {type(client).__name__}")
            if (base_url, api_key, timeout, max_retries) != (None,) * 4:
                raise ValueError("pass a client, or base_url, api_key, timeout and max_retries, not both")
        check_extra_query(extra_query)
        self.extra_query = dict(extra_query or {})
        self.model = model
        self._endpoint = (
            Endpoint(base_url, api_key, timeout=timeout, max_retries=max_retries) if client is None else None
        )
        if self._endpoint is not None:
            self._endpoint.check_proxy()  # a proxy that cannot be used is said before any work begins
        self.base_url = str(getattr(client, "base_url", "")) if self._endpoint is None else self._endpoint.base_url
        self.dimensions = dimensions
        self.batch_size = batch_size
        self.max_concurrency = max_concurrency
        self.normalize = normalize
        self._client = client
        self._lock = threading.Lock()

    def fingerprint(self) -> str:
        """Return what determines the vectors: endpoint, model, dimensions, normalisation."""
        settings = {
            "endpoint": public_address(self.base_url),
            "model": self.model,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            **({"query": self.extra_query} if self.extra_query else {}),
        }
        return json.dumps(settings, sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """Describe the encoder in JSON values; requests the dimension from the endpoint if it is not known."""
        return {
            "type": type(self).__name__,
            "name": self.model,
            "revision": None,
            "endpoint": public_address(self.base_url),
            "dimension": self.dimension,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            **({"query": self.extra_query} if self.extra_query else {}),
        }

    def blocks(self, texts: list[str], kind: Kind) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Encode texts in concurrent requests, see :meth:`CachedEncoder.blocks`.

        A failed request does not stop those under way: their vectors are handed over before the error.
        """
        self._connected()  # a missing key is the caller's mistake: said before any work begins
        batches = self._batches(texts)
        failures: list[str] = []
        finished = 0
        executor = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="pfm-embeddings")
        try:
            requests = {
                executor.submit(self._request, [texts[position] for position in batch]): batch for batch in batches
            }
            for request in as_completed(requests):
                if request.cancelled():
                    continue
                error = request.exception()
                if error is None:
                    finished += len(requests[request])
                    yield np.array(requests[request]), request.result()
                    continue
                failures.append(self._without_key(f"{type(error).__name__}: {error}"))
                for waiting in requests:
                    waiting.cancel()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        if failures:
            # Raised outside of any handler: the client's error, which may quote the key, is not chained to it.
            address = public_address(self.base_url) + ("" if self._endpoint is None else self._endpoint.route)
            raise EncodingError(
                f"embeddings from {address} failed: {failures[0]} ({finished} of {len(texts)} texts"
                f" were encoded{' and are in the cache' if self.cache is not None else ''})"
            )

    def _batches(self, texts: list[str]) -> list[list[int]]:
        batches: list[list[int]] = []
        size = 0
        for position, text in enumerate(texts):
            length = len(text.encode())
            if not batches or len(batches[-1]) == self.batch_size or size + length > _BYTES_PER_REQUEST:
                batches.append([])
                size = 0
            batches[-1].append(position)
            size += length
        return batches

    def _request(self, texts: list[str]) -> Tensor:
        options: dict[str, Any] = {} if self.dimensions is None else {"dimensions": self.dimensions}
        if self.extra_query:
            options["extra_query"] = self.extra_query
        response = self._connected().embeddings.create(model=self.model, input=texts, **options)
        rows = {item.index: item.embedding for item in response.data}
        if len(response.data) != len(texts) or rows.keys() != set(range(len(texts))):
            raise ValueError(
                f"asked for the embeddings of {len(texts)} texts, got {len(response.data)} with index {list(rows)[:8]}"
            )
        lengths = {len(row) for row in rows.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"the embeddings have lengths {sorted(lengths)}, expected one")
        vectors = torch.tensor([rows[index] for index in range(len(texts))], dtype=torch.float32)
        return torch.nn.functional.normalize(vectors, dim=1) if self.normalize else vectors

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                if self._endpoint is None:  # it came with a client, which another process does not have
                    self._endpoint = Endpoint(self.base_url)
                self._client = self._endpoint.client()
            return self._client

    def _without_key(self, text: str) -> str:
        endpoint = self._endpoint or Endpoint.of_client(self._client)
        return redacted(text, [*endpoint.secrets(), urlsplit(self.base_url).query])

    def __repr__(self) -> str:
        return f"OpenAIEncoder({self.model!r}, {public_address(self.base_url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        # base_url goes without password and query; the other process takes its key from its environment.
        state = {**self.__dict__, "base_url": public_address(self.base_url)}
        return {name: value for name, value in state.items() if name not in ("_client", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _client=None, _lock=threading.Lock())

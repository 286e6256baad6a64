"""Several frozen generators behind one."""

from __future__ import annotations

import hashlib
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pfm._internal.checks import check_length
from pfm.errors import GenerationError
from pfm.generators.base import (
    Draw,
    GeneratesTexts,
    Prompt,
    add_usage,
    as_messages,
    canonical,
    first_samples,
    uneven_draws,
)
from pfm.generators.callable import as_generator

__all__ = ["GeneratorPool"]

_GOLDEN = (math.sqrt(5) - 1) / 2


class GeneratorPool(GeneratesTexts):
    """Draws the candidates of each prompt from several generators, and tags each with its generator's name.

    Which generator makes sample k of a prompt depends on seed, weights, prompt and k alone. The shares of any run
    of samples are as near to the weights as whole numbers allow, up to one sample or two (a golden-ratio sequence
    with a random start for each prompt), and the first four of eight are the four of four. The generators work
    at the same time, one thread each.

    Args:
        generators: by their names; or a list, which are then named after their models, numbered where two have
            the same name.
        weights: how often each is used, in any unit; None for all alike. By the same names, or in the same order.
        seed: seed of the allotment.

    Raises:
        ValueError: no generators, or weights that are negative, not finite, all zero, or not of these generators.
        TypeError: one of them is no generator.
    """

    def __init__(
        self,
        generators: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if not isinstance(generators, Mapping):
            adapted = [as_generator(generator) for generator in generators]
            generators = dict(zip(_names(adapted), adapted, strict=True))
        if not generators:
            raise ValueError("generators must hold at least one generator, got none")
        self.generators = {str(name): as_generator(generator) for name, generator in generators.items()}
        self.weights = _checked_weights(weights, list(self.generators))
        self.seed = seed

    def describe(self) -> dict[str, Any]:
        """Describe what the texts depend on in JSON values.

        Raises:
            AttributeError: one of the generators does not describe itself.
        """
        return {
            "type": type(self).__name__,
            "generators": {name: generator.describe() for name, generator in self._describing().items()},
            "weights": self.weights,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        shares = ", ".join(f"{name!r}: {weight:.3g}" for name, weight in self.weights.items())
        return f"GeneratorPool({{{shares}}}, seed={self.seed})"

    def allot(self, prompt: Prompt, n: int, start: int = 0) -> list[str]:
        """Name the generators of the samples from number ``start`` to ``start + n - 1``."""
        digest = hashlib.sha256(f"{self.seed}\n{canonical(as_messages(prompt))}".encode()).digest()
        offset = int.from_bytes(digest[:8], "big") * 2.0**-64
        positions = (offset + _GOLDEN * np.arange(start, start + n)) % 1.0
        bounds = np.cumsum(list(self.weights.values()))
        names = list(self.generators)
        found = np.searchsorted(bounds, positions * bounds[-1], side="right")
        return [names[min(int(place), len(names) - 1)] for place in found]

    def draws(self, prompts: Sequence[Prompt], n: int, *, start: Sequence[int] | None = None) -> Iterator[Draw]:
        """Yield the draw of each prompt; what one generator fails to give leaves the others' texts alone."""
        first = first_samples(prompts, n, start)
        makers = [self.allot(prompt, n, at) for prompt, at in zip(prompts, first, strict=True)]
        earlier = [self.allot(prompt, at) for prompt, at in zip(prompts, first, strict=True)]
        streams: dict[str, Iterator[Draw]] = {}
        for name, generator in self.generators.items():
            rows = [row for row, names in enumerate(makers) if name in names]
            counts = [makers[row].count(name) for row in rows]
            own_first = [earlier[row].count(name) for row in rows]
            if rows:
                streams[name] = uneven_draws(generator, [prompts[row] for row in rows], counts, own_first)
        with _Ahead(streams) as arriving:
            for names in makers:
                yield _joined({name: arriving.next(name) for name in self.generators if name in names}, names)

    def _describing(self) -> dict[str, Any]:
        lacking = [name for name, generator in self.generators.items() if not hasattr(generator, "describe")]
        if lacking:
            raise AttributeError(f"{', '.join(lacking)} of the pool do not say what their texts depend on")
        return self.generators


class _Ahead:
    """Runs iterators ahead, each in a thread of its own; an error of one is raised where its result is needed."""

    def __init__(self, streams: Mapping[str, Iterator[Draw]]) -> None:
        self._streams = streams
        self._arrived: dict[str, queue.SimpleQueue[Draw | BaseException]] = {
            name: queue.SimpleQueue() for name in streams
        }
        self._closed = threading.Event()

    def __enter__(self) -> _Ahead:
        for name in self._streams:
            threading.Thread(target=self._run, args=(name,), daemon=True, name=f"pfm-pool-{name}").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _run(self, name: str) -> None:
        arrived = self._arrived[name]
        try:
            for draw in self._streams[name]:
                if self._closed.is_set():
                    return
                arrived.put(draw)
            arrived.put(GenerationError(f"generator {name!r} gave fewer draws than there were prompts"))
        except BaseException as error:
            arrived.put(error)

    def next(self, name: str) -> Draw:
        found = self._arrived[name].get()
        if isinstance(found, BaseException):
            raise found
        return found


def _joined(parts: Mapping[str, Draw], names: Sequence[str]) -> Draw:
    """Put the draws of the members together, in the order in which the samples were allotted."""
    whole = Draw()
    places = dict.fromkeys(parts, 0)
    known = any(part.finish_reasons for part in parts.values())
    reasoned = any(part.reasoning for part in parts.values())
    for name in names:
        part, place = parts[name], places[name]
        places[name] += 1
        if place < len(part.texts):
            whole.texts.append(part.texts[place])
            whole.tags.append(name)
            if known:
                whole.finish_reasons.append(part.finish_reasons[place] if part.finish_reasons else None)
            if reasoned:
                whole.reasoning.append(part.reasoning[place] if part.reasoning else 0)
    for part in parts.values():
        whole.calls += part.calls
        whole.dropped += part.dropped
        whole.seconds = max(whole.seconds, part.seconds)
        add_usage(whole.usage, part.usage)
    errors = [f"{part.error} (generator {name!r})" for name, part in parts.items() if part.error is not None]
    whole.error = "; ".join(errors) or None
    return whole.close()


def _names(generators: Sequence[Any]) -> list[str]:
    plain = []
    for generator in generators:
        described = generator.describe() if hasattr(generator, "describe") else {}
        function = getattr(generator, "function", None)
        plain.append(str(described.get("name") or getattr(function, "__name__", None) or type(generator).__name__))
    return [
        name if plain.count(name) == 1 else f"{name} #{plain[: place + 1].count(name)}"
        for place, name in enumerate(plain)
    ]


def _checked_weights(weights: Any, names: list[str]) -> dict[str, float]:
    if weights is None:
        weights = dict.fromkeys(names, 1.0)
    elif not isinstance(weights, Mapping):
        check_length("weights", weights, len(names), "generator")
        weights = dict(zip(names, weights, strict=True))
    if set(weights) != set(names):
        raise ValueError(f"weights must be those of {', '.join(names)}; got {', '.join(map(str, weights))}")
    values = {name: float(weights[name]) for name in names}
    total = sum(values.values())
    if any(not math.isfinite(value) or value < 0 for value in values.values()) or total <= 0:
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {list(values.values())}")
    return {name: value / total for name, value in values.items()}

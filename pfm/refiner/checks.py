"""Checks of what a Refiner is built from and called with."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pfm._internal.checks import check_whole
from pfm.data.vector_spaces import space_differences
from pfm.decoders import Decoder, Latent, Rewrite, Select
from pfm.generators import Prompt
from pfm.generators.base import Accepts, is_usable_text
from pfm.protocols import Flow
from pfm.references import PooledFlow
from pfm.refiner.stopping import Plan, Stopping

__all__ = [
    "accepted_outputs",
    "as_decoder",
    "check_flow_and_encoder",
    "check_outputs",
    "check_plan",
    "check_prompts",
    "check_sources",
    "check_tags",
    "flat_size",
    "is_conversation",
    "show",
]

DECODERS: dict[str, Callable[..., Decoder]] = {"select": Select, "rewrite": Rewrite, "latent": Latent}


def as_decoder(decoder: str | Decoder, options: Mapping[str, Any]) -> Decoder:
    """Return the decoder that is named, with its options, or the given one.

    Raises:
        TypeError: no decoder, or a setting is missing. ValueError: an unknown name or setting.
    """
    names = " or ".join(f"'{name}'" for name in DECODERS)
    if isinstance(decoder, str):
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be {names}, or an object with .decode, got {decoder!r}")
        known = inspect.signature(DECODERS[decoder]).parameters
        foreign = [name for name in options if name not in known]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} are no settings of decoder={decoder!r}, which has {', '.join(known)}"
            )
        lacking = [name for name, p in known.items() if p.default is p.empty and name not in options]
        if lacking:
            raise TypeError(f"decoder={decoder!r} needs {', '.join(lacking)}: pass it to pfm.wrap")
        return DECODERS[decoder](**options)
    if isinstance(decoder, type) or not callable(getattr(decoder, "decode", None)):
        raise TypeError(f"decoder must be {names}, or an object with .decode, got {show(decoder)}")
    if options:
        raise ValueError(
            f"{', '.join(options)} belong to decoder='select' or another that is named, got them with "
            f"{show(decoder)}; set them on the decoder itself"
        )
    return decoder


def check_flow_and_encoder(flow: Flow, encoder: Any) -> None:
    """Check that flow and encoder have what is needed and belong together.

    Raises:
        TypeError: a method is missing. ValueError: their dimensions differ.
    """
    if not callable(getattr(flow, "win_probability", None)):
        raise TypeError(f"flow must be a PreferenceFlow, got {show(flow)}")
    if isinstance(encoder, type) or not callable(getattr(encoder, "encode", None)):
        raise TypeError(f"encoder must have .encode(outputs), got {show(encoder)}")
    expected = flat_size(flow.metadata["dimension"])
    if encoder.dimension is None:  # it does not say: what it encodes is checked
        encoder.dimension = expected
    if flat_size(encoder.dimension) != expected:
        raise ValueError(
            f"encoder has dimension {encoder.dimension}, but the flow was fitted on dimension {expected}; "
            f"use the encoder of the fit: {_name(flow.metadata.get('encoder'))}"
        )
    if differences := space_differences(flow.metadata.get("encoder"), encoder.describe()):
        warnings.warn(
            f"the flow was fitted with another encoder than the one given: {differences}; "
            "vectors of different encoders cannot be compared",
            stacklevel=3,
        )


def check_sources(flow: PooledFlow, generator: Any, decoder: Decoder) -> None:
    """Check that a pooled flow can judge what this generator and decoder give it.

    Raises:
        ValueError: the decoder makes outputs of its own, or the pool has generators that the flow does not know.
    """
    if not (isinstance(decoder, Select) and decoder.by in ("win_probability", "sample")):
        raise ValueError(
            "a flow of a pool knows the outputs of its generators alone: use decoder='select' by 'win_probability' or "
            f"'sample', got {decoder!r}"
        )
    pool = getattr(generator, "generators", None)
    if isinstance(pool, Mapping) and (foreign := [name for name in pool if name not in flow.names]):
        raise ValueError(
            f"the flow was fitted on outputs of {', '.join(flow.names)}: the pool has {', '.join(foreign)} too; leave "
            "these out, or fit on pairs of their outputs"
        )


def check_plan(n: Any, max_n: Any, spend: Any, stopping: Any, flow: Flow, decoder: Decoder) -> Plan | None:
    """Return the stopping rule of ``n="auto"`` with its cap and price, or None where n is a number.

    Raises:
        TypeError: n is text other than "auto", or ``stopping`` is no rule. ValueError: there is no rule, the decoder or
            the flow has no use for one, or settings of a rule came with a number.
    """
    if stopping is not None and not isinstance(stopping, Stopping):
        raise TypeError(f"stopping must be a pfm.refiner.Stopping, got {show(stopping)}")
    if not isinstance(n, str):
        given = {"max_n": max_n, "spend": spend}
        names = [name for name, value in given.items() if value is not None]
        if names:
            raise ValueError(f'{", ".join(names)} belong to n="auto", got them with n={n!r}')
        return None
    if n != "auto":
        raise TypeError(f'n must be an integer or "auto", got {n!r}')
    if isinstance(flow, PooledFlow) or (isinstance(decoder, Select) and decoder.by != "win_probability"):
        found = "a flow of a pool" if isinstance(flow, PooledFlow) else f"by={getattr(decoder, 'by', None)!r}"
        raise ValueError(f'n="auto" stops by the best win probability so far, got {found}: give n a number')
    if stopping is None:
        raise ValueError(
            'n="auto" needs a calibrated stopping rule: pass stopping=wrap(None, flow, ...).calibrate(outputs, '
            "prompts, scores) on held-out prompts, or Stopping.load(path); without one, give n a number"
        )
    return stopping.plan(None if max_n is None else check_whole("max_n", max_n, 1), spend)


def check_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts as plain texts and lists of plain dicts, whatever table they came from."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of prompts, got {show(prompts)}; one prompt goes to refiner(prompt)")
    checked: list[Prompt] = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            checked.append(str(prompt))
        elif is_conversation(prompt):
            checked.append([dict(message) for message in prompt])
        else:
            raise TypeError(
                f"prompts[{row}] must be a text or a list of messages with role and content, got {show(prompt)}"
            )
    return checked


def check_outputs(outputs: Any, accepts: Accepts = is_usable_text) -> list[list[Any]]:
    """Return a list of candidates for each row; an empty cell of a table (None) has none.

    An array is a row of candidates, whatever is accepted: one image is given as ``[image]``.
    """
    if isinstance(outputs, str | Mapping) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs must be a list with one entry a prompt, got {show(outputs)}")
    rows: list[list[Any]] = []
    for row, output in enumerate(outputs):
        if output is None:
            rows.append([])
        elif isinstance(output, str):
            rows.append([output])
        elif isinstance(output, list | tuple | np.ndarray | torch.Tensor):
            rows.append(list(output))
        elif accepts(output):
            rows.append([output])
        else:
            raise TypeError(f"outputs[{row}] must be a text or a list of texts, got {show(output)}")
    return rows


def check_tags(generators: Any, rows: list[list[Any]]) -> list[list[str]]:
    """Return for each row the names of its candidates' generators; none at all where none are given."""
    if generators is None:
        return [[] for _ in rows]
    tags = check_outputs(generators)
    sizes, wanted = [len(row) for row in tags], [len(row) for row in rows]
    if sizes != wanted:
        at = next(
            (row for row, pair in enumerate(zip(sizes, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(sizes), len(wanted)),
        )
        raise ValueError(
            f"generators must name one for each candidate: got {len(sizes)} rows for {len(wanted)} prompts, and they "
            f"differ at row {at}"
        )
    return tags


def accepted_outputs(encoder: Any) -> Accepts:
    """Return what tells the outputs that an encoder encodes: its ``accepts``, else texts that are not empty."""
    return getattr(encoder, "accepts", is_usable_text)


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages with role and content."""
    return (
        isinstance(prompt, list | tuple | np.ndarray)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def flat_size(dimension: int | Sequence[int]) -> int:
    """Return the number of values in an output of this dimension or shape."""
    return dimension if isinstance(dimension, int) else math.prod(dimension)


def show(value: Any) -> str:
    """Name the type of a wrong argument, and its value where that is short."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


def _name(description: Mapping[str, Any] | None) -> str:
    """Write name and revision of an encoder's description."""
    if not description:
        return "not recorded"
    revision = description.get("revision")
    return f"{description.get('name')}" + (f" (revision {revision})" if revision else "")

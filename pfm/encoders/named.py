"""Encoders by name, and by the description that a fitted flow keeps of its encoder."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pfm._internal.endpoint import public_address
from pfm.encoders.base import Encoder
from pfm.encoders.concat import ConcatEncoder
from pfm.encoders.openai import OpenAIEncoder
from pfm.encoders.sentence import SentenceEncoder
from pfm.encoders.static import POOLINGS, StaticEncoder
from pfm.encoders.surface import SurfaceEncoder
from pfm.errors import UntrustedEncoderError

__all__ = ["encoder_from_description", "encoder_from_name"]

# Surface features are of the order of 1 each where a sentence embedding has length 1 in all: at this weight
# neither drowns the other.
SURFACE_WEIGHT = 0.3
DEEPEST = 4  # encoders side by side within others
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_NAMES = ("minilm", "static", "static-mean", "surface")
_SETTINGS = [name for name in inspect.signature(SentenceEncoder).parameters if name != "name_or_path"]


def encoder_from_name(name: str, **options: Any) -> Encoder:
    """Make an encoder from a name that fits on a command line.

    Args:
        name: ``"minilm"``, ``"static"`` (:class:`StaticEncoder`; ``"static-mean"`` without maxima), ``"surface"``, the
            name or the folder of a sentence-transformers model, or several joined by ``+``: ``"minilm+surface"`` puts
            the two side by side, surface features at weight 0.3.
        options: settings of :class:`SentenceEncoder` for its parts; ``on_empty`` reaches all parts.

    Raises:
        ValueError: a part is empty, named twice, nearly one of ours, or there is no such folder.
        TypeError: SentenceEncoder has no such setting.

    >>> encoder_from_name("surface").dimension
    28
    """
    if unknown := [key for key in options if key not in _SETTINGS]:
        near = difflib.get_close_matches(unknown[0], _SETTINGS, 1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(_SETTINGS)}"
        raise TypeError(f"{', '.join(unknown)}: no setting of an encoder: {meant}")
    if not isinstance(name, str):
        raise TypeError(f"encoder must be a name such as 'minilm+surface': got {type(name).__name__}")
    whole = name.strip()
    parts = [whole] if Path(whole).is_dir() else [part.strip() for part in whole.split("+")]
    if not all(parts):
        raise ValueError(f"encoder must be a name, or names joined by '+': got {name!r}; for example 'minilm+surface'")
    if len(set(parts)) < len(parts):
        raise ValueError(f"encoder names a part twice: {name!r}; name each once")
    encoders = [_part(part, options) for part in parts]
    if len(encoders) == 1:
        return encoders[0]
    return ConcatEncoder(encoders, [SURFACE_WEIGHT if part == "surface" else 1.0 for part in parts])


def _part(name: str, options: Mapping[str, Any]) -> Encoder:
    if name == "surface":
        return SurfaceEncoder(**{key: value for key, value in options.items() if key == "on_empty"})
    if name in ("static", "static-mean"):
        pooling = {"pooling": "mean"} if name == "static-mean" else {}
        return StaticEncoder(**pooling, **{key: value for key, value in options.items() if key == "on_empty"})
    _refuse_misspelt(name)
    return SentenceEncoder(name, **options)


def _refuse_misspelt(name: str) -> None:
    """Refuse a name that is nearly one of ours, before anything is looked for on the hub.

    Raises:
        ValueError: with the name that is meant, and all names.
    """
    if name in _NAMES or "/" in name or "\\" in name or Path(name).is_dir():
        return
    near = difflib.get_close_matches(name.lower(), _NAMES, 1, cutoff=0.8)
    if near:
        raise ValueError(
            f"encoder {name!r} is not known: did you mean {near[0]!r}? Known are {', '.join(_NAMES)}; or give the "
            "folder of a sentence-transformers model, or its name on the hub, such as BAAI/bge-small-en-v1.5"
        )


def encoder_from_description(description: Mapping[str, Any] | None, *, trust_encoder: bool = False) -> Encoder:
    """Rebuild an encoder from what its ``describe()`` said, as kept in ``flow.metadata["encoder"]``.

    Number type, cache and device are chosen for this machine; an endpoint's key comes from the environment.

    Args:
        description: JSON values, which may come from a stranger.
        trust_encoder: contact the endpoints and open the folders that it names. An endpoint receives every prompt
            and output, and may be sent the environment's key; a folder may hold code. Built-in encoders and models
            of the hub, which run no code of theirs, need no trust.

    Raises:
        UntrustedEncoderError: it names an endpoint or a folder; the message says which.
        ValueError: there is no description, or it is not of an encoder of this package.
    """
    if not description:
        raise ValueError("the flow does not say by which encoder it was fitted: make that encoder and pass it by hand")
    named = list(_contacts(description))
    if named and not trust_encoder:
        raise UntrustedEncoderError(
            f"the flow names {' and '.join(named)}: pass the encoder by hand, or trust_encoder=True if you know "
            f"{'them' if len(named) > 1 else 'it'}"
        )
    return _rebuilt(description)


def _contacts(description: Any, depth: int = 0) -> Iterator[str]:
    """Yield, in words, what the encoder of a description would contact or open."""
    if not isinstance(description, Mapping) or depth > DEEPEST:
        raise ValueError("the description of the flow's encoder is damaged: pass the encoder by hand")
    kind, name = description.get("type"), description.get("name")
    if kind == "ConcatEncoder":
        parts = description.get("encoders")
        for part in parts if isinstance(parts, list) else ():
            yield from _contacts(part, depth + 1)
    elif kind == "OpenAIEncoder":
        address = str(description.get("endpoint"))
        yield f"an encoder at {public_address(address)}, which would receive all prompts and outputs"
    elif kind == "SentenceEncoder":
        if not isinstance(name, str):
            raise ValueError("the description of the flow's encoder is damaged: pass the encoder by hand")
        # By its form first: on some systems even a look at a path contacts another machine.
        if name != "minilm" and (not _HUB_NAME.fullmatch(name) or Path(name).exists()):
            yield f"a model in the folder {name[:200]!r}, which may hold code"


def _rebuilt(description: Mapping[str, Any]) -> Encoder:
    kind = description.get("type")
    try:
        if kind == "SentenceEncoder":
            return SentenceEncoder(
                description["name"],
                revision=_commit(description["revision"]),
                **{key: description[key] for key in ("normalize", "long_texts", "truncate_dim", "prompts")},
            )
        if kind == "SurfaceEncoder":
            return SurfaceEncoder()
        if kind == "StaticEncoder":
            if description["pooling"] not in POOLINGS:
                raise TypeError(f"pooling must be one of {', '.join(POOLINGS)}, got {description['pooling']!r:.100}")
            return StaticEncoder(pooling=description["pooling"])
        if kind == "OpenAIEncoder":
            return OpenAIEncoder(
                description["name"],
                base_url=description["endpoint"],
                dimensions=description["dimensions"],
                normalize=description["normalize"],
                extra_query=description.get("query"),
            )
        if kind == "ConcatEncoder":
            weights = description["weights"]
            if not (isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)):
                raise TypeError(f"weights must be a list of numbers, got {weights!r:.100}")
            return ConcatEncoder([_rebuilt(part) for part in description["encoders"]], weights)
    except KeyError as error:
        raise ValueError(f"the description of the flow's {kind} lacks {error}: pass the encoder by hand") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"the description of the flow's {kind} is damaged ({error}): pass the encoder by hand"
        ) from None
    raise ValueError(
        f"the flow was fitted with the encoder {description.get('name')!r} of type {kind!r}, which is not one of "
        "this package: make it and pass it by hand"
    )


def _commit(identity: Any) -> str | None:
    """Return the commit in the identity of a model of the hub; a folder is identified by its contents."""
    found = re.fullmatch(r".+@([0-9a-f]{40})", identity) if isinstance(identity, str) else None
    return found.group(1) if found else None

"""Encoders by name, and by the description that a fitted flow keeps of its encoder."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfm.encoders.base import Encoder
from pfm.encoders.concat import ConcatEncoder
from pfm.encoders.openai import OpenAIEncoder
from pfm.encoders.sentence import SentenceEncoder
from pfm.encoders.surface import SurfaceEncoder

__all__ = ["encoder_from_description", "encoder_from_name"]

# Surface features are of the order of 1 each where a sentence embedding has length 1 in all: at this weight
# neither drowns the other.
SURFACE_WEIGHT = 0.3
_SETTINGS = [name for name in inspect.signature(SentenceEncoder).parameters if name != "name_or_path"]


def encoder_from_name(name: str, **options: Any) -> Encoder:
    """Make an encoder from a name that fits on a command line.

    Args:
        name: ``"minilm"``, ``"surface"``, the name or the folder of a sentence-transformers model, or several
            joined by ``+``: ``"minilm+surface"`` puts the two side by side, surface features at weight 0.3.
        options: settings of :class:`SentenceEncoder` for its parts; ``on_empty`` reaches all parts.

    Raises:
        ValueError: a part is empty, named twice, or there is no such folder.
        TypeError: SentenceEncoder has no such setting.
    """
    if unknown := [key for key in options if key not in _SETTINGS]:
        near = difflib.get_close_matches(unknown[0], _SETTINGS, 1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(_SETTINGS)}"
        raise TypeError(f"{', '.join(unknown)}: no setting of an encoder: {meant}")
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
    return SentenceEncoder(name, **options)


def encoder_from_description(description: Mapping[str, Any] | None) -> Encoder:
    """Rebuild an encoder from what its ``describe()`` said, as kept in ``flow.metadata["encoder"]``.

    Number type, cache and device are chosen for this machine; an endpoint's key comes from the environment.

    Raises:
        ValueError: there is no description, or it is not of an encoder of this package.
    """
    if not description:
        raise ValueError("the flow does not say by which encoder it was fitted: make that encoder and pass it by hand")
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
        if kind == "OpenAIEncoder":
            return OpenAIEncoder(
                description["name"],
                base_url=_endpoint(description["endpoint"]),
                dimensions=description["dimensions"],
                normalize=description["normalize"],
                extra_query=description.get("query"),
            )
        if kind == "ConcatEncoder":
            parts = [encoder_from_description(part) for part in description["encoders"]]
            return ConcatEncoder(parts, description["weights"])
    except KeyError as error:
        raise ValueError(f"the description of the flow's {kind} lacks {error}: pass the encoder by hand") from None
    raise ValueError(
        f"the flow was fitted with the encoder {description.get('name')!r} of type {kind!r}, which is not one of "
        "this package: make it and pass it by hand"
    )


def _commit(identity: str | None) -> str | None:
    """Return the commit in the identity of a model of the hub; a folder is identified by its contents."""
    found = re.fullmatch(r".+@([0-9a-f]{40})", identity or "")
    return found.group(1) if found else None


def _endpoint(address: str) -> str | None:
    # Named by the environment, it may have the environment's key; any other address never gets one.
    named = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
    return None if address == named else address

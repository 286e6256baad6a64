"""The encoder that all vector methods of a run share."""

from __future__ import annotations

from pfm.encoders import ConcatEncoder, Encoder, SentenceEncoder, SurfaceEncoder

__all__ = ["make_encoder"]


def make_encoder(name: str, *, long_texts: str, surface_weight: float) -> Encoder:
    """Make the encoder named by parts joined with "+", such as "minilm+surface".

    Raises:
        ValueError: a part is unknown or named twice, or ``long_texts`` is.
    """
    if long_texts not in ("truncate", "chunk"):
        raise ValueError(f"long_texts must be 'truncate' or 'chunk', got {long_texts!r}")
    parts: dict[str, Encoder] = {}
    for part in name.split("+"):
        if part in parts:
            raise ValueError(f"encoder names {part!r} twice: {name!r}")
        if part == "minilm":
            parts[part] = SentenceEncoder("minilm", long_texts=long_texts)
        elif part == "surface":
            parts[part] = SurfaceEncoder()
        else:
            raise ValueError(f"encoder must be parts of 'minilm' and 'surface' joined by '+', got {name!r}")
    if len(parts) == 1:
        return next(iter(parts.values()))
    weights = [surface_weight if part == "surface" else 1.0 for part in parts]
    return ConcatEncoder(list(parts.values()), weights)

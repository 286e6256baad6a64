"""Compare the vector spaces of encoders by their descriptions, without what does not change the space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

__all__ = ["space_differences", "vector_space"]


def vector_space(description: Any) -> Any:
    """Reduce an encoder's description, at any depth, to what makes its vectors another space.

    The number type is left out: the same model in bfloat16 gives the same vectors but for rounding.
    """
    if isinstance(description, Mapping):
        members = cast(Mapping[str, Any], description)
        return {name: vector_space(value) for name, value in members.items() if name != "dtype"}
    if isinstance(description, list | tuple):
        return [vector_space(value) for value in cast(Sequence[Any], description)]
    return description


def space_differences(fitted: Mapping[str, Any] | None, given: Mapping[str, Any]) -> str:
    """Return the members in which the descriptions of two encoders differ that both have; "" if in none.

    >>> space_differences({"name": "a", "dtype": "float16"}, {"name": "b", "dtype": "float32"})
    "name 'a' against 'b'"
    """
    ours, theirs = vector_space(fitted or {}), vector_space(given)
    return ", ".join(
        f"{name} {ours[name]!r} against {theirs[name]!r}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    )

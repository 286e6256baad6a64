"""Rows by number or mask, and the units of prompts that no split separates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pfm.data.identity import PromptIdentity

__all__ = ["row_numbers", "split_keys"]


def row_numbers(indices: Iterable[int] | np.ndarray, count: int) -> list[int]:
    """Check row numbers, or a mask of ``count`` rows, and return the numbers."""
    numbers = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
    if numbers.dtype == bool:
        if numbers.shape != (count,):
            raise ValueError(f"a mask must have {count} entries, one a row; got shape {numbers.shape}")
        return np.flatnonzero(numbers).tolist()
    if not numbers.size:
        return []
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"indices must be row numbers or a mask: got {numbers.dtype} of shape {numbers.shape}")
    outside = numbers[(numbers < -count) | (numbers >= count)]
    if outside.size:
        raise IndexError(f"row {outside[0]} does not exist: there are {count} rows")
    return (numbers % count).tolist()


def split_keys(
    prompts: Sequence[str], groups: Sequence[Any], identities: Sequence[PromptIdentity], seed: int, *, join_groups: bool
) -> list[str]:
    """Return for each row the random key of its unit: its prompt, or all prompts that groups join to it."""
    prompt_keys: dict[PromptIdentity, str] = {}
    for identity, (prompt, group) in zip(identities, zip(prompts, groups, strict=True), strict=True):
        # Of texts that are one prompt the smallest key counts: neither their order nor the normal form matters.
        exact = (prompt, None if identity[0] else group)
        key = hashlib.blake2b(f"{seed}\0{exact}".encode(), digest_size=16).hexdigest()
        prompt_keys[identity] = min(prompt_keys.get(identity, key), key)
    if not join_groups:
        return [prompt_keys[identity] for identity in identities]
    # union-find over prompt keys; the smallest key of a unit stands for it, so row order does not matter
    parent = {key: key for key in prompt_keys.values()}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    of_group: dict[Any, str] = {}
    for identity, group in zip(identities, groups, strict=True):
        if group is not None:
            low, high = sorted((root(prompt_keys[identity]), root(of_group.get(group, prompt_keys[identity]))))
            parent[high] = of_group[group] = low
    return [root(prompt_keys[identity]) for identity in identities]

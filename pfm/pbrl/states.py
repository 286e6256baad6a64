"""Exact states of environments, an array or a list of them, as arrays that are saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["join_states", "pack_states", "pick_states", "unpack_states"]

ROWS = "rows"


def pack_states(states: Any) -> dict[str, np.ndarray]:
    """Turn what ``save_states`` of a batch environment gave, a list of dicts or an array (N, S), into named arrays."""
    if isinstance(states, np.ndarray):
        return {ROWS: states}
    from pfm.pbrl.environments import stack_states

    return stack_states(states)


def unpack_states(packed: dict[str, np.ndarray]) -> Any:
    """Undo :func:`pack_states`: what ``restore_states`` of a batch environment takes."""
    if ROWS in packed:
        return packed[ROWS]
    from pfm.pbrl.environments import unstack_states

    return unstack_states(packed)


def join_states(parts: Sequence[Any]) -> Any:
    """Concatenate what ``save_states`` gave several times."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [state for part in parts for state in part]


def pick_states(states: Any, index: np.ndarray) -> Any:
    """Take the states at ``index`` of what ``save_states`` gave."""
    return states[index] if isinstance(states, np.ndarray) else [states[each] for each in index]

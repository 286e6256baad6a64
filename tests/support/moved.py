"""Preference models that are on a device as soon as they are fitted."""

from __future__ import annotations

import functools
from typing import Any

from pfm.preferences import PreferenceModel

__all__ = ["move_fitted_models"]


def move_fitted_models(device: str) -> None:
    """Let every kind of preference model end its fits on a device, wherever its pairs are."""
    for kind in PreferenceModel._kinds.values():
        if "fit" in vars(kind):
            kind.fit = _moved(kind.fit, device)


def _moved(fit: Any, device: str) -> Any:
    @functools.wraps(fit)
    def moved(self: PreferenceModel, *args: Any, **options: Any) -> PreferenceModel:
        return fit(self, *args, **options).to(device)

    return moved

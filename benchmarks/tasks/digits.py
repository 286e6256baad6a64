"""The light version of ``task=mnist``, on the 8 x 8 digits of scikit-learn: see :mod:`benchmarks.images`."""

from __future__ import annotations

from benchmarks.images.config import ImagesConfig
from benchmarks.images.task import Images

__all__ = ["load"]


def load(config: ImagesConfig, seed: int) -> Images:
    """Make the task; the seed draws the preferences and the tested images."""
    return Images("digits", config, seed)

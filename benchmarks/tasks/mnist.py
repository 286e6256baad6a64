"""Draws of an imperfect generator of MNIST's digits, moved by a LeNet's preferences: see :mod:`benchmarks.images`."""

from __future__ import annotations

from benchmarks.images.config import ImagesConfig
from benchmarks.images.task import Images

__all__ = ["load"]


def load(config: ImagesConfig, seed: int) -> Images:
    """Make the task; the seed draws the preferences and the tested images."""
    return Images("mnist", config, seed)

"""What a run cannot do by its settings."""

from __future__ import annotations

__all__ = ["UnsuitableMethodError"]


class UnsuitableMethodError(TypeError):
    """Says that a method is none that a task can measure."""

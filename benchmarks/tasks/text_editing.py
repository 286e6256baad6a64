"""Sentences of films' reviews, moved by preferences of sentiment and rewritten: see :mod:`benchmarks.text_editing`."""

from __future__ import annotations

from benchmarks.text_editing.config import TextEditingConfig
from benchmarks.text_editing.task import TextEditing

__all__ = ["load"]


def load(config: TextEditingConfig, seed: int) -> TextEditing:
    """Make the task; the seed draws the drafts and the preferences."""
    return TextEditing(config, seed)

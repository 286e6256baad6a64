"""Sentences of IMDB's reviews, moved in an autoencoder's latent: see :mod:`benchmarks.text_autoencoder`."""

from __future__ import annotations

from benchmarks.text_autoencoder.config import TextAutoencoderConfig
from benchmarks.text_autoencoder.task import TextAutoencoding

__all__ = ["load"]


def load(config: TextAutoencoderConfig, seed: int) -> TextAutoencoding:
    """Make the task; the seed draws the drafts and the preferences."""
    return TextAutoencoding(config, seed)

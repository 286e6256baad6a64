"""Sentences moved in the latent of a bottleneck autoencoder and decoded, measured by independent judges."""

from benchmarks.text_autoencoder.autoencoder import SentenceAutoencoder

__all__ = ["SentenceAutoencoder"]

"""Autoencoders' latents as spaces of unit vectors: our own network, or a bottleneck-T5 model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.core.data import MissingDataError
from benchmarks.text_autoencoder.autoencoder import CONFIG, MODEL_TYPE, SentenceAutoencoder
from benchmarks.text_autoencoder.config import TextAutoencoderConfig

__all__ = ["Space", "load_space"]

SHORTEST = 8  # tokens of a sentence that is moved


class Space:
    """Takes sentences to unit vectors (B, D) and back.

    Args:
        model: has ``encode(texts)`` and ``decode(vectors)``, whose result depends on the vectors' directions alone.
        fluency, beams: of our own network's :meth:`SentenceAutoencoder.decode`; other models have none.

    Raises:
        ValueError: a fluency, and the model's decoder is no language model.
    """

    def __init__(self, model: Any, fluency: float = 0.0, beams: int = 1) -> None:
        if fluency and not (isinstance(model, SentenceAutoencoder) and model.is_language_model):
            raise ValueError(
                f"task.fluency={fluency} needs an autoencoder whose decoder is a language model: train it with python "
                "-m benchmarks.text_autoencoder, which trains the decoder again, or set task.fluency=0"
            )
        self.model, self.fluency, self.beams = model, fluency, beams

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D) of texts that fit."""
        return normalize(self.model.encode(list(texts)), dim=1)

    def decode(self, vectors: Tensor) -> list[str]:
        """Return the likeliest text of each vector (N, D)."""
        if isinstance(self.model, SentenceAutoencoder):
            return self.model.decode(vectors, fluency=self.fluency, beams=self.beams)
        return self.model.decode(vectors)

    def draw(self, vectors: Tensor, noise: float, temperature: float, seed: int) -> list[str]:
        """Return one draw of a text around each unit vector (N, D); only our own network has a temperature."""
        random = torch.Generator().manual_seed(seed)
        noisy = vectors + noise * torch.randn(vectors.shape, generator=random) / vectors.shape[1] ** 0.5
        if isinstance(self.model, SentenceAutoencoder):
            return self.model.decode(noisy, temperature=temperature, seed=seed, fluency=self.fluency)
        return self.model.decode(noisy)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text; of words where the model does not count tokens."""
        if isinstance(self.model, SentenceAutoencoder):
            return [len(row) for row in self.model.tokenize(texts)]
        return [len(text.split()) for text in texts]

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Return which texts have a length that is moved."""
        longest = self.model.network.settings.window if isinstance(self.model, SentenceAutoencoder) else 24
        return [SHORTEST <= length <= longest for length in self.lengths(texts)]


def load_space(config: TextAutoencoderConfig) -> Space:
    """Load the autoencoder that the settings name.

    Raises:
        MissingDataError: there is none yet. ValueError: it is damaged, or its code was not allowed to run.
    """
    folder = Path(config.autoencoder).expanduser()
    described = folder / CONFIG
    if described.is_file() and _model_type(described) == MODEL_TYPE:
        return Space(SentenceAutoencoder.from_pretrained(folder), config.fluency, config.beams)
    if described.is_file() or config.trust_remote_code:
        from pfm.decoders import BottleneckT5

        revision = config.revision
        model = BottleneckT5(config.autoencoder, trust_remote_code=config.trust_remote_code, revision=revision)
        return Space(model, config.fluency)
    raise MissingDataError(
        f"no autoencoder at {config.autoencoder}: python -m benchmarks.text_autoencoder --out {config.autoencoder}; a "
        "bottleneck-T5 model needs task.trust_remote_code=true"
    )


def _model_type(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): train or copy the autoencoder again") from error
    return found.get("model_type") if isinstance(found, dict) else None

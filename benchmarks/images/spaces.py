"""Spaces in which images move: pixels, the generator's noise, and the latent of an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.images.data import check_images, one_hot
from benchmarks.images.generator import Draws, Generator
from benchmarks.images.lesson import Lesson
from benchmarks.images.stored import Training, batches, trained

__all__ = ["SPACES", "Autoencoder", "Latent", "Noise", "Pixels", "Space", "make_space"]

SPACES = ("pixels", "noise", "latent")
UPDATES, ROWS = 800, 256  # of the autoencoder's training
EDGE = 0.02  # how near to 0 and 1 a pixel's probability may come


class Space(Protocol):
    """A way to take draws to vectors or images y (N, \\*D), and y back to images."""

    def encode(self, draws: Draws) -> Tensor:
        """Return y (N, \\*D)."""
        ...

    def decode(self, y: Tensor, digits: Tensor) -> Tensor:
        """Return images (N, 1, S, S) in [0, 1], differentiable in y.

        Raises:
            ValueError: y has another shape.
        """
        ...


class Pixels:
    """Takes each pixel p to log-odds, logit(EDGE + (1 - 2 EDGE) p).

    Whatever a flow makes of them is an image in [0, 1] again, and pixels at the border, nearly always black, do not
    differ from those in the middle by orders of magnitude in spread. Encoding and decoding are exact inverses.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, draws: Draws) -> Tensor:
        """Return (N, 1, S, S)."""
        return torch.logit(EDGE + (1 - 2 * EDGE) * check_images("images", draws.images, self.size))

    def decode(self, y: Tensor, digits: Tensor) -> Tensor:
        """Return images."""
        _check("pixels", y, (1, self.size, self.size), digits)
        return ((torch.sigmoid(y) - EDGE) / (1 - 2 * EDGE)).clamp(0, 1)


class Noise:
    """Takes a draw to the noise that the generator made it of; the generator decodes, without pixel noise."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def encode(self, draws: Draws) -> Tensor:
        """Return (N, Z)."""
        return draws.noise

    def decode(self, y: Tensor, digits: Tensor) -> Tensor:
        """Return images."""
        _check("noise", y, (self.generator.noise,), digits)
        parts = zip(y.split(2048), digits.split(2048), strict=True)
        return torch.cat([self.generator(some, one_hot(own)) for some, own in parts])


class Autoencoder(nn.Module):
    """Takes images (N, 1, S, S) to latents (N, Z) and back; the last layer gives pixels' log-odds."""

    def __init__(self, size: int, latent: int = 24, hidden: int = 256) -> None:
        super().__init__()
        self.size, self.latent = size, latent
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(size * size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size * size)
        )

    def decode(self, z: Tensor) -> Tensor:
        """Return images in [0, 1]."""
        return torch.sigmoid(self.decoder(z)).view(-1, 1, self.size, self.size)


class Latent:
    """Takes a draw to the latent of an autoencoder that was trained on draws of the generator alone."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder

    @torch.no_grad()
    def encode(self, draws: Draws) -> Tensor:
        """Return (N, Z)."""
        images = check_images("images", draws.images, self.autoencoder.size)
        return torch.cat([self.autoencoder.encoder(some) for some in images.split(2048)])

    def decode(self, y: Tensor, digits: Tensor) -> Tensor:
        """Return images."""
        _check("latent", y, (self.autoencoder.latent,), digits)
        return torch.cat([self.autoencoder.decode(some) for some in y.split(2048)])


def make_space(name: str, lesson: Lesson, progress: bool = True) -> Space:
    """Make a space by its name, one of :data:`SPACES`.

    Raises:
        ValueError: another name.
    """
    if name == "pixels":
        return Pixels(lesson.generator.size)
    if name == "noise":
        return Noise(lesson.generator)
    if name == "latent":
        return Latent(_autoencoder(lesson, progress))
    raise ValueError(f"method.space must be one of {', '.join(SPACES)}: got {name!r}")


def _autoencoder(lesson: Lesson, progress: bool) -> Autoencoder:
    """Train on the draws of the lesson or load; noise on the latent makes its neighbourhoods decode."""
    epochs = max(1, round(UPDATES * ROWS / len(lesson.draws)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = Autoencoder(lesson.generator.size)

    def train(folder: Path) -> dict[str, Any]:
        images = lesson.draws.images
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=2e-3, fused=True)
        training = Training(folder, {"autoencoder": autoencoder, "optimizer": optimizer})
        loss = torch.zeros(())
        for epoch in training.remaining(epochs, "autoencoder", progress):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - epoch / epochs)
            noise = torch.Generator().manual_seed(epoch)
            for some in batches(len(images), ROWS, epoch):
                z = autoencoder.encoder(images[some])
                z = z + 0.1 * z.detach().std(0) * torch.randn(z.shape, generator=noise)
                loss = mse_loss(autoencoder.decode(z), images[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            training.save()
        return {"loss": float(loss.detach())}

    trained("autoencoder", {**lesson.described, "epochs": epochs, "seed": lesson.seed}, autoencoder, train)
    return autoencoder


def _check(name: str, y: Tensor, shape: tuple[int, ...], digits: Tensor) -> None:
    if tuple(y.shape) != (len(digits), *shape):
        raise ValueError(f"y of space {name!r} must be {(len(digits), *shape)}: got {tuple(y.shape)}")

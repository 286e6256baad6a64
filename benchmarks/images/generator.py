"""The frozen generator: a conditional adversarial network of perceptrons, stopped while it is still imperfect.

Architecture of Preference Flow Matching (arXiv 2405.19806), image experiment: 100 noise values and an embedding of the
digit, 256, 512 and 1024 units, S x S pixels by tanh, and a second head for the pixels' standard deviation. Training is
that of Goodfellow et al. (2014) with the non-saturating loss. It stops at the first look at which the mean probability
of the right digit by the labelling judge reaches ``quality``: what is to be refined must leave room.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks.images.data import DIGITS, Part, Split, one_hot
from benchmarks.images.stored import Training, trained

__all__ = ["Draws", "Generator", "GeneratorSettings", "load_generator"]

NOISE_SCALE = 0.1  # largest standard deviation of a pixel in [0, 1]


@dataclass(frozen=True)
class GeneratorSettings:
    """Sets the size of the generator and its training.

    widths: of the hidden layers. noise: values of noise. batch: images per update. every: updates between evaluations.
    looks: maximum number of evaluations. steady: evaluations after which the learning rate falls to a fifth. quality:
    mean probability of the right digit at which training stops. judged: draws per evaluation.
    """

    widths: tuple[int, ...] = (256, 512, 1024)
    noise: int = 100
    batch: int = 128
    every: int = 234  # an epoch of the generator's half of MNIST
    looks: int = 40
    steady: int = 10
    quality: float = 0.82
    judged: int = 1000
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Draws:
    """Holds draws of the generator: noise (N, Z), digits (N,), images (N, 1, S, S) in [0, 1]."""

    noise: Tensor
    digits: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: Any) -> Draws:
        return Draws(self.noise[index], self.digits[index], self.images[index])


class Generator(nn.Module):
    """Maps noise (N, Z) and digits as contexts (N, 10) to images (N, 1, S, S) in [0, 1]."""

    def __init__(self, size: int, settings: GeneratorSettings) -> None:
        super().__init__()
        self.size, self.noise = size, settings.noise
        self.embedding = _embedding()
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise((settings.noise + DIGITS, *settings.widths))):
            layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if number else []), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.mean = nn.Linear(settings.widths[-1], size * size)
        self.deviation = nn.Linear(settings.widths[-1], size * size)

    def forward(self, noise: Tensor, context: Tensor, pixel_noise: Tensor | None = None) -> Tensor:
        """Decode noise; ``pixel_noise`` (N, S * S) is what the second head scales, None for the mean image."""
        hidden = self.body(torch.cat([noise, self.embedding(context)], 1))
        pixels = (torch.tanh(self.mean(hidden)) + 1) / 2
        if pixel_noise is not None:
            pixels = pixels + NOISE_SCALE * torch.sigmoid(self.deviation(hidden)) * pixel_noise
        return pixels.clamp(0, 1).view(-1, 1, self.size, self.size)

    @torch.no_grad()
    def decode(self, noise: Tensor, digits: Tensor) -> Tensor:
        """Return the mean images (N, 1, S, S) of noise (N, Z)."""
        rows = [self(z, one_hot(d)) for z, d in zip(noise.split(2048), digits.split(2048), strict=True)]
        return torch.cat(rows)

    @torch.no_grad()
    def draw(self, digits: Tensor, seed: int) -> Draws:
        """Draw one image a digit (N,), pixel noise included."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(digits), self.noise, generator=generator)
        images = []
        for z, d in zip(noise.split(2048), digits.split(2048), strict=True):
            images.append(self(z, one_hot(d), torch.randn(len(d), self.size**2, generator=generator)))
        return Draws(noise, digits, torch.cat(images))


def _embedding() -> nn.Linear:
    """Embed one-hot digits by normal vectors: small ones take epochs to be noticed."""
    embedding = nn.Linear(DIGITS, DIGITS, bias=False)
    nn.init.normal_(embedding.weight)
    return embedding


class _Critic(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = _embedding()
        sizes = (size * size + DIGITS, 512, 256)
        body = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.body = nn.Sequential(*body, nn.Linear(256, 1))

    def forward(self, images: Tensor, context: Tensor) -> Tensor:
        return self.body(torch.cat([2 * images.flatten(1) - 1, self.embedding(context)], 1)).squeeze(1)


def load_generator(
    split: Split, settings: GeneratorSettings, right: Callable[[Tensor, Tensor], Tensor], progress: bool = True
) -> tuple[Generator, dict[str, Any]]:
    """Load the generator from the cache, or train it.

    Args:
        split: the data.
        settings: size and training.
        right: gives the labelling judge's probability (N,) of the digits (N,) on images.
        progress: show a bar.

    Returns:
        the frozen generator, and what its training found: update, quality, and the history of looks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        generator, critic = Generator(split.size, settings), _Critic(split.size)
    described = {"data": split.name, "size": split.size, **asdict(settings)}
    found = trained(
        f"{split.name}-generator", described, generator,
        lambda folder: _train(generator, critic, split.generator, settings, right, folder, progress),
    )  # fmt: skip
    return generator, found


def _train(
    generator: Generator,
    critic: _Critic,
    data: Part,
    settings: GeneratorSettings,
    right: Callable[[Tensor, Tensor], Tensor],
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    rate = {"lr": settings.learning_rate, "betas": (0.5, 0.999), "fused": True}
    ours, theirs = (torch.optim.Adam(module.parameters(), **rate) for module in (generator, critic))
    looks = nn.ParameterDict({"quality": nn.Parameter(torch.zeros(settings.looks), requires_grad=False)})
    training = Training(
        folder, {"generator": generator, "critic": critic, "ours": ours, "theirs": theirs, "looks": looks}
    )
    digits = torch.arange(settings.judged) % DIGITS
    history = looks["quality"]
    for look in training.remaining(settings.looks, "generator", progress):
        if look and float(history[look - 1]) >= settings.quality:
            break
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = settings.learning_rate * (1.0 if look < settings.steady else 0.2)
        _look(generator, critic, ours, theirs, data, settings, look)
        generator.eval()
        history[look] = right(generator.draw(digits, 1).images, digits).mean()
        training.save()
    done = int((history > 0).sum())
    return {
        "updates": done * settings.every,
        "quality": float(history[done - 1]),
        "history": [round(float(v), 4) for v in history[:done]],
    }


def _look(
    generator: Generator, critic: _Critic, ours: Any, theirs: Any, data: Part, settings: GeneratorSettings, look: int
) -> None:
    """Train until the next evaluation; its number seeds all that is random."""
    generator.train()
    random = torch.Generator().manual_seed(7919 * settings.seed + look)
    for _ in range(settings.every):
        some = torch.randint(len(data), (settings.batch,), generator=random)
        real, context = data.images[some], one_hot(data.digits[some])
        noise = torch.randn(settings.batch, settings.noise, generator=random)
        fake = generator(noise, context, torch.randn(settings.batch, generator.size**2, generator=random))
        on_real, on_fake = critic(real, context), critic(fake.detach(), context)
        theirs.zero_grad()
        (bce(on_real, torch.full_like(on_real, 0.9)) + bce(on_fake, torch.zeros_like(on_fake))).backward()
        theirs.step()
        ours.zero_grad()
        judged = critic(fake, context)
        bce(judged, torch.ones_like(judged)).backward()
        ours.step()

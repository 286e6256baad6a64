"""Three classifiers of digits that share neither data nor kind: one labels, one measures, one gives features.

The labelling judge is a LeNet-5 (LeCun et al. 1998) with the weights that come with the paper's code, or, where there
are none, a perceptron. Results are measured by a small residual network (He et al. 2016), trained on the half of the
data that nothing else has seen. Realism and diversity are measured in the last hidden layer of a perceptron on
histograms of oriented gradients (Dalal and Triggs 2005), which has no learned filters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, max_pool2d, pad, relu, unfold

from benchmarks.images.data import DIGITS, Part, Split, check_images, read_npz
from benchmarks.images.stored import Training, batches, trained

__all__ = ["Classifier", "Judges", "load_judges"]

ROWS = 1000  # images of one evaluation
BINS = 9  # of orientations


class Classifier(nn.Module):
    """Gives log-odds (N, 10) of images (N, 1, S, S) in [0, 1]."""

    def right(self, images: Tensor, digits: Tensor) -> Tensor:
        """Return the probability (N,) of the digits (N,)."""
        return self.probabilities(images)[torch.arange(len(digits)), digits]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (N, 10) of all digits."""
        return torch.cat([self(some).softmax(1) for some in images.split(ROWS)])

    def accuracy(self, part: Part) -> float:
        """Return the share of real images that are classified correctly."""
        return float((self.probabilities(part.images).argmax(1) == part.digits).float().mean())


class LeNet(Classifier):
    """Is LeNet-5 with rectified units and maxima, on 28 x 28 images padded by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c3, self.c5 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.f6, self.f7 = nn.Linear(120, 84), nn.Linear(84, DIGITS)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (N, 1, 28, 28)."""
        y = max_pool2d(relu(self.c1(pad(images, (2, 2, 2, 2)))), 2)
        y = max_pool2d(relu(self.c3(y)), 2)
        return self.f7(relu(self.f6(relu(self.c5(y)).flatten(1))))

    @classmethod
    def from_npz(cls, path: Path) -> LeNet:
        """Load the weights of the paper's code.

        Raises:
            MissingDataError: there is no such file. ValueError: it holds other tensors.
        """
        lenet = cls()
        own = {
            name.split("__")[1] + "." + name.split("__")[-1]: v for name, v in read_npz(path).items() if "__" in name
        }
        try:
            lenet.load_state_dict({name: torch.as_tensor(value) for name, value in own.items()})
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of this LeNet: {error}") from error
        return lenet


class Perceptron(Classifier):
    """A perceptron of the pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 128), nn.ReLU(), nn.Linear(128, DIGITS))

    def forward(self, images: Tensor) -> Tensor:
        """Classify (N, 1, S, S)."""
        return self.body(images)


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and channels == out
        self.past = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return relu(self.past(y) + self.two(relu(self.one(y))))


class ResNet(Classifier):
    """A residual network of three stages; images of 28 pixels are halved at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        stride = 2 if size > 16 else 1
        enter = nn.Sequential(nn.Conv2d(1, 24, 5, stride, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.body = nn.Sequential(enter, _Block(24, 24, 1), _Block(24, 48, 2), _Block(48, 64, 2))
        self.leave = nn.Linear(64, DIGITS)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (N, 1, S, S)."""
        return self.leave(self.body(images).mean((2, 3)))


class Gradients(Classifier):
    """A perceptron of histograms of oriented gradients: cells of S / 7 or S / 4 pixels, blocks of 2 x 2 cells."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cell = 4 if size > 16 else 2
        blocks = size // self.cell - 1
        self.enter = nn.Sequential(nn.Linear(4 * BINS * blocks**2, 256), nn.ReLU(), nn.Linear(256, 64))
        self.leave = nn.Linear(64, DIGITS)

    def histograms(self, images: Tensor) -> Tensor:
        """Return the normalised histograms (N, F) of images."""
        kernel = images.new_tensor([[-0.5, 0, 0.5]]).view(1, 1, 1, 3)
        across = conv2d(pad(images, (1, 1, 0, 0)), kernel)
        down = conv2d(pad(images, (0, 0, 1, 1)), kernel.mT)
        angle = torch.atan2(down, across) * BINS / torch.pi % BINS  # of the line: opposite gradients are alike
        centres = torch.arange(BINS, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
        away = (angle - centres).abs()
        share = (1 - torch.minimum(away, BINS - away)).clamp_min(0)
        cells = avg_pool2d(share * torch.hypot(across, down), self.cell)
        blocks = unfold(cells, 2)  # (N, 4 * BINS, blocks)
        return (blocks / (blocks.square().sum(1, keepdim=True) + 1e-3).sqrt()).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer (N, 64)."""
        with torch.no_grad():
            return torch.cat([self.enter(self.histograms(some)) for some in images.split(ROWS)])

    def forward(self, images: Tensor) -> Tensor:
        """Classify (N, 1, S, S)."""
        return self.leave(relu(self.enter(self.histograms(images))))


class Judges:
    """Holds the judge that labels, the one that measures, and the network whose features measure realism."""

    def __init__(self, labelling: Classifier, independent: ResNet, features: Gradients, split: Split) -> None:
        self.labelling, self.independent, self.third = labelling, independent, features
        self.size = split.size
        self.accuracies = {
            name: judge.accuracy(split.test)
            for name, judge in (("labelling", labelling), ("independent", independent), ("third", features))
        }

    def check(self, name: str, images: Tensor) -> Tensor:
        """Return images that the judges can read; see :func:`benchmarks.images.data.check_images`."""
        return check_images(name, images, self.size)


def load_judges(split: Split, *, epochs: int = 8, seed: int = 0, progress: bool = True) -> Judges:
    """Load the judges from the cache, or train them: the independent one on its own half of the data."""
    kinds: dict[str, tuple[Callable[[int], Classifier], Part]] = {
        "independent": (ResNet, split.judge), "third": (Gradients, split.generator),
        "labelling": (Perceptron, split.generator),
    }  # fmt: skip
    if split.lenet is not None:
        del kinds["labelling"]
    made: dict[str, Any] = {}
    for name, (build, part) in kinds.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made[name] = judge = build(split.size)
        trained(
            f"{split.name}-{name}",
            {"data": split.name, "judge": type(judge).__name__, "epochs": epochs, "seed": seed},
            judge,
            lambda folder, judge=judge, part=part, name=name: _train(judge, part, epochs, seed, folder, name, progress),
        )
    if split.lenet is not None:
        made["labelling"] = LeNet.from_npz(split.lenet).eval().requires_grad_(False)
    return Judges(made["labelling"], made["independent"], made["third"], split)


def _train(
    judge: Classifier, part: Part, epochs: int, seed: int, folder: Path, name: str, progress: bool
) -> dict[str, Any]:
    """Train by Adam with a rate that falls linearly, on images moved by up to a twelfth of their side."""
    size = min(128, max(32, len(part) // 20))
    reach = part.images.shape[-1] // 12
    updates = epochs * (len(part) // size)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3, fused=True)
    training = Training(folder, {"judge": judge, "optimizer": optimizer})
    judge.train().requires_grad_(True)
    loss = torch.zeros(())
    for epoch in training.remaining(epochs, f"{name} judge", progress):
        moves = torch.Generator().manual_seed(104_729 * seed + epoch)
        for number, some in enumerate(batches(len(part), size, 31 * seed + epoch)):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - (epoch * (len(part) // size) + number) / updates)
            right, down = (torch.randint(-reach, reach + 1, (1,), generator=moves).item() for _ in range(2))
            images = torch.roll(part.images[some], (int(down), int(right)), (2, 3))
            loss = cross_entropy(judge(images), part.digits[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        training.save()
    return {"loss": float(loss.detach())}

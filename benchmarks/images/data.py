"""Images of digits, cut into parts that generators, judges and tests do not share."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.core.data import MissingDataError, data_folder

__all__ = ["DIGITS", "Part", "Split", "check_images", "load_images", "one_hot"]

DIGITS = 10
LENET = "pfm_classifier_weights.npz"


@dataclass(frozen=True)
class Part:
    """Holds images (N, 1, S, S) in [0, 1] and the digits (N,) on them."""

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.digits)


@dataclass(frozen=True)
class Split:
    """Holds a data set in three parts: for the generator, for the judge, and for tests.

    Attributes:
        name: "mnist" or "digits". size: S, the side of an image.
        generator: also what the features of realism and diversity are trained on.
        judge: what the independent judge is trained on, and nothing else.
        test: real images that nothing is trained on.
        lenet: file of the labelling judge's weights; None where it is trained on the generator's part.
    """

    name: str
    size: int
    generator: Part
    judge: Part
    test: Part
    lenet: Path | None


def load_images(name: str) -> Split:
    """Load "mnist" from the folder of the benchmarks' data, or "digits" from scikit-learn.

    Raises:
        MissingDataError: the files are absent. ValueError: they are damaged, or hold other images; another name.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        whole = Part(
            check_images("digits", torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, 8),
            torch.tensor(labels, dtype=torch.long),
        )
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
        first, second, test = (Part(whole.images[i], whole.digits[i]) for i in order.tensor_split([900, 1500]))
        return Split(name, 8, first, second, test, None)
    if name != "mnist":
        raise ValueError(f"data must be 'mnist' or 'digits': got {name!r}")
    folder = data_folder("mnist")
    train, test = (_read(folder / f"mnist_{part}.npz", 28) for part in ("train", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    first, second = (Part(train.images[i], train.digits[i]) for i in order.chunk(2))
    return Split(name, 28, first, second, test, folder / LENET)


def _read(path: Path, size: int) -> Part:
    arrays = read_npz(path)
    if not {"images", "labels"} <= arrays.keys():
        raise ValueError(f"{path} must hold images and labels: got {', '.join(sorted(arrays)) or 'nothing'}")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8:
        raise ValueError(f"{path} must hold images of type uint8, 0 to 255: got {images.dtype}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(f"{path} must hold one whole label from 0 to 9 an image: got {labels.dtype} {labels.shape}")
    pixels = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
    return Part(check_images(path.name, pixels, size), torch.from_numpy(labels.astype(np.int64)))


def read_npz(path: Path) -> dict[str, Any]:
    """Read the arrays of an npz file; no pickled objects.

    Raises:
        MissingDataError: there is no such file. ValueError: it is damaged.
    """
    if not path.is_file():
        raise MissingDataError(f"no benchmark data at {path}: the file is missing from its folder")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged or no npz file of arrays ({error}): copy it again") from error


def check_images(name: str, images: Tensor, size: int) -> Tensor:
    """Return images if they are (N, 1, size, size) with values in [0, 1].

    Raises:
        TypeError: no float tensor. ValueError: none, another shape or range, or values that are not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a float tensor of images in [0, 1]: got {kind}; bytes are divided by 255")
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, size, size) or len(images) == 0:
        raise ValueError(
            f"{name} must be (N, 1, {size}, {size}) with N >= 1: got {tuple(images.shape)}; resize images to "
            f"{size} x {size} and give grey values one channel"
        )
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} must be finite: some pixels are NaN or infinite")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must lie in [0, 1]: got {low:.3g} to {high:.3g}; divide bytes by 255, map tanh by (y + 1) / 2"
        )
    return images


def one_hot(digits: Tensor) -> Tensor:
    """Return contexts (N, 10) of digits (N,)."""
    return torch.nn.functional.one_hot(digits, DIGITS).float()

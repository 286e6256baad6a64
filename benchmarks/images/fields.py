"""A small U-Net as a flow's field, registered as a user would register one of his own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

import pfm

__all__ = ["UNet"]


class _Block(nn.Module):
    """Adds two convolutions, with time and digit between them, to its input."""

    def __init__(self, channels: int, given: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        self.given = nn.Linear(given, 2 * channels)

    def forward(self, y: Tensor, given: Tensor) -> Tensor:
        scale, shift = self.given(given)[:, :, None, None].chunk(2, 1)
        return y + self.two(silu(self.one(silu(y)) * (1 + scale) + shift))


@pfm.register_field("images-unet")
class UNet(nn.Module):
    """Gives velocities of images (B, 1, S, S), S even, at two scales.

    Images of 28 pixels are cut into patches of 2 x 2 first (14 x 14 positions of 4 channels), which costs a quarter.
    Time enters by sines and cosines, with the context, between the convolutions of every block.

    Args:
        event_shape: (1, S, S). context_dimension: C. width: channels at the finer scale.
    """

    def __init__(self, event_shape: Sequence[int], context_dimension: int, *, width: int = 16) -> None:
        super().__init__()
        if len(event_shape) != 3 or event_shape[1] != event_shape[2] or event_shape[1] % 4:
            raise ValueError(f"images-unet takes square images (C, S, S), S a multiple of 4: got {tuple(event_shape)}")
        self.patch = 2 if event_shape[1] > 16 else 1
        channels = event_shape[0] * self.patch**2
        given = 4 * width
        self.given = nn.Sequential(
            nn.Linear(9 + context_dimension, given), nn.SiLU(), nn.Linear(given, given), nn.SiLU()
        )
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.fine = _Block(width, given)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList([_Block(2 * width, given) for _ in range(2)])
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = _Block(width, given)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """Return velocities (B, C, S, S) at times t (B,) and contexts (B, K) or None."""
        angles = torch.pi * t[:, None] * 2 ** torch.arange(4, dtype=y.dtype, device=y.device)
        parts = [t[:, None], angles.sin(), angles.cos(), *([] if context is None else [context])]
        given = self.given(torch.cat(parts, 1))
        fine = self.fine(self.enter(pixel_unshuffle(y, self.patch)), given)
        coarse = self.down(fine)
        for block in self.coarse:
            coarse = block(coarse, given)
        return pixel_shuffle(self.leave(silu(self.merge(fine + self.up(coarse), given))), self.patch)

"""Conditional flow matching: paths between coupled samples, and the loss of a field on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pfm.flow.couplings import Coupled
from pfm.flow.fields import Field, Normalizer

__all__ = ["FlowProblem", "Rows", "flow_matching_loss", "path_sample"]

STRATA = 8  # times an update where a matrix a row would be too large
LARGE = 4096  # entries of the linear part's matrix from which it is


def flow_matching_loss(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean square error of velocities.

    Args:
        predicted: (..., D). target: the same shape - broadcasting would silently average over other samples.
        weight: (...) or None.

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target must have equal shapes: got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    square = (predicted - target).square().mean(-1)
    if weight is None:
        return square.mean()
    if weight.shape != square.shape:
        raise ValueError(f"weight must be {tuple(square.shape)}: got {tuple(weight.shape)}")
    return (square * weight).mean()


def path_sample(source: Tensor, target: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return y_t and dy_t/dt of y_t = (1 - t) source + t target + sin(pi t) noise, for (B, D) tensors and t (B, 1)."""
    y = torch.lerp(source, target, t).addcmul_(torch.sin(math.pi * t), noise)
    return y, (target - source).addcmul_(math.pi * torch.cos(math.pi * t), noise)


@dataclass(frozen=True)
class Rows:
    """Holds training rows in normalised coordinates, in the order that :meth:`ResidualField.forward` takes.

    times (S,), y (B, D), context (B / repeats, C) or None, and the residual's target (B, D), in its unit.
    """

    times: Tensor
    y: Tensor
    context: Tensor | None
    target: Tensor
    repeats: int

    def each(self) -> tuple[Tensor, Tensor | None]:
        """Return every row's time (B,) and context (B, C)."""
        times = self.times.repeat_interleave(len(self.y) // (len(self.times) * self.repeats)).repeat(self.repeats)
        return times, None if self.context is None else self.context.repeat(self.repeats, 1)


class FlowProblem:
    """Makes training rows: inputs y_t, context, times, and what the linear part leaves of the velocity.

    With ``one_step`` all times are 0 and there is no noise: the problem of a field whose single Euler step goes from
    source to target.
    """

    def __init__(self, model: Field, normalizer: Normalizer, sigma: float, *, one_step: bool = False) -> None:
        self.model = model
        self.normalizer = normalizer
        self.sigma = 0.0 if one_step else sigma
        self.one_step = one_step
        # A matrix a row where they are small, one for many rows at the same time where they are not.
        _, inputs, outputs = model.linear.matrices.shape
        self.stratified = one_step or inputs * outputs > LARGE
        self._at_times: tuple[Tensor, ...] = ()

    def strata(self, items: int) -> int:
        """Return the number of different times of an update of so many items, a divisor of it."""
        if self.one_step:
            return 1
        if not self.stratified:
            return items
        return STRATA if items >= 16 * STRATA and items % STRATA == 0 else math.gcd(items, STRATA // 2)

    def times(self, items: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw stratified uniform times (S,) for ``items`` items.

        S divides the number of items, so that all rows of one item - which may go together, as the zero and the
        full displacement of a pair do - are at one time, and no kind of row is at early or late times only.
        """
        count = self.strata(items)
        if self.one_step:
            return torch.zeros(1, dtype=torch.float32, device=device)
        uniform = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
        return ((torch.arange(count, device="cpu") + uniform) / count).to(device, non_blocking=True)

    def at(self, times: Tensor) -> None:
        """Set the times (S,) of the batches that follow; what depends on them alone is computed here."""
        linear = self.model.linear
        parts = (times, *linear.operator(times)) if self.stratified and linear.present else (times,)
        if times.device.type != "cpu" and [part.shape for part in parts] == [part.shape for part in self._at_times]:
            for mine, new in zip(self._at_times, parts, strict=True):  # the memory that a recorded update reads
                mine.copy_(new)
        else:
            self._at_times = parts

    def noise(self, batch: Coupled, generator: torch.Generator) -> Tensor | None:
        """Draw the standard normal numbers of a batch's paths, on its device; None for paths without noise."""
        if not self.sigma:
            return None
        shape, where = batch.source.shape, generator.device
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=where).to(batch.source.device)

    @torch.no_grad()
    def rows(self, batch: Coupled, noise: Tensor | None) -> Rows:
        """Place a batch at the times of :meth:`at`, with the noise of :meth:`noise`."""
        repeats, times = batch.repeats, self._at_times[0]
        t = times.repeat_interleave(len(batch.source) // (len(times) * repeats)).repeat(repeats)[:, None]
        if noise is not None:
            noise.mul_(self.sigma * self.normalizer.displacement * self.normalizer.scale)
            y, velocity = path_sample(batch.source, batch.target, t, noise)
        else:
            y, velocity = torch.lerp(batch.source, batch.target, t), batch.target - batch.source
        y = self.normalizer(y)
        context = self.normalizer.context(batch.context)
        left = velocity.div_(self.normalizer.scale).sub_(self._linear(times, y, context, repeats))
        return Rows(times, y, context, left.div_(self.model.unit), repeats)

    def _linear(self, times: Tensor, y: Tensor, context: Tensor | None, repeats: int) -> Tensor:
        if not self.stratified or not self.model.linear.present:
            each, of_each = Rows(times, y, context, y, repeats).each()
            return self.model.linear(each, y, of_each)
        _, slope, offset = self._at_times
        d = y.shape[1]
        offset = offset[:, None, :]
        if context is not None:
            offset = torch.baddbmm(offset, context.view(len(times), -1, context.shape[1]), slope[:, d:])
        blocks = y.view(repeats, len(times), -1, d)
        return torch.cat([torch.baddbmm(offset, block, slope[:, :d]) for block in blocks]).view_as(y)

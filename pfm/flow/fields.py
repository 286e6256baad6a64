"""Vector fields: a closed-form linear part and a learned residual.

Every field has one signature, ``field(t, y, context)`` with t (B,) or a scalar in [0, 1], y (B, D) and context
(B, C) or None, in the normalised coordinates of :class:`Normalizer`, and gives the velocity (B, D).
``field.at(context)`` fixes the contexts for many evaluations and does their share of the work once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfm._internal.columns import ROUNDING, column_statistics, weighted_mean
from pfm.flow.couplings import Coupled
from pfm.flow.cuda_graphs import keep_alive
from pfm.flow.registered_field import RegisteredField

__all__ = ["Field", "LinearField", "Moments", "Normalizer", "ResidualField", "Velocity"]

Velocity = Callable[[float, Tensor], Tensor]
"""The velocity at a scalar time, contexts fixed: (t, y (B, D)) -> (B, D)."""

SMALL = 64  # dimensions up to which a problem is small: narrow networks, many features of time
TIME_NODES = 12  # Chebyshev: v of independent equal Gaussians has poles at t = (1 +- i)/2, so errors fall as 2.4**-n
FOURIER_FEATURES = 8  # up to 64 dimensions; beyond, half: there they cost steps of the solver and gain next to nothing
CONTEXT_ENERGY = 1e-6  # of the contexts' matrices over time that may be left out
REMEMBERED = 32  # times whose part of a field is kept
EXACT = 1e-12  # the same, of matrices from which it was left out: rounding


class Normalizer(nn.Module):
    """Maps outputs and contexts to zero mean and unit scale a dimension, and back.

    ``displacement`` (D,) is the root mean square of chosen - rejected a dimension, in normalised units: the
    unit of the path noise sigma and of the residual field.
    """

    def __init__(self, dimension: int, context_dimension: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.context_mean: Tensor
        self.context_scale: Tensor
        self.displacement: Tensor
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.register_buffer("context_mean", torch.zeros(context_dimension))
        self.register_buffer("context_scale", torch.ones(context_dimension))
        self.register_buffer("displacement", torch.ones(dimension))

    @torch.no_grad()
    def fit(self, chosen: Tensor, rejected: Tensor, context: Tensor | None, weight: Tensor | None = None) -> None:
        """Set the statistics from pairs on any device.

        Args:
            chosen, rejected: (N, D). context: (N, C) or None.
            weight: (N,) weights > 0 of the pairs, or None for 1.
        """
        chosen, rejected = (part.to(self.mean.device).double() for part in (chosen, rejected))
        weight = None if weight is None else weight.to(self.mean.device)
        both = torch.cat([chosen, rejected])
        mean, spread = column_statistics(both, None if weight is None else weight.repeat(2))
        self.mean.copy_(mean)
        self.scale.copy_(_replaced(spread))
        if context is not None:
            mean, spread = column_statistics(context.to(self.mean.device), weight)
            self.context_mean.copy_(mean)
            self.context_scale.copy_(_replaced(spread))
        difference = (chosen - rejected) / self.scale
        # Two outputs that are equal but for rounding are not displaced: noise of that size would be no noise.
        least = 8 * ROUNDING * (1 + both.abs().amax(0) / self.scale)
        moved = weighted_mean(difference.square(), None if weight is None else weight.double()).sqrt()
        self.displacement.copy_(_replaced(torch.where(moved > least, moved, torch.inf)))

    def forward(self, y: Tensor) -> Tensor:
        """Normalise outputs, (..., D)."""
        return (y - self.mean) / self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """Undo :meth:`forward`, (..., D)."""
        return y * self.scale + self.mean

    def context(self, context: Tensor | None) -> Tensor | None:
        """Normalise contexts, (..., C)."""
        return None if context is None else (context - self.context_mean) / self.context_scale


def _replaced(scale: Tensor) -> Tensor:
    """Replace the infinite scales (D,) of constant dimensions by the largest scale of the others, or 1."""
    varies = scale.isfinite()
    largest = float(torch.where(varies, scale, 0).max()) or 1.0
    return torch.where(varies, scale, largest)


@dataclass
class Moments:
    """Holds first and second moments of z = (source, target, context, 1), normalised, weighted.

    ``gram`` is E[z z'] as a (2D + C + 1) square matrix in float64; ``noise`` (D,) is the variance of the path's noise
    at its height, t = 1/2; at t it is sin(pi t)^2 of that. Both are on the normaliser's device.
    """

    gram: Tensor
    noise: Tensor
    dimension: int

    @classmethod
    def of(cls, batches: Iterable[Coupled], normalizer: Normalizer, noise: Tensor) -> Moments:
        """Accumulate the moments over coupled samples, in float64."""
        gram: Tensor | None = None
        total: Tensor | None = None
        dimension, device = normalizer.mean.shape[0], normalizer.mean.device
        for batch in (batch.to(device) for batch in batches):
            parts = [normalizer(batch.source), normalizer(batch.target)]
            context = normalizer.context(batch.row_context())
            if context is not None:
                parts.append(context)
            z = torch.cat([*parts, torch.ones(len(parts[0]), 1, dtype=torch.float32, device=device)], dim=1)
            part, weight = (z.T @ (z * batch.weight[:, None])).double(), batch.weight.sum().double()
            gram = part if gram is None else gram.add_(part)
            total = weight if total is None else total + weight
        if gram is None or total is None or float(total) <= 0:
            raise ValueError("no coupled samples with positive weight to take moments of")
        return cls(gram / total, noise.double(), dimension)

    def at(self, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the moments of (y_t, context) and of dy_t/dt at time t.

        Returns:
            covariance (D + C, D + C) of the inputs, their mean (D + C,), cross-covariance (D + C, D) with the
            velocity, and the velocity's mean (D,).
        """
        d = self.dimension

        def mixed(moments: Tensor) -> Tensor:
            """Return the moments of (y_t, context) in place of (source, target, context), along the rows."""
            return torch.cat([torch.lerp(moments[:d], moments[d : 2 * d], t), moments[2 * d :]])

        mean = self.gram[:-1, -1]
        centred = self.gram[:-1, :-1] - mean[:, None] * mean[None, :]
        inputs = mixed(centred)
        covariance = mixed(inputs.T)
        height, slope = math.sin(math.pi * t), math.pi * math.cos(math.pi * t)
        covariance.diagonal()[:d].add_(self.noise * height**2)
        cross = inputs[:, d : 2 * d] - inputs[:, :d]
        cross.diagonal().add_(self.noise * height * slope)
        return covariance, mixed(mean), cross, mean[d : 2 * d] - mean[:d]

    def best_ridge(
        self,
        ridges: Sequence[float],
        judged: Moments,
        unit: Tensor,
        times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    ) -> float:
        """Return the ridge whose linear predictions err least under the moments ``judged`` of held-out prompts.

        The expected square error of a linear prediction is itself a function of moments: no sample is drawn.
        ``unit`` (D,) weighs the dimensions by 1 / unit^2.
        """
        share = unit.to(self.gram.device).double().square().reciprocal()
        error = dict.fromkeys(ridges, 0.0)
        for t in times:
            covariance, mean, cross, shift = self.at(t)
            held_covariance, held_mean, held_cross, held_shift = judged.at(t)
            values, vectors = torch.linalg.eigh(covariance)
            turned = vectors.T @ cross
            # In the eigenvectors' coordinates a ridge scales the rows of the slope, so that products of whole
            # matrices are made once for all ridges.
            weighted = turned * share
            linear = ((vectors.T @ held_cross) * weighted).sum(1)
            quadratic = (vectors.T @ held_covariance @ vectors).mul_(weighted @ turned.T)
            offset, moved = held_shift - shift, (held_mean - mean) @ vectors
            for ridge in ridges:
                kept = (values.clamp_min(0) + ridge + 1e-9 * float(values.mean())).reciprocal()
                bias = offset - (moved * kept) @ turned
                spread = kept @ quadratic @ kept - 2 * linear @ kept
                error[ridge] += float(spread + (bias.square() * share).sum())
        return min(ridges, key=lambda ridge: error[ridge])


class LinearField(nn.Module):
    """Gives the best linear prediction of target - source from (1, y_t, context), for each t in closed form.

    It needs first and second moments only, is exact when source, target and context are jointly Gaussian, and
    contains the mean shift E[target - source]. It is solved at Chebyshev times and interpolated between them.
    ``present=False`` is zero everywhere and holds no matrices.
    """

    def __init__(self, dimension: int, context_dimension: int, present: bool = True) -> None:
        super().__init__()
        self.present = present
        nodes = TIME_NODES if present else 0
        angles = torch.arange(nodes, dtype=torch.float64) * math.pi / (TIME_NODES - 1)
        signs = torch.ones(nodes, dtype=torch.float64)
        signs[1::2] = -1
        signs[:1] *= 0.5
        signs[-1:] *= 0.5
        self.matrices: Tensor
        self.shifts: Tensor
        self._nodes: Tensor
        self._signs: Tensor
        self.register_buffer("matrices", torch.zeros(nodes, dimension + context_dimension, dimension))
        self.register_buffer("shifts", torch.zeros(nodes, dimension))
        self.register_buffer("_nodes", (1 - torch.cos(angles)) / 2, persistent=False)
        self.register_buffer("_signs", signs, persistent=False)
        self._dimension = dimension
        self._at: dict[float, tuple[Tensor, Tensor, Tensor]] = {}
        self._parts: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(self._forget)

    @torch.no_grad()
    def fit(self, moments: Moments, ridge: float, *, at_start: bool = False) -> None:
        """Solve at every node; ``ridge`` >= 0 in units of the normalised variance, infinity for no slope.

        ``at_start`` takes the solution at t = 0 for all times, as a field of one Euler step needs it.
        """
        self._forget()
        for node, t in enumerate(self._nodes.tolist()):
            if at_start and node > 0:
                self.matrices[node].copy_(self.matrices[0])
                self.shifts[node].copy_(self.shifts[0])
                continue
            covariance, mean, cross, shift = moments.at(t)
            if math.isinf(ridge):
                slope = torch.zeros_like(cross)
            else:
                # The relative jitter keeps the factorisation alive when outputs are exact copies of each other.
                jitter = ridge + 1e-9 * float(covariance.diagonal().mean())
                covariance.diagonal().add_(jitter)
                factor, failed = torch.linalg.cholesky_ex(covariance)
                while int(failed):
                    covariance.diagonal().add_(jitter)
                    jitter *= 2
                    factor, failed = torch.linalg.cholesky_ex(covariance)
                slope = torch.cholesky_solve(cross, factor)
            self.matrices[node].copy_(slope)
            self.shifts[node].copy_(shift - mean @ slope)
        axes, parts = self._over_time(CONTEXT_ENERGY)
        self.matrices[:, self._dimension :] = torch.einsum("nr,rcd->ncd", axes, parts)

    @torch.no_grad()
    def _over_time(self, energy: float) -> tuple[Tensor, Tensor]:
        """Write the contexts' matrices at the nodes as few matrices (r, C, D) with weights (nodes, r).

        They change slowly with time, so that a few principal components over the nodes hold all but a share
        ``energy`` of their squares.
        """
        whole = self.matrices[:, self._dimension :].flatten(1).double()
        values, vectors = torch.linalg.eigh(whole @ whole.T)
        left = values.clamp_min(0).cumsum(0)
        axes = vectors[:, left > energy * left[-1]]
        shape = axes.shape[1], self.matrices.shape[1] - self._dimension, self._dimension
        return axes.to(self.matrices.dtype), (axes.T @ whole).to(self.matrices.dtype).view(shape)

    def weights(self, t: Tensor) -> Tensor:
        """Return the interpolation weights of the nodes at times t (S,): (S, nodes)."""
        gaps = t.double()[:, None] - self._nodes
        exact = gaps.abs() < 1e-12
        raw = self._signs / torch.where(exact, 1.0, gaps)
        raw = torch.where(exact.any(1, keepdim=True), exact.double(), raw)
        return (raw / raw.sum(1, keepdim=True)).to(self.matrices.dtype)

    def operator(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope (S, D + C, D) and offset (S, D) at times t (S,)."""
        weights = self.weights(t)
        slope = (weights @ self.matrices.flatten(1)).unflatten(1, self.matrices.shape[1:])
        return slope, weights @ self.shifts

    def _operator_at(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return slope (D, D), offset (D,) and the nodes' weights (nodes,) at one time; the last few are remembered."""
        found = self._at.get(t)
        if found is None:
            device, d = self.matrices.device, self._dimension
            with torch.autocast(device.type, enabled=False):  # it is used outside of an autocast as well
                # Filled on the device: a tensor of Python numbers would be copied there, which waits for it.
                weights = self.weights(torch.full((1,), t, dtype=torch.float32, device=device))
                slope = (weights @ self.matrices[:, :d].flatten(1)).view(d, d)
                found = (slope, (weights @ self.shifts)[0], weights[0])
            if len(self._at) >= REMEMBERED:
                self._at.clear()
            self._at[t] = found
        return keep_alive(found)

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """Evaluate at t (B,) or scalar, y (B, D), context (B, C) or None."""
        if not self.present:
            return torch.zeros_like(y)
        if t.ndim == 0:
            return self.at(context)(float(t), y)
        inputs = y if context is None else torch.cat([y, context], dim=-1)
        weights = self.weights(t)
        everywhere = (inputs @ self.matrices.permute(1, 0, 2).flatten(1)).unflatten(1, (-1, self._dimension))
        return (weights[:, None, :] @ (everywhere + self.shifts)).squeeze(1)

    def at(self, context: Tensor | None) -> Velocity:
        """Fix the contexts (B, C): their products with the matrices are computed here, once."""
        if not self.present:
            return lambda t, y: torch.zeros_like(y)
        axes, fixed = None, self.shifts
        if context is not None:
            if self._parts is None:
                self._parts = self._over_time(EXACT)
            axes, parts = self._parts
            fixed = (context @ parts).flatten(1)

        def velocity(t: float, y: Tensor) -> Tensor:
            slope, offset, weights = self._operator_at(t)
            if axes is not None:
                offset = torch.addmv(offset.expand(len(y), -1).flatten(), fixed.T, weights @ axes).view_as(y)
            return torch.addmm(offset, y, slope)

        return velocity

    def upgraded(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Leave out the zeros that earlier versions saved for an absent part."""
        zeros = () if self.present else (f"{prefix}matrices", f"{prefix}shifts")
        return tensors | {name: tensors[name][:0] for name in zeros if name in tensors}

    def _forget(self, *_: object) -> None:
        self._at.clear()
        self._parts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearField:
        self._forget()
        return super()._apply(fn, recurse)


class ResidualField(nn.Module):
    """A multilayer perceptron with SiLU activations and Fourier features of time.

    The first layer's products with output, time and context are kept apart, so that the context's is computed
    once for a whole integration. The last layer starts at zero: an untrained residual changes nothing.
    """

    def __init__(self, dimension: int, context_dimension: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.from_output = nn.Linear(dimension, hidden)
        features = FOURIER_FEATURES if dimension <= SMALL else FOURIER_FEATURES // 2
        self.from_time = nn.Linear(1 + 2 * features, hidden, bias=False)
        self.from_context = nn.Linear(context_dimension, hidden, bias=False) if context_dimension else None
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, dimension)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self._at: dict[tuple[float, int, torch.dtype], Tensor] = {}
        self._frequencies: Tensor
        self.register_buffer(
            "_frequencies",
            math.pi * torch.arange(1, features + 1, dtype=torch.float32),
            persistent=False,
        )

    @property
    def multiply_adds(self) -> int:
        """Return the multiplications of one row's evaluation."""
        return sum(p.numel() for p in self.parameters())

    def time_features(self, t: Tensor) -> Tensor:
        """Expand times (...) to (..., 1 + 2F)."""
        angles = t[..., None].float() * self._frequencies
        return torch.cat([t[..., None].float() * 2 - 1, angles.sin(), angles.cos()], dim=-1)

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None, repeats: int = 1) -> Tensor:
        """Evaluate at t (B,) or scalar, y (B, D), context (B, C) or None.

        The rows may be r = ``repeats`` blocks with equal times and contexts, and rows of a block that follow each
        other may share a time: then t is (S,), row i of a block of n at time i S / n, and context (B / r, C).
        """
        first = self.from_output(y)
        extra = self.from_time(self.time_features(t).to(y.dtype))
        if t.ndim:
            extra = extra[:, None]
            first = first.view(repeats, len(t), -1, first.shape[-1])
        if self.from_context is not None and context is not None:
            fixed = self.from_context(context)
            extra = (fixed.view(len(t), -1, fixed.shape[-1]) if t.ndim else fixed) + extra
        return self._rest((first + extra).view(len(y), -1))

    def at(self, context: Tensor | None) -> Velocity:
        """Fix the contexts (B, C): their product with the first layer is computed here, once."""
        fixed: Tensor | None = None
        if self.from_context is not None and context is not None:
            fixed = self.from_context(context) + self.from_output.bias

        def velocity(t: float, y: Tensor) -> Tensor:
            time = self._from_time_at(t, y.dtype)
            if fixed is None:
                first = torch.addmm(self.from_output.bias + time, y, self.from_output.weight.T)
            else:
                first = torch.addmm(fixed + time, y, self.from_output.weight.T)
            return self._rest(first)

        return velocity

    def _from_time_at(self, t: float, dtype: torch.dtype) -> Tensor:
        """Return the first layer's product with one time (hidden,); the last few are remembered."""
        weight = self.from_time.weight
        key = t, weight._version, dtype
        found = self._at.get(key)
        if found is None:
            at = torch.full((), t, dtype=torch.float32, device=weight.device)
            found = self.from_time(self.time_features(at).to(dtype))
            if found.requires_grad or torch.is_autocast_enabled(weight.device.type):
                return found
            if len(self._at) >= REMEMBERED:
                self._at.clear()
            self._at[key] = found
        return keep_alive(found)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualField:
        self._at.clear()
        return super()._apply(fn, recurse)

    def _rest(self, first: Tensor) -> Tensor:
        value = nn.functional.silu(first, inplace=not torch.is_grad_enabled())
        for layer in self.hidden:
            value = nn.functional.silu(layer(value), inplace=not torch.is_grad_enabled())
        return self.last(value)


class Field(nn.Module):
    """Adds the residual, in units of the displacement and shrunk by ``gain`` in [0, 1], to the linear part.

    Args:
        dimension, context_dimension: D and C.
        hidden, layers: of the built-in network.
        residual: a field of the user's own, in place of the built-in network.
        linear: whether there is a linear part.
    """

    def __init__(
        self,
        dimension: int,
        context_dimension: int,
        hidden: int,
        layers: int,
        *,
        residual: RegisteredField | None = None,
        linear: bool = True,
    ) -> None:
        super().__init__()
        self.linear = LinearField(dimension, context_dimension, linear)
        self.residual: ResidualField | RegisteredField | None = (
            ResidualField(dimension, context_dimension, hidden, layers) if residual is None else residual
        )
        self.unit: Tensor
        self.gain: Tensor
        self.register_buffer("unit", torch.ones(dimension))
        self.register_buffer("gain", torch.zeros(()))

    def drop_residual(self) -> None:
        """Leave the residual out for good: held-out prompts did not confirm it."""
        self.residual = None
        self.gain.zero_()

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity at t (B,) or scalar, y (B, D), context (B, C) or None."""
        velocity = self.linear(t, y, context)
        if self.residual is not None:
            velocity = velocity + self.residual(t, y, context) * (self.unit * self.gain)
        return velocity

    def at(self, context: Tensor | None) -> Velocity:
        """Fix the contexts (B, C) for many evaluations at scalar times."""
        linear = self.linear.at(context)
        if self.residual is None:
            return linear
        residual = self.residual.at(context)
        unit = self.unit * self.gain

        def velocity(t: float, y: Tensor) -> Tensor:
            return torch.addcmul(linear(t, y), residual(t, y), unit)

        return velocity

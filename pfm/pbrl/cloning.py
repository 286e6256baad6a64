"""Behaviour cloning: a small network that predicts a whole segment of actions from one observation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from pfm._internal.archive import load_module
from pfm._internal.networks import Perceptron, train_epochs
from pfm.pbrl.networks import load_network, save_network

__all__ = ["ClonedPolicy"]

KIND = "pfm.pbrl.ClonedPolicy"

FLOOR = 1e-3  # least standard deviation, in half ranges of the action: what is deterministic keeps a density


class ClonedPolicy(nn.Module):
    """A Gaussian distribution of action segments (H, A) given an observation (O,).

    The mean is a network of the observation; the standard deviation is one number a step and action, the same for all
    observations. It needs no simulator, so it proposes segments offline; with H = 1 it is an ordinary policy. It is a
    torch module: its ``log_prob`` has gradients, for fine-tuning on preferences.

    Made by :meth:`fit` or :meth:`load`.

    Attributes:
        horizon: H.
        action_space: the bounds to which proposals are clipped.
        log_std: (H, A) parameter, in half ranges of the action.
    """

    def __init__(
        self,
        observation_size: int,
        horizon: int,
        action_space: Box,
        *,
        hidden: int = 128,
        layers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.middle: Tensor
        self.reach: Tensor
        self.horizon = horizon
        self.action_space = action_space
        self.shape = {"observation_size": observation_size, "horizon": horizon, "hidden": hidden, "layers": layers}
        low, high = _bounds(action_space)
        self.register_buffer("mean", torch.zeros(observation_size))
        self.register_buffer("scale", torch.ones(observation_size))
        self.register_buffer("middle", torch.from_numpy((high + low) / 2))
        self.register_buffer("reach", torch.from_numpy((high - low) / 2))
        self.network = Perceptron(observation_size, hidden, horizon * low.size, layers=layers, seed=seed)
        self.log_std = nn.Parameter(torch.zeros(horizon, low.size))
        self._noise = np.random.default_rng(seed)

    @classmethod
    def fit(
        cls,
        observations: Any,
        segments: Any,
        *,
        action_space: Box,
        weight: Any = None,
        hidden: int = 128,
        layers: int = 2,
        epochs: int = 100,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        held_out: float = 0.1,
        patience: int = 20,
        seed: int = 0,
    ) -> ClonedPolicy:
        """Clone the policy that acted.

        The mean is fitted by least squares, with early stopping on held-out rows; the standard deviations are those
        of the held-out residuals, which is the maximum likelihood of the Gaussian without the optimism of the
        training rows.

        Args:
            observations: (N, O), where segments began.
            segments: (N, H, A) actions, or (N, A) of single steps.
            action_space: bounds of the actions, finite.
            weight: (N,) >= 0, what each row counts; None for all the same.
            hidden, layers: width and number of hidden layers.
            epochs: passes over the data, at most.
            batch_size, learning_rate: of Adam; the rate falls to nothing along a cosine.
            held_out: the share of rows for early stopping and the standard deviations.
            patience: epochs without improvement before it stops.
            seed: of the split, the network and the batches.

        Raises:
            ValueError: shapes that do not belong together, fewer than 10 rows, or NaN.
        """
        seen, acted, counts = _checked_data(observations, segments, action_space, weight)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(seen), generator=generator)
        split = max(2, round(held_out * len(seen)))
        check, train = order[:split], order[split:]
        policy = cls(seen.shape[1], acted.shape[1], action_space, hidden=hidden, layers=layers, seed=seed)
        policy.mean.copy_(seen[train].mean(0))
        spread = seen[train].std(0)
        policy.scale.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))
        seen = policy._normalised(seen)
        target = ((acted - policy.middle) / policy.reach).flatten(1)

        def squares(rows: Tensor) -> Tensor:
            return (policy.network(seen[rows]) - target[rows]).square() * counts[rows, None]

        with torch.no_grad():  # the network starts at the mean, and learns what differs from it
            last = policy.network.last
            last.weight.mul_(0.1)
            last.bias.copy_((target[train] * counts[train, None]).sum(0) / counts[train].sum())
        train_epochs(
            policy.network, lambda rows: squares(rows).mean(), lambda: squares(check).mean(), train, generator,
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, patience=patience, margin=1e-4,
        )  # fmt: skip
        with torch.no_grad():
            variance = squares(check).sum(0) / counts[check].sum().clamp_min(1e-12)
            policy.log_std.copy_(variance.sqrt().clamp_min(FLOOR).log().unflatten(0, acted.shape[1:]))
        return policy

    def forward(self, observation: Tensor) -> Tensor:
        """Return the mean segments (B, H, A) of observations (B, O), not yet clipped."""
        flat = self.network(self._normalised(observation))
        return flat.unflatten(-1, self.log_std.shape) * self.reach + self.middle

    def sample(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one segment for each observation (B, O): (B, H, A), not clipped."""
        mean = self(observation)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.log_std.exp() * self.reach * noise

    def log_prob(self, observation: Tensor, segments: Tensor) -> Tensor:
        """Return the log density (B,) of segments (B, H, A), in units of the action, with gradients."""
        mean = self(observation)
        if segments.shape != mean.shape:
            raise ValueError(f"segments must have shape {tuple(mean.shape)}: got {tuple(segments.shape)}")
        log_std = self.log_std + self.reach.log()
        z = (segments - mean) * torch.exp(-log_std)
        return -(z.square() / 2 + log_std + math.log(2 * math.pi) / 2).sum((-2, -1))

    @torch.no_grad()
    def propose(self, observation: np.ndarray, deterministic: bool = False) -> np.ndarray:
        """Return a segment of actions within the bounds: (H, A) for one observation (O,), (B, H, A) for (B, O)."""
        observation = np.asarray(observation)
        rows = np.atleast_2d(observation)
        if rows.shape[1:] != self.mean.shape:
            raise ValueError(f"observation must have {len(self.mean)} numbers: got shape {observation.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("observation holds NaN or infinity")
        segments = self(torch.as_tensor(rows, dtype=self.mean.dtype, device=self.mean.device)).cpu().numpy()
        if not deterministic:
            std = (self.log_std.exp() * self.reach).cpu().numpy()
            segments = segments + std * self._noise.standard_normal(segments.shape, dtype=np.float32)
        segments = np.clip(segments, self.action_space.low, self.action_space.high)
        return segments if observation.ndim == 2 else segments[0]

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Return the first action of a proposed segment; see :class:`~pfm.pbrl.policies.Policy`."""
        return self.propose(observation, deterministic)[..., 0, :], state

    def seed(self, seed: int) -> None:
        """Reset the noise of :meth:`propose` and :meth:`predict`."""
        self._noise = np.random.default_rng(seed)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, and return its path: weights, and the shape and bounds as its metadata."""
        bounds = {"low": self.action_space.low.tolist(), "high": self.action_space.high.tolist()}
        return save_network(path, KIND, {**self.shape, **bounds}, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> ClonedPolicy:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds something else.
        """
        config, _ = load_network(path, KIND, ("observation_size", "horizon", "hidden", "layers"))

        def build() -> ClonedPolicy:
            low, high = (np.array(config[bound], np.float32) for bound in ("low", "high"))
            rest = {name: value for name, value in config.items() if name not in ("low", "high")}
            return cls(action_space=Box(low, high, dtype=np.float32), **rest)

        return load_module(build, Path(path), "configuration")

    def _normalised(self, observation: Tensor) -> Tensor:
        return (observation - self.mean) / self.scale


def _bounds(space: Box) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    if low.ndim != 1 or not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"action_space must be a box (A,) with finite bounds: got {space}")
    return low, high


def _checked_data(observations: Any, segments: Any, space: Box, weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    seen = torch.as_tensor(np.asarray(observations, np.float32))
    acted = torch.as_tensor(np.asarray(segments, np.float32))
    if acted.ndim == 2:
        acted = acted[:, None]
    actions = _bounds(space)[0].size
    if seen.ndim != 2 or acted.ndim != 3 or acted.shape[2] != actions or len(seen) != len(acted):
        raise ValueError(
            f"observations (N, O) and segments (N, H, {actions}) are needed, "
            f"got {tuple(np.shape(observations))} and {tuple(np.shape(segments))}"
        )
    if len(seen) < 10:
        raise ValueError(f"cloning needs at least 10 rows: got {len(seen)}")
    counts = torch.ones(len(seen)) if weight is None else torch.as_tensor(np.asarray(weight, np.float32))
    if counts.shape != (len(seen),) or not (counts >= 0).all() or counts.sum() <= 0:
        raise ValueError(f"weight must be ({len(seen)},) numbers >= 0, not all 0: got shape {tuple(counts.shape)}")
    for name, tensor in (("observations", seen), ("segments", acted)):
        whole = tensor.flatten(1).isfinite().all(1)
        if not whole.all():
            raise ValueError(f"{name} hold NaN or infinity, first in row {int((~whole).nonzero()[0])}: leave it out")
    return seen, acted, counts

"""Small multilayer perceptrons, and early stopping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["EarlyStopping", "Perceptron", "train_epochs"]


class Perceptron(nn.Sequential):
    """Maps (..., inputs) to (..., outputs) through hidden layers with SiLU activations.

    Making one leaves torch's global random state alone.

    Args:
        inputs, hidden, outputs: sizes of the layers.
        layers: number of hidden layers.
        seed: of the starting weights; None: the global random state as it is.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, layers: int = 2, seed: int | None = None) -> None:
        widths = [inputs] + [hidden] * layers
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            body = [
                module
                for inward, outward in itertools.pairwise(widths)
                for module in (nn.Linear(inward, outward), nn.SiLU())
            ]
            super().__init__(*body, nn.Linear(widths[-1], outputs))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def restart(self, nonzero: int = 0) -> None:
        """Draw the weights anew; the outputs start at zero, but for the last ``nonzero`` ones, which start small."""
        for module in self:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.last.weight[: len(self.last.weight) - nonzero] = 0
        nn.init.zeros_(self.last.bias)


class EarlyStopping:
    """Keeps the weights with the lowest validation loss, and says when to stop.

    Args:
        network: whose weights are kept.
        patience: validations without improvement before training stops; None: it runs to its end.
        margin: share of the lowest loss by which a loss must be lower to count as an improvement.
    """

    def __init__(self, network: nn.Module, patience: int | None, margin: float = 0.0) -> None:
        self.network, self.patience, self.margin = network, patience, margin
        self.loss, self._waited = math.inf, 0
        self._best = self._weights()

    def validated(self, loss: float) -> bool:
        """Take the validation loss of the network as it is; return whether training should stop."""
        if loss < self.loss * (1 - self.margin):
            self.loss, self._waited, self._best = loss, 0, self._weights()
            return False
        self._waited += 1
        return self.patience is not None and self._waited >= self.patience

    def restore(self) -> None:
        """Load the weights with the lowest loss, or those at the start if no loss was finite."""
        self.network.load_state_dict(self._best)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}


def train_epochs(
    network: nn.Module,
    training_loss: Callable[[Tensor], Tensor],
    validation_loss: Callable[[], Tensor],
    rows: Tensor,
    generator: torch.Generator,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    patience: int | None = None,
    margin: float = 0.0,
) -> None:
    """Train a network in place by Adam on a cosine schedule, and keep the weights with the lowest validation loss.

    Args:
        network: what is trained, all parameters of it.
        training_loss: gives the loss of the rows at an index (B,).
        validation_loss: gives the loss on held-out rows, after each epoch.
        rows: (N,) indices of the training rows.
        generator: shuffles them.
        epochs: passes over the rows, at most.
        batch_size: rows in an update, at most.
        learning_rate: of Adam, at the start.
        patience, margin: as for :class:`EarlyStopping`, in epochs.
    """
    batches = math.ceil(len(rows) / batch_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    stopping = EarlyStopping(network, patience, margin)
    for _ in range(epochs):
        for part in rows[torch.randperm(len(rows), generator=generator)].chunk(batches):
            optimizer.zero_grad()
            training_loss(part).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = float(validation_loss())
        if stopping.validated(loss):
            break
    stopping.restore()

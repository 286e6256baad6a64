"""A small network of (output, context), and its training with early stopping: shared by every learned baseline."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfm import EncodedPairs
from pfm._internal.significance import CONFIRMED, choose_crosswise, confirmed, halves

__all__ = ["Fitted", "Network", "fit_early_stopped", "pair_loss"]

HELD_OUT = 0.1
EVERY = 25  # updates between two looks at the held-out pairs


@dataclass(frozen=True)
class Fitted:
    """Holds what a fit found.

    ``updates`` until the weights that were kept, ``held_out`` their loss on held-out pairs, ``gain`` by how much
    held-out pairs gain from before training, each at the moment that is best on the other half of them, and ``z`` the
    z-score of that gain.
    """

    updates: int
    held_out: float
    gain: float
    z: float

    @property
    def confirmed(self) -> bool:
        """Tell whether held-out pairs confirm that something was learned (one-sided 95%); else it was given up."""
        return self.z > CONFIRMED

    def notes(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        finite = self.z if math.isfinite(self.z) else None
        return {"updates": self.updates, "held_out": self.held_out, "gain": self.gain, "z": finite}


class Network(nn.Module):
    """A perceptron of (y, context), both standardised; it is zero before training.

    Args:
        dimension: D of an output. context_dimension: C of a context, 0 for none.
        outputs: values a row. hidden, layers: width and number of hidden layers.
        seed: of the weights.
    """

    def __init__(
        self, dimension: int, context_dimension: int, outputs: int = 1, hidden: int = 64, layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        inputs = dimension + context_dimension
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [inputs] + [hidden] * layers
            body = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.SiLU())]
            self.body = nn.Sequential(*body, nn.Linear(widths[-1], outputs))
        last = self.body[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    mean: Tensor
    spread: Tensor

    def standardise(self, pairs: EncodedPairs) -> Network:
        """Take mean and spread of all outputs and contexts; return the network itself."""
        batch = pairs.gather(torch.arange(len(pairs)))
        rows = torch.cat([_join(batch.chosen, batch.context), _join(batch.rejected, batch.context)])
        self.mean.copy_(rows.mean(0))
        self.spread.copy_(rows.std(0, correction=0).clamp_min(1e-6))
        return self

    def forward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return (B, outputs) at y (B, D) under contexts (B, C) or None."""
        return self.body((_join(y, context) - self.mean) / self.spread)


def pair_loss(loss: Callable[[Tensor], Tensor], margin: Tensor, probability: Tensor) -> Tensor:
    """Return the expected loss (B,) of margins (B,) under soft labels (B,): p loss(m) + (1 - p) loss(-m)."""
    forward = probability * loss(margin)
    return forward if bool((probability == 1).all()) else forward + (1 - probability) * loss(-margin)


def fit_early_stopped(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    pairs: EncodedPairs,
    *,
    seed: int,
    updates: int = 2000,
    rows: int = 512,
    learning_rate: float = 3e-3,
    patience: int = 8,
) -> Fitted:
    """Minimise the mean loss of the pairs by Adam, and keep the weights that were best on held-out pairs.

    A tenth of the pairs is held out, by pair: contexts of these tasks are conditions, each seen many times, not
    prompts to generalise from. What held-out pairs do not confirm is given up, and the module is as it was: a choice
    by the largest value, or a policy sharpened to a given strength, would make much of any noise.

    Args:
        module: whose parameters are fitted, in place.
        loss: gives the losses (B,) of the pairs at index (B,).
        pairs: N of them; their weights are taken into account.
        seed: of the held-out part and the batches.
        updates, rows, learning_rate, patience: at most so many updates of so many pairs, the rate falling to zero
            as half a cosine; stopped after ``patience`` looks without improvement.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(HELD_OUT * len(pairs)))
    order = torch.randperm(len(pairs), generator=generator)
    held, train = order[:count], order[count:]
    weight = torch.ones(len(pairs)) if pairs.weight is None else pairs.weight
    share = weight[held] / weight[held].sum()
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True)
    best, at, looks = torch.zeros(0), 0, 0
    losses: list[Tensor] = []
    untrained = kept = copy.deepcopy(module.state_dict())
    for update in range(updates):
        if update % EVERY == 0:
            with torch.no_grad():
                now = loss(held)
            losses.append(now)
            if update == 0 or float(share @ now) < float(share @ best):
                best, at, looks, kept = now, update, 0, copy.deepcopy(module.state_dict())
            else:
                looks += 1
                if looks >= patience:
                    break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * update / updates)) / 2
        some = train[torch.randint(len(train), (rows,), generator=generator)]
        optimizer.zero_grad()
        (weight[some] * loss(some)).mean().backward()
        optimizer.step()
    each, items = torch.stack(losses), torch.arange(len(held))
    better = each[0] - each[choose_crosswise(each, weight[held], halves(items)), items]
    fitted = Fitted(at, float(share @ best), float(share @ better), confirmed(better, items, weight[held]).z)
    module.load_state_dict(kept if fitted.confirmed else untrained)
    return fitted


def _join(y: Tensor, context: Tensor | None) -> Tensor:
    return y if context is None else torch.cat([y, context], dim=-1)

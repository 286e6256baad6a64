"""Train small networks beyond a closed form, with early stopping on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pfm._internal.networks import EarlyStopping

__all__ = ["GAINS", "train_network"]

CHECKED = 8192
CHECK_EVERY = 50
PATIENCE = 10
WEIGHT_DECAY = 1e-2
GAINS = (0.25, 0.5, 0.75, 1.0)  # multiples of a network's output among which one is chosen


def train_network(
    network: nn.Module,
    restart: Callable[[], None],
    correct: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    *,
    updates: int = 1500,
    rows: int = 256,
    learning_rate: float = 4e-3,
) -> tuple[Tensor, Tensor]:
    """Train by AdamW on a cosine schedule, and keep the weights that do best on the held-out pairs, in place.

    Args:
        network: what is trained, all parameters of it.
        restart: sets its starting weights; called under a seed drawn from ``generator``.
        correct: gives what the network adds to the scores, (..., B), of the pairs at an index (B,).
        loss: gives the losses (B,) of the pairs at an index (B,) with such an addition.
        weight: (N,) weights of the pairs.
        held_out: (N,) which pairs decide when to stop; the others are trained on.
        generator: draws the batches, on the CPU.
        updates, rows: number of updates at most, and of pairs in one.
        learning_rate: of AdamW, at the start.

    Returns:
        the held-out pairs that were looked at (M,), at most 8192, and what the network added to their scores at each
        of K looks, (K, ..., M).

    Raises:
        ValueError: there is no pair to train or to judge on.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        restart()
        held_out = held_out.cpu()
        train = (~held_out).nonzero().flatten()
        check = held_out.nonzero().flatten()[:CHECKED]
        if len(train) == 0 or len(check) == 0:
            raise ValueError(f"held_out must leave pairs on either side: got {len(check)} of {len(held_out)} held out")
        check = check.to(weight.device)
        looks: list[Tensor] = []
        network.requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        stopping = EarlyStopping(network, PATIENCE)
        for update in range(updates):
            if update % CHECK_EVERY == 0:
                with torch.no_grad():
                    looks.append(correct(check))
                    found = float((loss(check, looks[-1]) * weight[check]).mean())
                if stopping.validated(found):
                    break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 + math.cos(math.pi * update / updates)) / 2
            some = train[torch.randint(len(train), (rows,), generator=generator, device="cpu")]
            some = some.to(weight.device, non_blocking=True)
            optimizer.zero_grad()
            (loss(some, correct(some)) * weight[some]).mean().backward()
            optimizer.step()
        stopping.restore()
        network.requires_grad_(False)
        return check, torch.stack(looks)

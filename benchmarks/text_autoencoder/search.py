"""Writes token ids from latents: draws, and the likeliest under the decoder and its own language model together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.text_autoencoder.network import END, Network

__all__ = ["draw", "search"]


@torch.no_grad()
def draw(
    network: Network,
    latents: Tensor,
    temperature: float = 0.0,
    random: torch.Generator | None = None,
    fluency: float = 0.0,
    nats: float = 0.0,
) -> Tensor:
    """Write token ids (B, window) from latents (B, D), token by token; END fills each row's rest.

    Args:
        network: writes.
        latents: (B, D), of any length: they are put on the sphere first.
        temperature: of the draws of tokens; 0 takes the likeliest token each time.
        random: for the draws.
        fluency, nats: as in :func:`search`.
    """
    steps = _Steps(network, latents, fluency, nats)
    written = torch.full((len(latents), network.settings.window), END)
    given = torch.full((len(latents), 1), END)
    unfinished = torch.ones(len(latents), dtype=torch.bool)
    for place in range(network.settings.window):
        scores = steps(given)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(scores / temperature, 1), 1, generator=random).squeeze(1)
        else:
            chosen = scores.argmax(1)
        chosen = torch.where(unfinished, chosen, END)
        written[:, place] = chosen
        unfinished = unfinished & (chosen != END)
        if not bool(unfinished.any()):
            break
        given = chosen[:, None]
    return written


@torch.no_grad()
def search(network: Network, latents: Tensor, fluency: float = 0.0, beams: int = 4, nats: float = 0.0) -> Tensor:
    """Write the token ids (B, window) that a beam search finds for latents (B, D); END fills each row's rest.

    The score of a text x of n tokens is log p(x | z) + fluency (log p(x) + n nats), as in shallow fusion (Gulcehre et
    al. 2015) with the decoder itself as the language model: p(x) is its probability of x at a latent of zeros.

    Args:
        network: writes. With ``fluency`` its decoder must have been trained without latents as well.
        latents: (B, D), of any length: they are put on the sphere first.
        fluency: at least 0; the weight of the language model.
        beams: texts that are kept at each step.
        nats: length bonus of a token, the language model's mean; without it short texts would be preferred.
    """
    count, window, kinds = len(latents), network.settings.window, network.settings.vocabulary
    steps = _Steps(network, latents.repeat_interleave(beams, 0), fluency, nats)
    written = torch.full((count * beams, window), END)
    given = torch.full((count * beams, 1), END)
    finished = torch.zeros(count * beams, dtype=torch.bool)
    total = torch.zeros(count, beams)
    total[:, 1:] = -torch.inf  # all beams start alike: one is enough
    first = beams * torch.arange(count)[:, None]
    for place in range(window):
        scores = steps(given)
        scores[finished] = -torch.inf
        scores[finished, END] = 0
        total, best = (total.view(-1, 1) + scores).view(count, -1).topk(beams, 1)
        rows, chosen = (best // kinds + first).flatten(), (best % kinds).flatten()
        steps.keep(rows)
        written = written[rows]
        written[:, place] = chosen
        finished = finished[rows] | (chosen == END)
        if bool(finished.all()):
            break
        given = chosen[:, None]
    return written[first.squeeze(1)]


class _Steps:
    """Gives the scores (B, V) of each next token, given the one before; at a text's start END has none."""

    def __init__(self, network: Network, latents: Tensor, fluency: float, nats: float) -> None:
        self.network, self.fluency, self.nats, self.place = network, fluency, nats, 0
        self.unbound = network.unbound(network.on_sphere(latents), 0, network.settings.window)
        self.pasts: list[list[Any] | None] = [None, None]

    def __call__(self, given: Tensor) -> Tensor:
        unbound = self.unbound[:, self.place : self.place + 1]
        found = self._next(unbound, given, 0)
        if self.fluency:
            found = found + self.fluency * (self._next(torch.zeros_like(unbound), given, 1) + self.nats)
        if self.place == 0:
            found[:, END] = -torch.inf  # no empty texts
        self.place += 1
        return found

    def _next(self, unbound: Tensor, given: Tensor, which: int) -> Tensor:
        states, self.pasts[which] = self.network.write(unbound, given, self.place, self.pasts[which])
        return torch.log_softmax(self.network.logits(states[:, 0]), 1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (B,), in this order."""
        self.unbound = self.unbound[rows]
        self.pasts = [past and [(key[rows], value[rows]) for key, value in past] for past in self.pasts]

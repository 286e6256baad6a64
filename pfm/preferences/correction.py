"""A small network beside the closed form of a preference model, kept if held-out prompts confirm it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pfm._internal.columns import column_statistics
from pfm._internal.networks import Perceptron
from pfm._internal.significance import choose_crosswise, confirmable, confirmed, halves
from pfm.data.batches import PairBatch
from pfm.preferences.base import Embedded
from pfm.preferences.coordinates import component_axes
from pfm.preferences.logistic import smooth_labels
from pfm.preferences.networks import GAINS, train_network
from pfm.preferences.newton import label_loss

__all__ = ["Correction", "FittedCorrection", "fit_correction"]

CONTEXT_INPUTS = 32  # components of a context that it reads


class Correction(nn.Module):
    """Embeds outputs under contexts by a network that reads a few axes of their features.

    Args:
        features, context_dimension: numbers of values it is given of an output and of a context; 0 for none.
        inputs, context_inputs: numbers of axes that it reads of them.
        hidden: width of its two hidden layers.
        blocks: number of planes k, 0 for none.
        reward: whether it gives a reward.
        gate: whether the context sets the planes' strengths, k softmax(U x).
        unit: bring v to length 1 and divide the score by ``temperature``, as the General Preference Model may.
        temperature: > 0.
    """

    input_axes: Tensor
    context_mean: Tensor
    context_axes: Tensor
    gain: Tensor

    def __init__(
        self,
        features: int,
        context_dimension: int,
        inputs: int,
        context_inputs: int,
        *,
        hidden: int,
        blocks: int,
        reward: bool,
        gate: bool = False,
        unit: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.blocks, self.rewards, self.unit, self.temperature = blocks, int(reward), unit, temperature
        for name, value in {
            "input_axes": torch.zeros(features, inputs),
            "context_mean": torch.zeros(context_dimension),
            "context_axes": torch.zeros(context_dimension, context_inputs),
            "gain": torch.ones(()),
        }.items():
            self.register_buffer(name, value)
        self.body = Perceptron(inputs + context_inputs, hidden, self.rewards + 2 * blocks)
        with torch.random.fork_rng(devices=[]):
            self.gate = nn.Linear(context_inputs, blocks) if gate and context_inputs and blocks > 1 else None

    def restart(self) -> None:
        """Draw the weights anew: no reward, small planes - between none the slope would be zero -, equal strengths."""
        self.body.restart(nonzero=2 * self.blocks)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes of its inputs, as its constructor takes them."""
        return {"inputs": self.input_axes.shape[1], "context_inputs": self.context_axes.shape[1]}

    def forward(self, features: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs of features (B, F) under contexts (B, C) or None."""
        return self.of_axes(features @ self.input_axes, self.read(context)).scaled(self.gain)

    def read(self, context: Tensor | None) -> Tensor | None:
        """Return what is read of contexts (B, C)."""
        return None if context is None else (context - self.context_mean) @ self.context_axes

    def of_axes(self, inputs: Tensor, context: Tensor | None) -> Embedded:
        """Embed, at full gain, what was read of outputs and contexts."""
        found = self.body(inputs if context is None else torch.cat([inputs, context], dim=-1))
        reward = found[..., 0] if self.rewards else found.new_zeros(found.shape[:-1])
        planes = found[..., self.rewards :]
        if self.unit:
            planes = normalize(planes, dim=-1) / math.sqrt(self.temperature)
        if self.gate is not None and context is not None:
            strength = self.blocks * self.gate(context).softmax(-1)
            planes = planes * strength.sqrt().repeat_interleave(2, dim=-1)
        return Embedded(reward, planes)


@dataclass(frozen=True)
class FittedCorrection:
    """Holds a fitted network, the corrections (N,) of all pairs' scores, and the held-out gain.

    The network is None if it was not confirmed. The gain is that in log loss of the held-out pairs, in nats a pair.
    A held-out pair's correction, and the gain, come of what was chosen on the other half of the held-out prompts.
    """

    network: Correction | None
    scores: Tensor
    gain: float


def fit_correction(
    one: Tensor,
    other: Tensor,
    tries: Sequence[tuple[Tensor, PairBatch, dict[str, Any]]],
    score: Tensor,
    held_out: Tensor,
    group: Tensor,
    generator: torch.Generator,
    **shape: Any,
) -> FittedCorrection:
    """Fit networks to what calibrated scores leave; keep as much of the best as the held-out pairs confirm, or nothing.

    Args:
        one, other: (N, F) features of chosen and rejected outputs.
        tries: for each network, axes (F, n) that it is to read of them; the pairs' contexts, labels and weights; and
            further arguments of :func:`pfm.preferences.networks.train_network`.
        score: (N,) calibrated log-odds, each by a model that did not see the pair's prompt.
        held_out: (N,) which pairs judge. group: (N,) the pairs' prompts.
        generator: draws weights and batches.
        shape: further arguments of :class:`Correction`.
    """
    if not confirmable(group[held_out]):
        return FittedCorrection(None, torch.zeros_like(score), 0.0)
    weight, label = tries[0][1].weight, smooth_labels(tries[0][1].probability)
    multiples = torch.tensor(GAINS)
    fits: list[tuple[float, float, Correction, Tensor]] = []
    corrections: list[Tensor] = []
    rows = torch.zeros(0, dtype=torch.long)
    for axes, batch, training in tries:
        network, rows, looks, more = _train(
            one, other, axes, batch, score, label, held_out, generator, training, **shape
        )
        corrections.append((looks[:, None] * multiples[:, None]).flatten(0, 1))
        fuller = label_loss(score[rows] + multiples[:, None] * more[rows], label[rows]) @ weight[rows]
        fits.append((float(fuller.min()), float(multiples[fuller.argmin()]), network, more))
    candidates = torch.cat(corrections)
    losses = label_loss(score[rows] + candidates, label[rows])
    chosen = choose_crosswise(losses, weight[rows], halves(group[rows])), torch.arange(len(rows))
    better = label_loss(score[rows], label[rows]) - losses[chosen]
    if not confirmed(better, group[rows], weight[rows]):
        return FittedCorrection(None, torch.zeros_like(score), 0.0)
    _, gain, network, more = min(fits, key=lambda fit: fit[0])
    network.gain.fill_(gain)
    scores = gain * more
    scores[rows] = candidates[chosen]
    return FittedCorrection(network, scores, float((better * weight[rows]).sum() / weight[rows].sum()))


def _train(
    one: Tensor, other: Tensor, axes: Tensor, batch: PairBatch, score: Tensor, label: Tensor, held_out: Tensor,
    generator: torch.Generator, training: dict[str, Any], **shape: Any,
) -> tuple[Correction, Tensor, Tensor, Tensor]:  # fmt: skip
    """Train one network; give it, what train_network returns, and its corrections (N,) of all pairs' scores."""
    context = batch.context
    mean, context_axes = torch.zeros(0), torch.zeros(0, 0)
    if context is not None:
        mean, spread = (part.float() for part in column_statistics(context, batch.weight))
        context_axes = component_axes((context - mean) / spread, CONTEXT_INPUTS, batch.weight) / spread[:, None]
    network = Correction(one.shape[1], len(context_axes), axes.shape[1], context_axes.shape[1], **shape)
    network.input_axes.copy_(axes)
    network.context_mean.copy_(mean)
    network.context_axes.copy_(context_axes)
    inputs, others, read = one @ axes, other @ axes, network.read(context)

    def correction(index: Tensor) -> Tensor:
        some = None if read is None else read[index].repeat(2, 1)
        both = network.of_axes(torch.cat([inputs[index], others[index]]), some)
        return both[: len(index)].against(both[len(index) :])

    def loss(index: Tensor, more: Tensor) -> Tensor:
        return label_loss(score[index] + more, label[index])

    rows, looks = train_network(
        network, network.restart, correction, loss, batch.weight, held_out, generator,
        **({"updates": 1500, "learning_rate": 2e-3} | training),
    )  # fmt: skip
    with torch.no_grad():
        more = torch.cat([correction(part) for part in torch.arange(len(score)).split(4096)])
    return network, rows, looks, more

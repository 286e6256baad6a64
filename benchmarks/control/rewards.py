"""A Bradley–Terry reward of segments that is a mean of networks, each with its own held-out part of the pairs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.baselines.rewards import NetworkReward
from pfm import EncodedPairs

__all__ = ["RewardEnsemble"]

Layers = list[tuple[Tensor, Tensor]]


class RewardEnsemble:
    """Scores outputs by the mean of several :class:`benchmarks.baselines.rewards.NetworkReward`.

    It gives one score to all outputs unless held-out pairs confirm most of the members: of noise one in twenty is
    confirmed, and a choice by rank makes as much of a small score as of a large one.
    """

    def __init__(self, members: int = 3, seed: int = 0) -> None:
        self._members = [NetworkReward(seed + number) for number in range(members)]

    def fit(self, pairs: EncodedPairs) -> dict[str, float]:
        """Fit every member; say how many held-out pairs confirmed, and the mean loss on those."""
        found = [member.fit(pairs) for member in self._members]
        self.confirmed = 2 * sum(each.confirmed for each in found) > len(found)
        self.__dict__.pop("_layers", None)
        return {
            "confirmed": float(sum(each.confirmed for each in found)),
            "held_out": sum(each.held_out for each in found) / len(found),
        }

    def reward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the rewards (B,), in log-odds, of outputs y (B, D) under contexts (B, C) or None; differentiable."""
        scores = torch.stack([member.reward(y, context) for member in self._members]).mean(0)
        return scores if self.confirmed else torch.zeros_like(scores)

    @torch.no_grad()
    def slope(self, y: Tensor, context: Tensor) -> Tensor:
        """Return the gradient (B, D) of the reward in y (B, D) under contexts (B, C).

        For a few rows the tensor library's bookkeeping costs many times the arithmetic: all members go together, and
        the chain rule is written out.
        """
        if not self.confirmed:
            return torch.zeros_like(y)
        first, *inner, last = self._layers
        x = torch.cat([y, context], 1).expand(len(self._members), -1, -1)
        slopes: list[Tensor] = []
        for weight, bias in (first, *inner):
            z = torch.baddbmm(bias, x, weight.mT)
            gate = z.sigmoid()
            x = z * gate
            slopes.append(gate + x * (1 - gate))  # of SiLU
        back = last[0]
        for (weight, _), slope in zip((*reversed(inner), first), reversed(slopes), strict=True):
            back = torch.bmm(back * slope, weight)
        return back[..., : y.shape[1]].mean(0)

    @cached_property
    def _layers(self) -> Layers:
        """Return weights (M, out, in) and biases (M, 1, out) of all members, with the standardisation in the first."""
        stacks: list[Layers] = []
        for member in self._members:
            network = member._network
            assert network is not None
            layers = [
                (part.weight.detach(), part.bias.detach()) for part in network.body if isinstance(part, nn.Linear)
            ]
            weight, bias = layers[0]
            weight = weight / network.spread
            stacks.append([(weight, bias - weight @ network.mean), *layers[1:]])
        return [
            (torch.stack([weight for weight, _ in each]), torch.stack([bias for _, bias in each])[:, None])
            for each in zip(*stacks, strict=True)
        ]

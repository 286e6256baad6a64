"""Moves by a preference flow on distributions that are known exactly, in every mode, with its controls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pfm
from benchmarks.core.bench import Bench
from benchmarks.core.config import TransportConfig
from benchmarks.laws.laws import Law

__all__ = ["FlowMover", "joined_across", "make", "tournaments"]

_NOTED = ("win", "ridge", "residual_kept", "steps", "steps_error", "seconds", "distilled")
_MODES = ("single", "gated", "reapply", "relabel")
_LABELS = ("given", "shuffled", "swapped")
_BATCH = 512  # pairs that the control joins at a time, as many as a training batch of the public code's size


class FlowMover:
    """Fits a flow on a law's pairs and carries draws along it, as the config says."""

    draws: int = 1
    evaluations: float | None = None  # until learned

    def __init__(self, config: TransportConfig) -> None:
        for name, known in (("labels", _LABELS), ("mode", _MODES)):
            if getattr(config, name) not in known:
                raise ValueError(f"method.{name} must be one of {', '.join(known)}: got {getattr(config, name)!r}")
        best_of = config.flow.get("best_of", 2)
        if math.log2(best_of) % 1:
            raise ValueError(f"method.flow.best_of must be a power of two, as rounds are knock-out: got {best_of}")
        if config.rounds > 1 and config.mode not in ("reapply", "relabel"):
            raise ValueError(f"method.rounds={config.rounds} needs mode 'reapply' or 'relabel': got {config.mode!r}")
        if config.mode == "relabel" and (config.labels != "given" or best_of > 2 or config.distill or config.across):
            raise ValueError(
                "method.mode='relabel' takes votes of the law in every round: it goes with labels='given' and with "
                "neither flow.best_of above 2 nor distill nor across"
            )
        self.config = config
        self.aim = round(math.log2(best_of))

    def learn(self, law: Law, train: pfm.EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; in mode "relabel" then on fresh votes, as many in each further round."""
        config, generator = self.config, torch.Generator().manual_seed(bench.seed + 1_000_003)
        settings = pfm.FlowConfig.from_dict(config.flow)
        self.labels = len(train)
        if self.aim > 1:
            train, self.labels = tournaments(law, self.aim, len(train), generator)
        if config.labels == "shuffled":
            train = train.shuffle_labels(bench.seed)
        elif config.labels == "swapped":
            train = train.swap()
        if config.across:
            train, settings = joined_across(train, generator), settings.replace(source="rejected")
        flow = pfm.PreferenceFlow.fit(train, settings, progress=bench.progress)
        if config.mode == "relabel":

            def vote(y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
                return law.label(y, other, context, generator)

            count = len(train)
            for _ in range(1, config.rounds):
                context = law.contexts(count, generator)
                one, other = (law.reference(context, count, generator) for _ in range(2))
                flow = flow.relabel(vote, one, other, context, progress=bench.progress)
                self.labels += count
        if config.distill:
            context = law.contexts(len(train), generator)
            flow = flow.distill(law.reference(context, len(train), generator), context, progress=bench.progress)
        self.flow = flow
        passes = [flow, *flow.later] if config.mode == "relabel" else [flow] * config.rounds
        self.evaluations = float(sum(part.evaluations for part in passes) * (1 if config.guidance == 1 else 2))
        return {name: flow.metadata[name] for name in _NOTED if name in flow.metadata}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Carry draws to the last of the rounds."""
        return self._carried(self.flow, y, context, self.config.mode, self.config.rounds)

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        """Return the outputs of every round; best of 2^k in one pass is round k."""
        passes, mode = [self.flow] * self.config.rounds, self.config.mode
        if mode == "relabel":  # round by round what one call with all rounds does
            passes, mode = [self.flow, *self.flow.later], "gated" if self.flow.config.source == "rejected" else "single"
        found = {}
        for number, flow in enumerate(passes, self.aim):
            y = found[number] = self._carried(flow, y, context, mode, 1)
        return found

    def _carried(self, flow: pfm.PreferenceFlow, y: Tensor, context: Tensor | None, mode: str, rounds: int) -> Tensor:
        config = self.config
        return flow.transport(
            y, context, mode=mode, rounds=rounds,
            strength=config.strength, guidance=config.guidance, win_gradient=config.win_gradient,
        )  # fmt: skip

    def trajectory(self, y: Tensor, context: Tensor | None, times: Tensor) -> Tensor:
        """Return the states along the (first) pass."""
        return self.flow.trajectory(y, context, times=times)

    def velocity(self, t: float, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the field of the (first) pass."""
        return self.flow.velocity(t, y, context)


def tournaments(law: Law, rounds: int, labels: int, generator: torch.Generator) -> tuple[pfm.EncodedPairs, int]:
    """Let sets of 2^rounds reference draws play knock-out; return them as candidate sets, and the votes cast.

    A candidate's score is the number of matches it won, so that the best of a set is its champion, which has the
    law of that round. The pairs are the first matches, between reference draws.
    """
    size = 2**rounds
    count = max(2, labels // (size - 1))
    contexts = law.contexts(count, generator)
    repeated = None if contexts is None else contexts.repeat_interleave(size, 0)
    outputs = law.reference(repeated, count * size, generator)
    standing, won = torch.arange(count * size), torch.zeros(count * size)
    pairs = None
    for _ in range(rounds):
        one, other = standing[::2], standing[1::2]
        under = None if repeated is None else repeated[one]
        first = law.label(outputs[one], outputs[other], under, generator)
        winner, loser = torch.where(first, one, other), torch.where(first, other, one)
        pairs = pairs or (winner, loser)
        won[winner] += 1
        standing = winner
    assert pairs is not None
    sets = torch.arange(count * size).view(count, size)
    chosen, rejected = pairs
    return (
        pfm.EncodedPairs.from_table(
            outputs, chosen, rejected,
            contexts=contexts, context_index=None if contexts is None else chosen // size, group=chosen // size,
            candidates=[(number, rows, won[rows]) for number, rows in enumerate(sets)],
        ),
        count * (size - 1),
    )  # fmt: skip


def joined_across(train: pfm.EncodedPairs, generator: torch.Generator) -> pfm.EncodedPairs:
    """Join reference draws to winners of other contexts: minibatch optimal transport that ignores contexts.

    The control for what that costs. Each reference draw, a member of a pair picked by a fair coin, is joined to a
    winner of its batch at the least total squared distance; the context is the winner's. The result is trained on as
    pairs from "rejected" to "chosen".

    Source: Tong et al., "Improving and generalizing flow-based generative models with minibatch optimal transport"
    (2302.00482), whose coupling knows no contexts.
    """
    from scipy.optimize import linear_sum_assignment

    if train.context is None:
        raise ValueError("method.across ignores the contexts of a task that has none: use flow.coupling='ot'")
    coin = (torch.rand(len(train), 1, generator=generator) < 0.5).expand_as(train.chosen)
    source = torch.where(coin, train.chosen, train.rejected)
    order = torch.randperm(len(train), generator=generator)
    targets = []
    for batch in order.split(_BATCH):
        cost = torch.cdist(source[batch], train.chosen[batch]).square()
        targets.append(batch[torch.from_numpy(linear_sum_assignment(cost.numpy())[1])])
    target = torch.cat(targets)
    return pfm.EncodedPairs(train.chosen[target], source[order], train.context[target])


def make(config: TransportConfig) -> FlowMover:
    """Make the method of a config."""
    return FlowMover(config)

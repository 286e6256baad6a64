"""Refinement by a preference flow, in every mode, with its controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import pfm
from benchmarks.control.config import ControlFlowConfig
from benchmarks.control.learning import Candidate, ControlData
from benchmarks.control.rewards import RewardEnsemble
from benchmarks.core.bench import Bench
from pfm.pbrl import ClonedPolicy
from pfm.pbrl.flow_policy import FlowPolicy

__all__ = ["FlowRefinement", "make"]

_NOTED = ("win", "ridge", "residual_kept", "steps", "steps_error", "seconds")
_LABELS = ("given", "shuffled", "swapped")
_PROPOSALS = ("deterministic", "stochastic", "clone")


class FlowRefinement:
    """Fits a flow on the pairs, and carries what the reference proposes along it."""

    def __init__(self, config: ControlFlowConfig) -> None:
        for name, known in (("labels", _LABELS), ("proposal", _PROPOSALS)):
            if getattr(config, name) not in known:
                raise ValueError(f"method.{name} must be one of {', '.join(known)}: got {getattr(config, name)!r}")
        if config.proposal == "clone" and config.form != "actions":
            raise ValueError("method.proposal='clone' proposes actions: it goes with method.form='actions'")
        self.config = config
        self.standing = config.choose

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs, or on what the controls make of them."""
        config = self.config
        pairs = data.train.encode(config.form)
        if config.labels == "shuffled":
            pairs = pairs.shuffle_labels(data.seed)
        elif config.labels == "swapped":
            pairs = pairs.swap()
        settings = pfm.FlowConfig.from_dict({"seed": data.seed, **config.flow})
        notes: dict[str, Any] = {}
        if config.draws:
            extended, notes["reward"] = _extended(data, pairs, config.draws)
            if extended is None:  # learned from the labels alone
                settings = settings.replace(best_of=2)
            else:
                pairs = extended
        flow = pfm.PreferenceFlow.fit(pairs, settings, progress=bench.progress)
        proposal: Any = config.proposal
        if proposal == "clone":
            assert data.train.plan is not None
            # The deterministic reference's own segments, which every collection runs.
            proposal = ClonedPolicy.fit(
                data.train.observation, data.train.plan, action_space=data.reference.action_space, seed=data.seed
            )
        self._candidates = [
            Candidate(
                {"candidates": candidates, "rounds": rounds, "strength": strength, "guidance": guidance,
                 "win_gradient": slope},
                FlowPolicy(
                    flow, data.reference, env=data.environment(), proposal=proposal, mode=config.mode,
                    rounds=rounds if config.mode == "reapply" else None, strength=strength, guidance=guidance,
                    win_gradient=slope, execute=config.execute, candidates=candidates, guard=config.guard,
                    win_guard=config.win_guard, seed=data.seed,
                ),
            )
            for candidates in config.candidates
            for rounds in config.rounds
            for strength in config.strengths
            for guidance in config.guidances or [1.0]
            for slope in config.win_gradients or [0.0]
        ]  # fmt: skip
        return notes | {name: flow.metadata[name] for name in _NOTED if name in flow.metadata}

    def candidates(self) -> list[Candidate]:
        """Return one policy for every number of candidates, rounds, strength and guidance."""
        return self._candidates


def _extended(data: ControlData, pairs: pfm.EncodedPairs, draws: int) -> tuple[pfm.EncodedPairs | None, dict[str, Any]]:
    """Have a preference model label ``draws`` fresh segments of every state: the law of the noise is known.

    None if held-out pairs did not confirm the model: eight draws of equal score would teach their own chance.
    """
    reward = RewardEnsemble(seed=data.seed)
    notes = reward.fit(pairs)
    if not reward.confirmed:
        return None, notes
    generator = torch.Generator().manual_seed(data.seed)
    seen = torch.from_numpy(data.train.observation.astype(np.float32))
    drawn = data.draws(len(seen) * draws, generator).flatten(1)
    if pairs.event_shape != data.shape:  # of form "directions"
        drawn = data.whiten(drawn)
    score = reward.reward(drawn, seen.repeat_interleave(draws, 0)).detach().view(len(seen), draws)
    rows = torch.arange(len(seen) * draws).view(len(seen), draws)
    first, second = rows[:, 0::2].flatten(), rows[:, 1::2].flatten()
    probability = torch.sigmoid(score.flatten()[first] - score.flatten()[second])
    wins = probability >= 0.5
    state = torch.arange(len(seen)).repeat_interleave(draws // 2)
    return pfm.EncodedPairs.from_table(
        drawn.unflatten(1, pairs.event_shape), torch.where(wins, first, second), torch.where(wins, second, first),
        contexts=seen, context_index=state, probability=torch.maximum(probability, 1 - probability),
        group=torch.from_numpy(data.train.trajectory.astype(np.int64))[state], encoder=pairs.encoder,
        candidates=[(number, rows[number], score[number]) for number in range(len(seen))],
    ), notes  # fmt: skip


def make(config: ControlFlowConfig) -> FlowRefinement:
    """Make the method of a config."""
    return FlowRefinement(config)

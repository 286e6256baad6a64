"""Exact rounds of the tasks on known distributions: those of a cycle turn, those of a reward do not."""

from __future__ import annotations

import torch

from benchmarks.tasks.cycle import Cycle
from benchmarks.tasks.mixture import Mixture
from pfm.flow.rounds import compare_rounds


def exact_rounds(law, number: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [law.round(n, None, 2000, generator) for n in range(number + 1)]


def test_exact_rounds_of_a_cycle_are_seen_to_go_round_and_those_of_a_reward_never():
    seen, closed = {}, {}
    for law in (Cycle(beats=1.0, slope=0.0), Mixture()):
        ours, theirs = exact_rounds(law, 8, 0), exact_rounds(law, 8, 1)
        checks = [compare_rounds(ours[: n + 1], theirs[: n + 1], law.preference) for n in range(1, 9)]
        assert all(check.wins[-1] > 0.5 for check in checks)
        seen[law.name] = [check.cycling for check in checks]
        closed[law.name] = checks[-1].lost_to
    assert seen["cycle"][:3] == [False] * 3  # a quarter turn is still ahead of where it came from
    assert seen["cycle"][-1]
    assert closed["cycle"] == [0]  # and at last it loses to the reference
    assert not any(seen["mixture"])

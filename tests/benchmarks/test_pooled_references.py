"""The task of two references: its tags against the exact law, and every rule of shares run on it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.core.config import LawConfig
from benchmarks.laws.quadrature import Quadrature
from benchmarks.laws.task import LawTask
from benchmarks.methods import make_method
from benchmarks.preference.pool_config import PoolConfig, PoolMRPOConfig
from benchmarks.tasks.line import Line
from benchmarks.tasks.two_references import TwoReferences


def test_tags_drawn_from_the_posterior_are_jointly_distributed_as_those_of_a_pool():
    law, generator = TwoReferences(), torch.Generator().manual_seed(0)
    y = law.reference(None, 40_000, generator)
    tag = law.tag(y, generator)
    assert float(tag.float().mean()) == pytest.approx(0.5, abs=0.01)
    for number in range(2):
        of_source = law.source(number, 20_000, generator)
        torch.testing.assert_close(y[tag == number].mean(0), of_source.mean(0), atol=0.05, rtol=0)
        assert float((y[tag == number][:, 0] > 1).float().mean()) == pytest.approx(
            float((of_source[:, 0] > 1).float().mean()), abs=0.015
        )
    exact = Quadrature.of(law)
    rewards = exact.rewards()
    assert rewards is not None
    assert float(law.reward(y, None).mean()) == pytest.approx(rewards[0], abs=0.03)


@pytest.mark.parametrize("rule", ["weighted", "single"])
def test_every_rule_runs_on_the_task_with_equal_votes(rule):
    from benchmarks.core.bench import Bench

    task = LawTask(TwoReferences(), LawConfig("two_references", pairs=300, draws=2, samples=200, energy_samples=100), 0)
    config = PoolConfig("pool", "pool", "Pool", rule=rule, flow={"residual": False})
    method = make_method(config)
    outcome = task.run(method, Bench("minilm", "truncate", 0, progress=False))
    assert (method.labels, method.draws) == (300, 1)
    win = outcome.figures["win"]
    assert win is not None
    assert win.value > (0.5 if rule == "weighted" else 0.1)
    with pytest.raises(TypeError, match="line is no pool of references"):
        method.learn(Line(), task.pairs(), Bench("minilm", "truncate", 0, progress=False))


def test_mrpo_on_its_own_references_leaves_what_its_base_never_says():
    from benchmarks.core.bench import Bench

    task = LawTask(TwoReferences(), LawConfig("two_references", pairs=2000), 0)
    method = make_method(PoolMRPOConfig("pool_mrpo", "pool_mrpo", "MRPO", base=0))
    method.learn(task.law, task.pairs(), Bench("minilm", "truncate", 0, progress=False))
    generator = torch.Generator().manual_seed(0)
    moved = method.move(torch.zeros(2000, 2), None, generator)
    # The weak source has nothing at the right end, where the best mode is; its clipped partner adds nothing there.
    assert float((moved[:, 0] > 1.6).float().mean()) < 0.01

"""Families of control methods: the choice within them, and what it is measured by."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.control.families import families, markdown
from benchmarks.control.report import compare
from benchmarks.core.runs import Run


def test_a_family_is_what_held_out_episodes_choose(tmp_path: Path):
    # Two members of two families and two seeds: what earned more in validation episodes is the lower in test episodes.
    earned = {
        "flow_best_of_guided": (5.0, [1.0, 2.0]),
        "flow_select": (4.0, [9.0, 9.0]),
        "mean_shift": (7.0, [3.0, 5.0]),
    }
    runs = []
    for name, (validated, returns) in earned.items():
        for seed in (0, 1):
            path = tmp_path / f"{name}-{seed}"
            path.mkdir()
            np.savez(path / "returns.npz", returns=np.array(returns) + seed, reference=np.zeros(2))
            task = {"name": "t", "limit": None, "pairs": 10, "d4rl": None, "environment": "E", "length": 1}
            setting = {"task": task, "method": {"name": name, "label": name}, "seed": seed}
            notes = {"tried": [{"strength": 1.0, "return": validated}, {"strength": 2.0, "return": validated - 1}]}
            metrics = {"kind": "control", "settings": setting, "notes": notes, "about": {}, "finished": ""}
            runs.append(Run(path, metrics | {"environment": {"code": "0"}}))
    (found,) = compare(runs)
    shifts, flows = families(found)
    assert (flows.settings, shifts.settings) == (4, 2)
    assert flows.reached.gain.value == pytest.approx(2.0)  # of flow_best_of_guided: (1 + 2 + 2 + 3) / 4
    assert shifts.lead is not None
    assert shifts.lead.value == pytest.approx(-2.5)
    assert "−2.5" in "\n".join(markdown([found]))

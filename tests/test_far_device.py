"""The suites of flows and preference models on a second device, imitated on the CPU, in processes of their own.

``make far`` runs all of the suites there; here are those that go through every public class in little time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = (
    "test_devices", "data/test_encoded",
    *(f"flow/test_{name}" for name in ("couplings", "fields", "transport", "preference_flow", "registered_field")),
)  # fmt: skip


@pytest.mark.skipif("PFM_TEST_DEVICE" in os.environ, reason="is itself what runs on a device")
@pytest.mark.parametrize("suite", SUITES)
def test_suite_passes_on_a_second_device(suite, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}"]
    found = subprocess.run(
        [*command, str(HERE / f"{suite}.py")], cwd=HERE.parent, env=os.environ | {"PFM_TEST_DEVICE": "far"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


def test_mixed_devices_are_noticed():
    """The imitation raises where CUDA would: a suite that passes on it has no mixed devices."""
    code = """
import torch
from support import far_device
far_device.install()
there, here = torch.ones(3, device="far"), torch.ones(3)
for work in (
    lambda: there + here,
    lambda: torch.cat([there, here]),
    lambda: torch.randn(3, device="far", generator=torch.Generator()),
    lambda: torch.ones(2, device="far:1"),
    lambda: there.numpy(),
    lambda: here[there > 0],
    lambda: here.index_put((here > 0,), there),
):
    try:
        work()
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__)
print(float((there + there.sum().item() + here.to("far")).cpu().sum()))
with far_device.count_syncs() as waits:
    (there * 2).sum()
    float(there[0])
    there.cpu()
print(len(waits))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout.split() == ["RuntimeError"] * 4 + ["TypeError"] + ["RuntimeError"] * 2 + ["15.0", "2"], (
        found.stderr[-2000:]
    )

"""The examples in docstrings run, and what a user calls first has one."""

import inspect
import os
import subprocess
import sys

import pytest
from support.places import ROOT

import pfm
from pfm import distances, encoders, preferences, statistics

CALLED_FIRST = (
    pfm.EncodedPairs,
    pfm.FlowConfig,
    pfm.PreferenceFlow,
    pfm.PreferencePairs.encode,
    pfm.PreferencePairs.from_jsonl,
    pfm.PreferencePairs.from_rankings,
    pfm.PreferencePairs.from_rows,
    pfm.PreferencePairs.from_scores,
    pfm.PreferencePairs.from_votes,
    pfm.PreferencePairs.split,
    pfm.acquisition.choose_pairs,
    pfm.compose,
    pfm.decoders.Select,
    pfm.evaluate,
    pfm.evaluation.audit,
    pfm.explain.explain,
    pfm.judges.ScriptedJudge,
    pfm.register_coupling,
    pfm.register_field,
    pfm.register_solver,
    distances.energy_distance,
    distances.off_support,
    distances.sliced_wasserstein,
    encoders.SurfaceEncoder,
    encoders.encoder_from_name,
    preferences.BradleyTerry,
    preferences.GeneralPreference,
    preferences.calibration,
    preferences.corrected,
    preferences.soft_labels,
    statistics.Bootstrap,
    statistics.Estimate,
    statistics.sign_test,
    statistics.win_share_among,
    pfm.wrap,
)


@pytest.mark.parametrize("called", CALLED_FIRST, ids=lambda called: called.__qualname__)
def test_what_a_user_calls_first_has_an_example(called):
    assert ">>> " in (inspect.getdoc(called) or "")


def test_the_examples_run(tmp_path):
    """They run in a process of their own: what they register or write stays there."""
    modules = [path for path in (ROOT / "pfm").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    assert len(modules) > 15
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
         "--rootdir", ROOT, "--doctest-modules", *sorted(modules)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

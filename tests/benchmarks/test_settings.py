"""Settings of runs: folders that no value leads out of, and mistakes that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.places import ROOT


def composed(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    import benchmarks.core.sweeps
    from benchmarks.core.schemas import register

    register()
    assert benchmarks.core.sweeps
    conf = ROOT / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
    return config


@pytest.mark.parametrize("value", ["../../x", "/etc/x", "..", "a/../../../x", "..\\x"])
def test_no_setting_of_a_benchmark_leads_out_of_the_folder_of_runs(value):
    from benchmarks.core.sweeps import one_folder

    folder = Path("runs", one_folder(f"encoder={value}"))
    assert len(folder.parts) == 2
    assert ".." not in folder.parts
    assert one_folder(value) not in ("", ".", "..")
    assert "/" not in one_folder(value)


def test_the_folder_of_a_run_holds_no_path():
    from omegaconf import OmegaConf

    config = composed("task=alpaca", "method=pfm", "encoder=../../x", "seed=3")
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.job.override_dirname = "encoder=../../x,flips=0.1"
    assert config.hydra.run.dir == "runs/text/alpaca-pfm-3/encoder=..%2F..%2Fx,flips=0.1"
    assert config.hydra.sweep.subdir == "alpaca-pfm-3/encoder=..%2F..%2Fx,flips=0.1"


def test_wrong_settings_of_a_benchmark_are_named():
    from benchmarks.core.config import RunConfig

    with pytest.raises(ValueError, match="seed must be a whole number of at least 0: got -1"):
        RunConfig(seed=-1).check()
    with pytest.raises(ValueError, match=r"encoder: there is no folder '\.\./\.\./x'"):
        RunConfig(encoder="../../x").check()
    RunConfig(encoder="minilm+surface").check()

"""The command line: one run, or with ``-m`` many.

python -m benchmarks task=alpaca method=pfm seed=0
python -m benchmarks -m experiment=text
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from benchmarks.config import RunConfig, register
from benchmarks.data import MissingDataError
from benchmarks.runner import run

register()
absent: list[str] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def job(config: DictConfig) -> float:
    """Run one job of Hydra's and give its score."""
    settings = cast(RunConfig, OmegaConf.to_object(config))
    try:
        return run(settings, Path(HydraConfig.get().runtime.output_dir))
    except MissingDataError as error:
        # The other jobs of a sweep may have their data.
        if str(error) not in absent:
            absent.append(str(error))
            print(error, file=sys.stderr)
        return float("nan")


def main() -> None:
    """Run what the arguments ask for; exit with 2 if data were absent."""
    job()
    if absent:
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The command line: one run, or with ``-m`` many.

python -m benchmarks task=alpaca method=pfm seed=0
python -m benchmarks -m experiment=text
python -m benchmarks -m experiment=text hydra/launcher=joblib hydra.launcher.n_jobs=2
"""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from benchmarks.core.data import MissingDataError
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.core.schemas import register
from benchmarks.core.sweeps import SettingsError, check_launcher, close_sweep, run_job

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def job(config: DictConfig) -> float:
    """Run one job of Hydra's and give its score."""
    try:
        return run_job(config)
    except (MissingDataError, SettingsError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except UnsuitableMethodError as error:
        chosen = HydraConfig.get().runtime.choices
        print(f"method={chosen['method']} does not suit task={chosen['task']}: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Run what the arguments ask for.

    Exit with 1 if a run failed, with 2 if data or a launcher are absent, or a setting is wrong.
    """
    if missing := check_launcher(sys.argv[1:]):
        print(missing, file=sys.stderr)
        sys.exit(2)
    try:
        job()
    except BaseException:
        close_sweep(cut_short=True)
        raise
    sys.exit(close_sweep())


if __name__ == "__main__":
    main()

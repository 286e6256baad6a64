"""What tests of the benchmarks share: composed settings, and the skip where a folder of data is absent."""

from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf

from benchmarks.core.config import RunConfig
from benchmarks.core.data import MissingDataError, data_folder
from benchmarks.core.schemas import composed

ROOT = Path(__file__).resolve().parents[1]


def configured(*overrides: str, **settings: Any) -> RunConfig:
    given = [*overrides, *(f"{name}={value}" for name, value in settings.items())]
    return cast(RunConfig, OmegaConf.to_object(composed(*given)))


def needs(folder: str) -> None:
    try:
        data_folder(folder)
    except MissingDataError as error:
        pytest.skip(str(error))

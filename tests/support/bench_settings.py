"""What tests of the benchmarks share: composed settings."""

from typing import Any, cast

from omegaconf import OmegaConf

from benchmarks.core.config import RunConfig
from benchmarks.core.schemas import composed


def configured(*overrides: str, **settings: Any) -> RunConfig:
    given = [*overrides, *(f"{name}={value}" for name, value in settings.items())]
    return cast(RunConfig, OmegaConf.to_object(composed(*given)))

"""Tells Hydra of all settings, which the files in ``conf/`` name in their defaults, and composes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from benchmarks.acquisition import config as acquisition_config
from benchmarks.control import config as control_config
from benchmarks.core import config
from benchmarks.images import config as images_config
from benchmarks.paper import config as paper_config
from benchmarks.preference import config as preference_config
from benchmarks.preference import pool_config
from benchmarks.same_generator import config as same_generator_config
from benchmarks.text_autoencoder import config as text_autoencoder_config
from benchmarks.text_editing import config as text_editing_config

__all__ = ["composed", "method_settings", "register"]

_CONF = Path(__file__).resolve().parents[2] / "conf"

_WITH_TASKS = (config, acquisition_config, preference_config, control_config, text_editing_config,
               images_config, same_generator_config, text_autoencoder_config,
               paper_config)  # fmt: skip
_WITH_METHODS = (*_WITH_TASKS, pool_config)


@cache
def register() -> None:
    """Store the dataclasses under "schema", "schema/task" and "schema/method", once."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=config.RunConfig)
    tasks = [("schema/task", name, node) for module in _WITH_TASKS for name, node in module.TASKS.items()]
    methods = [("schema/method", name, node) for module in _WITH_METHODS for name, node in module.METHODS.items()]
    for group, name, node in tasks + methods:
        store.store(group=group, name=name, node=node)


def composed(*overrides: str, **options: Any) -> Any:
    """Compose the settings of a run as its command line does; ``options`` are those of Hydra's ``compose``."""
    register()
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        return compose("config", list(overrides), **options)


@cache
def method_settings(name: str, family: str) -> dict[str, Any] | None:
    """Return what a file of ``conf/method`` sets for the method of that name and family; None where there is none."""
    for path in sorted((_CONF / "method").rglob(f"{name}.yaml")):
        choice = path.relative_to(_CONF / "method").with_suffix("").as_posix()
        whole = OmegaConf.to_container(composed("task=line", f"method={choice}"), resolve=True)
        settings = cast("dict[str, Any]", whole)["method"]
        if settings["family"] == family:
            return settings
    return None

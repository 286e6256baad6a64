"""Registers the settings and the tables of ``conf/`` with Hydra, and composes them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from benchmarks.acquisition import config as acquisition_config
from benchmarks.control import config as control_config
from benchmarks.core import config
from benchmarks.core.conf_tables import CONF, register_tables
from benchmarks.images import config as images_config
from benchmarks.paper import config as paper_config
from benchmarks.preference import config as preference_config
from benchmarks.preference import pool_config
from benchmarks.same_generator import config as same_generator_config
from benchmarks.text_autoencoder import config as text_autoencoder_config
from benchmarks.text_editing import config as text_editing_config

__all__ = ["choices", "composed", "method_settings", "register"]

_WITH_TASKS = (config, acquisition_config, preference_config, control_config, text_editing_config,
               images_config, same_generator_config, text_autoencoder_config,
               paper_config)  # fmt: skip
_WITH_METHODS = (*_WITH_TASKS, pool_config)


@cache
def register() -> None:
    """Store the dataclasses under "schema", "schema/task" and "schema/method", and register the tables, once."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=config.RunConfig)
    tasks = [("schema/task", name, node) for module in _WITH_TASKS for name, node in module.TASKS.items()]
    methods = [("schema/method", name, node) for module in _WITH_METHODS for name, node in module.METHODS.items()]
    for group, name, node in tasks + methods:
        store.store(group=group, name=name, node=node)
    register_tables()


@cache
def choices(group: str) -> tuple[str, ...]:
    """List the choices of a group, "task", "method" or "experiment", as the command line takes them."""
    register()
    with _of_its_own():
        loader = GlobalHydra.instance().config_loader()
        inner = [name for name in loader.list_groups(group) if "/" not in name]
        nested = [f"{part}/{name}" for part in inner for name in loader.get_group_options(f"{group}/{part}")]
        return (*loader.get_group_options(group), *nested)


def composed(*overrides: str, **options: Any) -> Any:
    """Compose the settings of a run as its command line does; ``options`` are those of Hydra's ``compose``."""
    register()
    with _of_its_own():
        return compose("config", list(overrides), **options)


@contextmanager
def _of_its_own() -> Generator[None]:
    """Set Hydra up for ``conf/``, also within a run, whose own Hydra is as before afterwards."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = running


@cache
def method_settings(name: str, family: str) -> dict[str, Any] | None:
    """Return what ``conf/`` sets for the method of that name and family; None where it has none."""
    for choice in choices("method"):
        if choice.rpartition("/")[2] == name:
            whole = OmegaConf.to_container(composed("task=line", f"method={choice}"), resolve=True)
            settings = cast("dict[str, Any]", whole)["method"]
            if settings["family"] == family:
                return settings
    return None

"""Tells Hydra of all settings; the files in ``conf/`` name them in their defaults."""

from __future__ import annotations

from functools import cache

from hydra.core.config_store import ConfigStore

from benchmarks import acquisition_config, config, pool_config, preference_config
from benchmarks.control import config as control_config

__all__ = ["register"]

_WITH_TASKS = (config, acquisition_config, preference_config, control_config)
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

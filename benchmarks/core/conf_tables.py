"""Serves the entries of ``conf/methods*.yaml`` and ``conf/tasks.yaml`` to Hydra as configs of "method" and "task".

A source of configs of its own: entries of Hydra's ConfigStore, which is copied for every composition, would cost more
than the rest of it.
"""

from __future__ import annotations

import builtins
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

__all__ = ["CONF", "ConfTables", "register_tables"]

CONF = Path(__file__).resolve().parents[2] / "conf"


class ConfTables(ConfigSource):
    """Finds configs in the tables."""

    @staticmethod
    def scheme() -> str:
        """Return the beginning of its search path."""
        return "tables"

    def available(self) -> bool:
        """Return True: the tables are part of the benchmarks."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Return an entry as a config: its section's dataclass, and what the entry sets."""
        name = config_path.removesuffix(".yaml")
        package: dict[str, str | None] = {"package": name.partition("/")[0]}
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(_entries()[name]), package)

    def is_group(self, config_path: str) -> bool:
        """Return whether entries lie below a path, "" for the top."""
        return bool(self.list(config_path, None))

    def is_config(self, config_path: str) -> bool:
        """Return whether a path is an entry's."""
        return config_path.removesuffix(".yaml") in _entries()

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        """List the entries or the groups right below a path."""
        above = f"{config_path.rstrip('/')}/".lstrip("/")
        below = [name.removeprefix(above).partition("/") for name in _entries() if name.startswith(above)]
        wanted = {None: ("", "/"), ObjectType.CONFIG: ("",), ObjectType.GROUP: ("/",)}[results_filter]
        return sorted({name for name, slash, _ in below if slash in wanted})


class _Searched(SearchPathPlugin):
    """Adds the tables to where Hydra looks for configs, and to what ``--help`` lists."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("tables", f"{ConfTables.scheme()}://conf")


def register_tables() -> None:
    """Let Hydra know the source, and look there."""
    Plugins.instance().register(ConfTables)
    Plugins.instance().register(_Searched)


@cache
def _entries() -> dict[str, Any]:
    """Return the config of each entry by its path, such as "method/control/flow"."""
    entries = {}
    for group in ("task", "method"):
        for path in sorted(CONF.glob(f"{group}s*.yaml")):
            for section in cast(Any, OmegaConf.load(path)):
                for choice, own in section[f"{group}s"].items():
                    named = {"name": choice.rpartition("/")[2]}
                    settings = cast(Any, OmegaConf.merge(named, section.get("settings", {}), own))
                    defaults = [f"/schema/{group}/{section.schema}@_here_", "_self_"]
                    entries[f"{group}/{choice}"] = {"defaults": defaults, **settings}
    return entries

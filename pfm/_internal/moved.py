"""Old names of modules and methods. Using one warns, and gives what has the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install", "renamed_method"]

MOVED = {
    **{f"pfm.{name}": f"pfm.data.{name}" for name in (
        "conversations", "encoded", "identity", "implicit", "labels", "layouts", "pairs", "rows", "spreadsheets",
        "stringified", "transcripts",
    )},
    **{f"pfm.{name}": f"pfm.flow.{name}" for name in (
        "composition", "config", "couplings", "fields", "fitting", "rounds", "streaming", "training", "win",
    )},
    "pfm.explain_page": "pfm.explain.render",
    "pfm.graphs": "pfm.flow.cuda_graphs",
    "pfm.opponents": "pfm.flow.preference_win",
    "pfm.preferences.votes": "pfm.data.votes",
    "pfm.report": "pfm.evaluation.render",
    "pfm.row_errors": "pfm.data.errors",
    "pfm.same_rows": "pfm.data.tensors",
    "pfm.traits": "pfm.explain.traits",
    "pfm.transport": "pfm.flow.integration",
}  # fmt: skip


class _Moved(MetaPathFinder, Loader):
    """Finds modules by their old path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"{old} is now {MOVED[old]}; the old path goes with the next version", DeprecationWarning, 2)
        sys.modules[old] = import_module(MOVED[old])  # the import system takes what stands here


def install() -> None:
    """Let the old paths be found; a second call does nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """Return a method that warns of its name, and does what the method of the new name does."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        kind = type(self).__name__
        warnings.warn(
            f"{kind}.{old}() is now {kind}.{new}(); the old name goes with the next version", DeprecationWarning, 2
        )
        return getattr(self, new)(*args, **options)

    method.__name__ = old
    method.__doc__ = f"Do what :meth:`{new}` does, under its old name."
    return method

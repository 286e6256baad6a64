"""Packages whose names are imported when they are first used; the stub beside ``__init__.py`` lists the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lazy_loader

__all__ = ["attach"]


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the ``__getattr__``, ``__dir__`` and ``__all__`` of a package by the stub beside it (SPEC 1).

    Args:
        package: its ``__name__``. file: its ``__file__``.
    """
    load, directory, names = lazy_loader.attach_stub(package, file)

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        return load(name)

    return attribute, directory, sorted(names)

"""Parts of a user's own that a configuration chooses by name: fields, couplings and solvers.

A configuration and a saved flow hold a name and options in JSON values, never code. Whoever loads such a flow registers
the part first, under the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pfm.errors import NotRegisteredError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Maps names to parts: the library's own, and those that users register.

    Args:
        setting: the setting of :class:`pfm.FlowConfig` that takes the names.
        how: the line that registers a part, with ``{name}`` for its name; errors show it.
        built_in: the library's own parts, which no other may replace.
    """

    def __init__(self, setting: str, how: str, built_in: Mapping[str, T]) -> None:
        self.setting, self.how = setting, how
        self._parts: dict[str, T] = dict(built_in)
        self._built_in = frozenset(built_in)

    def add(self, name: str, part: T) -> None:
        """Register a part under a name of letters, digits, ``_``, ``-`` and ``.``.

        A function of the same module and name replaces the first, as when a notebook's cell runs again.

        Raises:
            TypeError: the name is no text. ValueError: it is no such name, or another part's.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the name comes first, as in {self.how.format(name=repr('my-name'))}: got {name!r:.60}")
        if not name or not all(character.isalnum() or character in "_-." for character in name):
            raise ValueError(f"the name of a {self.setting} is letters, digits, '_', '-' and '.': got {name!r}")
        if name in self._built_in:
            raise ValueError(f"{self.setting}={name!r} is the library's own: register yours under another name")
        if name in self._parts and _origin(self._parts[name]) != _origin(part):
            whose = ".".join(_origin(self._parts[name]))
            raise ValueError(f"{self.setting}={name!r} is {whose} already: register yours under another name")
        self._parts[name] = part

    def check(self, name: Any) -> None:
        """Refuse a name that nothing is registered under.

        Raises:
            NotRegisteredError: nothing is.
        """
        if isinstance(name, str) and name in self:
            return
        near = get_close_matches(str(name), self._parts, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else "."
        raise NotRegisteredError(
            f"{self.setting} must be one of {', '.join(self._parts)}: got {name!r}{guess} A {self.setting} of your own "
            f"is registered before it is named or loaded, with {self.how.format(name=repr(name))}"
        )

    def __getitem__(self, name: str) -> T:
        self.check(name)
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _origin(part: Any) -> tuple[str, str]:
    return getattr(part, "__module__", "") or "", getattr(part, "__qualname__", "") or repr(part)

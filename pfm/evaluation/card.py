"""What every report card can do: be printed, saved as JSON, read back, and saved as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

__all__ = ["Card"]

FORMAT = 1


class Card:
    """The files and the terminal output of a dataclass of results; a subclass gives ``_page`` and ``_terminal``."""

    def _page(self, **options: Any) -> str:
        raise NotImplementedError

    def _terminal(self, width: int) -> Iterator[Any]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"format": FORMAT, **asdict(self)}  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass

    def save_json(self, path: str | Path) -> Path:
        """Write the report as strict JSON, and return the path."""
        path = Path(path).expanduser()
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load_json(cls, path: str | Path) -> Self:
        """Read a report written by ``save_json``.

        Raises:
            ValueError: the file is not such a report.
        """
        try:
            values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r} where {FORMAT} is expected")
            return _decode(cls, values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report written by {cls.__name__}.save_json: {error}") from error

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs no network and no scripts, and return the path."""
        return self._write_html(path)

    def _write_html(self, path: str | Path, **options: Any) -> Path:
        path = Path(path).expanduser()
        # texts may hold lone surrogates, which no UTF-8 file can
        path.write_text(self._page(**options), encoding="utf-8", errors="replace")
        return path

    def print(self, console: Any = None) -> None:
        """Print the report on a rich console; default: standard output."""
        from rich.console import Console

        (console or Console()).print(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self._terminal(options.max_width)


def _decode(kind: Any, value: Any) -> Any:
    """Rebuild a dataclass, or a list or option of such, from plain JSON values."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        # A field that an earlier version did not write keeps its default.
        return kind(
            **{item.name: _decode(hints[item.name], value[item.name]) for item in fields(kind) if item.name in value}
        )
    if get_origin(kind) is list:
        return [_decode(get_args(kind)[0], item) for item in value]
    if isinstance(kind, UnionType):
        inner = next(option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _decode(inner, value)
    return value

"""Prompt templates: files with named places, filled with data that cannot pass for instructions.

A template is plain text with places such as ``{draft}``; a brace that is meant is written ``{{`` or ``}}``. Texts of
models and users come into a template as fenced blocks::

    [BEGIN draft 5f0c2a9be41d7730]
    ...
    [END draft 5f0c2a9be41d7730]

The mark is made from all texts of the prompt together, so no text among them can hold it and close its own block;
the same texts have the same mark, so that a cache of responses knows the prompt again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Formatter

__all__ = ["Template", "fence", "fence_mark", "prompt_hash"]


@dataclass(frozen=True)
class Template:
    """A text with named places; made by :meth:`load`.

    Attributes:
        source: name or path that it was read from.
        pieces: alternating literal text and the name of the place that follows it, or None at the end.
    """

    source: str
    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def load(
        cls, name_or_path: str | os.PathLike[str], *, needed: Collection[str], optional: Collection[str] = ()
    ) -> Template:
        """Read a template and check its places.

        Args:
            name_or_path: the name of a template of this package (``"rewrite"``, ``"judge"``), or the path of a file.
            needed: places that it must have.
            optional: further places that it may have.

        Raises:
            ValueError: there is no such template, or a place is missing, unknown or written wrongly.
        """
        source = os.fspath(name_or_path)
        text = _read(source)
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"template {source}: {error}; write a brace that is meant twice, {{{{ or }}}}") from None
        known = [*needed, *optional]
        for _, place, form, conversion in parsed:
            if place is not None and (place not in known or form or conversion):
                shown = place + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise ValueError(
                    f"template {source} has the unknown place {{{shown}}}; it may have "
                    f"{', '.join(f'{{{name}}}' for name in known)}; write a brace that is meant twice"
                )
        found = {place for _, place, _, _ in parsed}
        for name in needed:
            if name not in found:
                raise ValueError(f"template {source} lacks the place {{{name}}}: put it where the {name} belongs")
        return cls(source, tuple((literal, place) for literal, place, _, _ in parsed))

    def fill(self, **values: str) -> str:
        """Put values into the places, in one pass: what looks like a place within a value stays as it is."""
        return "".join(literal + ("" if place is None else values[place]) for literal, place in self.pieces)


def _read(source: str) -> str:
    inside = files("pfm._internal") / "templates" / f"{source}.txt"
    if source.isidentifier() and inside.is_file():
        return inside.read_text(encoding="utf-8")
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        names = sorted(
            Path(entry.name).stem for entry in (files("pfm._internal") / "templates").iterdir() if ".txt" in entry.name
        )
        raise ValueError(
            f"there is no template {source!r}: pass the path of a file, or one of {', '.join(names)}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"template {source} is not UTF-8 text: {error}") from None


def fence_mark(texts: Sequence[str]) -> str:
    """Make a mark of 16 hexadecimal digits that none of the texts holds, the same for the same texts."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode(errors="surrogatepass")
        digest.update(f"{len(data)}\n".encode() + data)
    while any((mark := digest.hexdigest()[:16]) in text for text in texts):
        digest.update(b"again")
    return mark


def fence(label: str, text: str, mark: str) -> str:
    """Write a text between the two lines that say where it begins and ends."""
    return f"[BEGIN {label} {mark}]\n{text}\n[END {label} {mark}]"


def prompt_hash(text: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a prompt, to name it in a trace."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

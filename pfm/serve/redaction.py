"""Remove the upstream's key from what the upstream sends, wherever it is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator

__all__ = ["Redactor"]


class Redactor:
    """Writes asterisks over a key, and over every long enough beginning or end of it.

    Lengths stay, so that a Content-Length stays true. In errors a quarter of the key is enough to be removed; in
    other answers it takes half, at least 16 characters, because a short key may be a word of the language.

    Args:
        key: the key, in ASCII; None removes nothing.
    """

    def __init__(self, key: str | None) -> None:
        self._key = (key or "").encode()

    def __bool__(self) -> bool:
        return bool(self._key)

    def whole(self, content: bytes, *, error: bool) -> bytes:
        """Return the content without the key.

        Args:
            content: a body, or the value of a header.
            error: whether it belongs to an answer with a status from 400.
        """
        least = self._least(error)
        if not least or (self._key[:least] not in content and self._key[-least:] not in content):
            return content
        found = bytearray(content)
        self._cover(found, least)
        return bytes(found)

    async def pieces(self, pieces: AsyncIterator[bytes], *, error: bool) -> AsyncIterator[bytes]:
        """Yield the pieces of a body without the key, also where it runs from one piece into the next."""
        least = self._least(error)
        kept = bytearray()
        async for piece in pieces:
            if not least:
                yield piece
                continue
            kept += piece
            end = len(kept) - self._unfinished(kept)
            ready = kept[:end]
            del kept[:end]
            if ready:
                self._cover(ready, least)
                yield bytes(ready)
        if kept:
            self._cover(kept, least)
            yield bytes(kept)

    def _least(self, error: bool) -> int:
        """Return from how many characters on a part of the key is removed; 0 for never."""
        size = len(self._key)
        if error:
            return min(size, max(6, size // 4))
        return max(16, size // 2) if size >= 16 else 0

    def _cover(self, content: bytearray, least: int) -> None:
        key = self._key
        start = content.find(key[:least])
        while start >= 0:
            end = start + least
            while end < len(content) and end - start < len(key) and content[end] == key[end - start]:
                end += 1
            content[start:end] = b"*" * (end - start)
            start = content.find(key[:least], end)
        start = content.find(key[-least:])
        while start >= 0:
            end, size = start + least, least
            while start > 0 and size < len(key) and content[start - 1] == key[-size - 1]:
                start, size = start - 1, size + 1
            content[start:end] = b"*" * (end - start)
            start = content.find(key[-least:], end)

    def _unfinished(self, content: bytearray) -> int:
        """Return how many bytes at the end may belong to a part of the key that goes on in the next piece."""
        for size in range(min(len(self._key), len(content)), 0, -1):
            if content[-size:] in self._key:
                return size
        return 0

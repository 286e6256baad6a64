"""Say what a generator is, and hold what it gave for one prompt.

Users may pass, and :func:`pfm.generators.as_generator` adapts,

* a callable ``prompt -> str`` or ``prompt -> list[str]``,
* a callable that also takes the keyword ``n``: ``(prompt, n=...) -> list[str]``,
* an object with ``.generate(prompts, n) -> list[list[str]]``, one row of texts for each prompt.

Inside the library a generator is the one method of :class:`Generator`. A class that talks to a model or to
a server implements it directly when it can say more than texts: its own count of calls, the error of one
prompt, results as they arrive. It yields one :class:`Draw` for each prompt, in the order of the prompts, as
soon as that prompt is done; whatever runs ahead or in parallel stays its own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Prompt = str | list[dict[str, Any]]
"""A text, or a conversation as a list of ``{"role": ..., "content": ...}``."""


@dataclass
class Draw:
    """What a generator gave for one prompt.

    Attributes:
        texts: usable outputs, in the order in which they came.
        calls: how often the generator was called for this prompt.
        dropped: outputs thrown away because they were not text, or empty, or only white space.
        seconds: wall-clock time spent in the generator.
        error: type and message of what went wrong, or None. Texts made before the error are kept.
    """

    texts: list[str] = field(default_factory=list)
    calls: int = 0
    dropped: int = 0
    seconds: float = 0.0
    error: str | None = None

    def add(self, outputs: Iterable[object], n: int) -> None:
        """Keep the usable outputs until there are ``n`` texts, and count the unusable ones."""
        for output in outputs:
            if len(self.texts) >= n:
                return
            if is_usable_text(output):
                self.texts.append(str(output))
            else:
                self.dropped += 1

    def fail(self, error: BaseException) -> None:
        """Record ``error`` by type and message."""
        self.error = f"{type(error).__name__}: {error}"

    def close(self) -> Draw:
        """Record an error if nothing usable came and no error says why; return the draw itself."""
        if not self.texts and self.error is None:
            source = f"the generator in {count(self.calls, 'call')}" if self.calls else "the outputs given"
            dropped = f" ({self.dropped} dropped: empty or not text)" if self.dropped else ""
            self.error = f"GenerationError: no usable text from {source}{dropped}"
        return self


class Generator(Protocol):
    """Draws candidate outputs for prompts from a frozen policy."""

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield one :class:`Draw` of up to ``n`` texts for each prompt, in order.

        A failure that concerns one prompt is recorded in its draw. KeyboardInterrupt passes through.
        """
        ...


def is_usable_text(output: object) -> bool:
    """Tell whether ``output`` is text that can be encoded, saved and shown."""
    if not isinstance(output, str) or not output.strip():
        return False
    try:
        output.encode()
    except UnicodeEncodeError:  # a lone surrogate: neither tokenizers nor files take it
        return False
    return True


def count(number: int, noun: str) -> str:
    """Write ``1 call`` or ``3 calls``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

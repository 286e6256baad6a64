"""Say what a generator is, and hold what it gave for one prompt.

Users may pass, and :func:`pfm.generators.as_generator` adapts,

* a callable ``prompt -> str`` or ``prompt -> list[str]``,
* a callable that also takes the keyword ``n``: ``(prompt, n=...) -> list[str]``,
* an object with ``.generate(prompts, n) -> list[list[str]]``, one row of texts for each prompt.

Inside the library a generator is the one method of :class:`Generator`. A class that talks to a model or to
a server implements it directly when it can say more than texts: its own count of calls, the error of one
prompt, results as they arrive. It yields one :class:`Draw` for each prompt, in the order of the prompts, as
soon as that prompt is done; whatever runs ahead or in parallel stays its own affair. It may have more:

* ``adraws(prompts, n)``, the same as an asynchronous iterator,
* ``describe()``, JSON values that name what the draws depend on, and never a key,
* a keyword ``start`` of ``draws`` and ``adraws``, where its samples are numbered because a seed or a cache
  makes them repeatable: for each prompt the number of its first sample. Samples 8 and 9 of a prompt are others
  than samples 0 to 7; without ``start`` a prompt that comes twice in one call goes on where it left off.
"""

from __future__ import annotations

import inspect
import json
import reprlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pfm.errors import GenerationError
from pfm.protocols import Generator as Generator

Prompt = str | list[dict[str, Any]]
"""A text, or a conversation as a list of ``{"role": ..., "content": ...}``."""


Accepts = Callable[[object], bool]


@dataclass
class Draw:
    """What a generator gave for one prompt.

    Attributes:
        texts: usable outputs, in the order in which they came.
        calls: how often the generator was called for this prompt.
        dropped: outputs thrown away because they were not text, or empty, or only white space.
        seconds: wall-clock time spent in the generator.
        error: type and message of what went wrong, or None. Texts made before the error are kept.
        tags: for each text the name of the generator that made it; empty where there is only one.
        finish_reasons: for each text why it ended ("stop", "length"), or None; empty where that is not known.
        usage: tokens that the calls took (``prompt_tokens``, ``completion_tokens``, ``total_tokens``); empty
            where that is not known.
        reasoning: for each text how many characters of hidden reasoning came beside it; empty where none did.
        spent: where the number of draws was not fixed, how many were made and why they ended, as JSON values.
        refused: type and beginning of the first output that was thrown away, or None.
        accepts: tells usable outputs, texts that are not empty unless an encoder encodes others.
    """

    texts: list[str] = field(default_factory=list)
    calls: int = 0
    dropped: int = 0
    seconds: float = 0.0
    error: str | None = None
    tags: list[str] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    reasoning: list[int] = field(default_factory=list)
    spent: dict[str, Any] | None = None
    refused: str | None = field(default=None, repr=False, compare=False)
    accepts: Accepts = field(default_factory=lambda: is_usable_text, repr=False, compare=False)

    def add(self, outputs: Iterable[object], n: int) -> None:
        """Keep the usable outputs until there are ``n`` texts, and count the unusable ones."""
        for output in outputs:
            if len(self.texts) >= n:
                return
            if self.accepts(output):
                self.texts.append(str(output) if isinstance(output, str) else output)  # pyright: ignore[reportArgumentType]
            else:
                self.dropped += 1
                self.refused = self.refused or f"{type(output).__name__} {reprlib.repr(output)}"

    @property
    def of_text(self) -> bool:
        """Tell whether outputs are texts."""
        return self.accepts is is_usable_text

    @property
    def unusable(self) -> str:
        """Say what dropped outputs are."""
        return "empty or not text" if self.of_text else "not what the encoder accepts"

    def extend(self, other: Draw) -> None:
        """Take in a further draw for the same prompt, behind what is there."""
        before, after = len(self.texts), len(other.texts)
        for name, missing in (("tags", ""), ("finish_reasons", None), ("reasoning", 0)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours or theirs:
                setattr(self, name, [*(ours or [missing] * before), *(theirs or [missing] * after)])
        self.texts = [*self.texts, *other.texts]
        self.calls += other.calls
        self.dropped += other.dropped
        self.seconds += other.seconds
        add_usage(self.usage, other.usage)
        self.error = self.error or other.error
        self.refused = self.refused or other.refused

    def fail(self, error: BaseException) -> None:
        """Record ``error`` by type and message."""
        self.error = f"{type(error).__name__}: {error}"

    def close(self) -> Draw:
        """Record an error if nothing usable came and no error says why; return the draw itself."""
        if not self.texts and self.error is None:
            source = f"the generator in {count(self.calls, 'call')}" if self.calls else "the outputs given"
            what = "text" if self.of_text else "output"
            first = f", the first of them {self.refused}" if self.refused else ""
            dropped = f" ({self.dropped} dropped: {self.unusable}{first})" if self.dropped else ""
            wanted = f"; a generator returns one {what} or a list of them" if self.refused and self.calls else ""
            self.error = f"GenerationError: no usable {what} from {source}{dropped}{wanted}"
        return self


@dataclass(frozen=True)
class Sample:
    """One usable text and what it took.

    Attributes:
        text: the output.
        finish_reason, tag: as in :class:`Draw`.
        origin: the same for all samples that came of the same calls.
        calls, usage: what these calls took, for all samples of that origin together.
        reasoning: how many characters of hidden reasoning came beside the text.
    """

    text: str
    finish_reason: str | None = None
    tag: str | None = None
    origin: str = ""
    calls: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    reasoning: int = 0


def draw_of(samples: Sequence[Sample]) -> Draw:
    """Put samples together to a draw; what came of the same calls is counted once."""
    draw = Draw(texts=[sample.text for sample in samples])
    if any(sample.tag is not None for sample in samples):
        draw.tags = [sample.tag or "" for sample in samples]
    if any(sample.finish_reason is not None for sample in samples):
        draw.finish_reasons = [sample.finish_reason for sample in samples]
    if any(sample.reasoning for sample in samples):
        draw.reasoning = [sample.reasoning for sample in samples]
    for sample in {sample.origin: sample for sample in samples}.values():
        draw.calls += sample.calls
        add_usage(draw.usage, sample.usage)
    return draw


class GeneratesTexts:
    """Gives a generator the method ``generate`` on top of its ``draws``."""

    def draws(self, prompts: Sequence[Prompt], n: int) -> Iterator[Draw]:
        """Yield one :class:`Draw` for each prompt; see :meth:`Generator.draws`."""
        raise NotImplementedError

    def generate(self, prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        """Return up to ``n`` texts for each prompt.

        Raises:
            GenerationError: a prompt failed; ``.partial`` holds the texts of all prompts.
        """
        draws = list(self.draws(prompts, n))
        rows = [draw.texts for draw in draws]
        for row, draw in enumerate(draws):
            if draw.error is not None:
                raise GenerationError(f"prompts[{row}]: {draw.error}", partial=rows)
        return rows


def numbered_draws(generator: Any, prompts: Sequence[Prompt], n: int, start: Sequence[int]) -> Iterator[Draw]:
    """Call ``generator.draws``, with ``start`` where its samples are numbered."""
    return _with_start(generator.draws, prompts, n, start)


def numbered_adraws(generator: Any, prompts: Sequence[Prompt], n: int, start: Sequence[int]) -> AsyncIterator[Draw]:
    """Call ``generator.adraws``, with ``start`` where its samples are numbered."""
    return _with_start(generator.adraws, prompts, n, start)


def uneven_draws(
    generator: Any, prompts: Sequence[Prompt], counts: Sequence[int], start: Sequence[int]
) -> Iterator[Draw]:
    """Draw another number of texts for each prompt: one call of ``generator.draws`` for each number there is."""
    groups: dict[int, Iterator[Draw]] = {}
    for size in sorted(set(counts)):
        rows = [row for row, number in enumerate(counts) if number == size]
        groups[size] = numbered_draws(generator, [prompts[row] for row in rows], size, [start[row] for row in rows])
    for size in counts:
        draw = next(groups[size], None)
        if draw is None:
            raise ValueError(f"{generator!r} gave fewer draws than there were prompts")
        yield draw


def _with_start(method: Callable[..., Any], prompts: Sequence[Prompt], n: int, start: Sequence[int]) -> Any:
    try:
        numbered = "start" in inspect.signature(method).parameters
    except (TypeError, ValueError):
        numbered = False
    return method(prompts, n, start=start) if numbered else method(prompts, n)


def first_samples(prompts: Sequence[Prompt], n: int, start: Sequence[int] | None = None) -> list[int]:
    """Return the number of the first sample of each prompt: ``start``, or n further at each repetition.

    Raises:
        ValueError: start and prompts are of unequal length, or a number is negative.
    """
    if start is not None:
        if len(start) != len(prompts) or any(number < 0 for number in start):
            raise ValueError(f"start must hold a number from 0 for each of {len(prompts)} prompts, got {start!r}")
        return list(start)
    return [n * times for times in occurrences(prompts)]


def occurrences(prompts: Sequence[Prompt]) -> list[int]:
    """Count for each prompt how often it came before."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        key = canonical(as_messages(prompt))
        found.append(seen[key])
        seen[key] += 1
    return found


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as a conversation; a text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def canonical(value: Any) -> str:
    """Write JSON values so that equal values give equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)


def add_usage(total: dict[str, int], usage: Mapping[str, int]) -> None:
    """Add token counts to token counts, in place."""
    for name, value in usage.items():
        total[name] = total.get(name, 0) + value


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

"""Draw in waves: after each, a stopping rule says for which prompts to draw on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pfm.generators import Draw, Prompt
from pfm.generators.base import uneven_draws
from pfm.refiner.stopping import CHARACTERS_A_TOKEN, Decision, Plan

__all__ = ["RecentEncoder", "drawn_in_waves"]

PORTION = 32  # prompts whose waves are drawn together
KEPT = 2048  # vectors of the latest texts


class RecentEncoder:
    """An encoder that keeps the vectors of its latest texts: a wave's are judged again with the later ones."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._kept: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, texts: Sequence[Any], *, progress: bool = False) -> torch.Tensor:
        """Encode N outputs as (N, \\*D); texts that are kept cost nothing."""
        return self._recent("output", self._encoder.encode, texts, progress)

    def encode_prompts(self, texts: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        """Encode N prompts as (N, C); those that are kept cost nothing."""
        encode = getattr(self._encoder, "encode_prompts", self._encoder.encode)
        return self._recent("prompt", encode, texts, progress)

    def _recent(self, kind: str, encode: Callable[..., Any], texts: Sequence[Any], progress: bool) -> torch.Tensor:
        if not all(isinstance(text, str) for text in texts):
            return torch.as_tensor(encode(texts, progress=progress))
        found = {text: self._kept[kind, text] for text in texts if (kind, text) in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            vectors = torch.as_tensor(encode(missing, progress=progress)).detach().cpu()
            if vectors.ndim < 2 or len(vectors) != len(missing):
                return vectors  # whoever asked checks shapes, and says what is wrong
            found |= {text: vector.clone() for text, vector in zip(missing, vectors, strict=True)}
        for text, vector in found.items():
            self._kept[kind, text] = vector
            self._kept.move_to_end((kind, text))
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return torch.stack([found[text] for text in texts])


@dataclass
class _Waiting:
    """One prompt whose draws are under way."""

    prompt: Prompt
    key: str
    first: int
    draw: Draw | None = None
    log_odds: list[float] = field(default_factory=list)
    asked: int = 0
    waves: int = 0
    more: int = 0

    def take(self, draw: Draw) -> None:
        """Add the draw of a wave."""
        if self.draw is None:
            self.draw = draw
        else:
            self.draw.extend(draw)
        self.asked += self.more
        self.waves += 1
        self.more = 0

    def end(self, plan: Plan, ended: str, decision: Decision | None = None) -> None:
        """Note why no more is drawn."""
        assert self.draw is not None
        spent: dict[str, Any] = {"draws": len(self.draw.texts) + self.draw.dropped, "waves": self.waves}
        spent |= {"max_n": plan.max_n, "ended": ended}
        if decision is not None and decision.price is not None:
            gain = decision.expected_gain
            spent |= {"expected_gain": None if gain is None else round(gain, 6), "price": round(decision.price, 6)}
        self.draw.spent = spent

    def tokens(self) -> float | None:
        """Return the mean tokens of a draw; where the generator does not count them, by its characters."""
        assert self.draw is not None
        count = len(self.draw.texts) + self.draw.dropped
        told = self.draw.usage.get("completion_tokens")
        if told is None:
            told = sum(len(text) for text in self.draw.texts if isinstance(text, str)) / CHARACTERS_A_TOKEN
        return told / count if count else None


def drawn_in_waves(
    generator: Any,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    first: Sequence[int],
    plan: Plan,
    log_odds: Callable[[list[list[Any]], list[str]], list[list[float]]],
) -> Iterator[Draw]:
    """Yield one draw a prompt, in order, each with as many texts as the plan asks for.

    What stops everything (KeyboardInterrupt, a failing encoder) is raised after what is drawn has been given, marked
    as interrupted. A prompt whose generator fails keeps what it has, with the error.

    Args:
        generator: with ``draws``. prompts, keys: as they are asked, and their texts.
        first: number of each prompt's first sample.
        plan: the stopping rule, its cap and its price.
        log_odds: gives logit b of outputs (one list a prompt) under the prompts' texts.
    """
    for start in range(0, len(prompts), PORTION):
        rows = range(start, min(start + PORTION, len(prompts)))
        portion = [_Waiting(prompts[row], keys[row], first[row]) for row in rows]
        try:
            _draw(generator, portion, plan, log_odds)
        except (Exception, KeyboardInterrupt) as error:
            for waiting in portion:
                if waiting.draw is None:  # and neither has any later one
                    break
                if waiting.draw.spent is None:
                    waiting.end(plan, "interrupted")
                    waiting.draw.error = waiting.draw.error or f"{type(error).__name__}: {error or 'interrupted'}"
                yield waiting.draw
            raise
        for waiting in portion:
            assert waiting.draw is not None
            yield waiting.draw


def _draw(
    generator: Any,
    portion: list[_Waiting],
    plan: Plan,
    log_odds: Callable[[list[list[Any]], list[str]], list[list[float]]],
) -> None:
    """Draw waves until every prompt has ended."""
    for waiting in portion:
        waiting.more = plan.first
    going = portion
    while going:
        numbers = [waiting.first + waiting.asked for waiting in going]
        before = [0 if waiting.draw is None else len(waiting.draw.texts) for waiting in going]
        prompts, sizes = [waiting.prompt for waiting in going], [waiting.more for waiting in going]
        drawn = uneven_draws(generator, prompts, sizes, numbers)
        for waiting, draw in zip(going, drawn, strict=True):
            waiting.take(draw)
        for waiting in going:
            if waiting.draw is not None and waiting.draw.error is not None:
                waiting.end(plan, "failed")
        open_still = [(waiting, at) for waiting, at in zip(going, before, strict=True) if not _ended(waiting)]
        rows = [waiting.draw.texts[at:] for waiting, at in open_still if waiting.draw is not None]
        found = log_odds(rows, [waiting.key for waiting, _ in open_still]) if open_still else []
        for (waiting, _), values in zip(open_still, found, strict=True):
            waiting.log_odds += values
            decision = plan.decide(waiting.log_odds, waiting.asked, waiting.tokens())
            waiting.more = decision.more
            if decision.ended is not None:
                waiting.end(plan, decision.ended, decision)
        going = [waiting for waiting in going if not _ended(waiting)]


def _ended(waiting: _Waiting) -> bool:
    return waiting.draw is not None and waiting.draw.spent is not None

"""What is doubtful about pairs as they stand: shortcuts, contradictions and columns that changed places."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pfm.data.identity import prompt_identity
from pfm.reasoning import training_text

if TYPE_CHECKING:
    from pfm.data.pairs import PreferencePairs

__all__ = ["doubts"]

ONE_SIDED = 0.9  # share of pairs from which length alone explains nearly all labels
FEW_PAIRS = 10  # too few for such a share to say anything
LOOKED_AT = 2000  # pairs, for columns that changed places
_WORD = re.compile(r"\w+")


def doubts(pairs: PreferencePairs) -> list[str]:
    """Return a sentence on each thing that a person should look at before fitting; none where all is well.

    >>> from pfm import PreferencePairs
    >>> row = {"prompt": "Why?", "chosen": "It rains.", "rejected": "No."}
    >>> turned = {"prompt": "Why?", "chosen": "No.", "rejected": "It rains."}
    >>> doubts(PreferencePairs.from_rows([row, turned]))[0][:32]
    '1 pair stands in both directions'
    """
    return [sentence for sentence in (_one_sided(pairs), _contradicted(pairs), _exchanged(pairs)) if sentence]


def _one_sided(pairs: PreferencePairs) -> str | None:
    """Say that one side is nearly always the longer one."""
    if len(pairs) < FEW_PAIRS:
        return None
    gap = _words(pairs.chosen) - _words(pairs.rejected)
    for word, share in (("longer", float((gap > 0).mean())), ("shorter", float((gap < 0).mean()))):
        if share >= ONE_SIDED:
            return (
                f"the chosen response is {word} in {share:.1%} of the pairs, so length alone explains nearly all "
                "labels: the flow may learn it and nothing else; compare at equal length before trusting it"
            )
    return None


def _contradicted(pairs: PreferencePairs) -> str | None:
    """Count the pairs that stand in the data with their sides exchanged too."""
    groups = pairs.group or [None] * len(pairs)
    keys = map(prompt_identity, pairs.prompts, groups)
    sides = Counter(zip(keys, pairs.chosen, pairs.rejected, strict=True))
    turned = ((number, sides.get((key, second, first), 0)) for (key, first, second), number in sides.items())
    count = sum(map(min, turned)) // 2
    if not count:
        return None
    stand = "1 pair stands" if count == 1 else f"{count:,} pairs stand"
    return (
        f"{stand} in both directions, each answer chosen over the other: if raters disagree, leave both, else remove "
        "the wrong one"
    )


def _exchanged(pairs: PreferencePairs) -> str | None:
    """Say that one response column reads as the prompts should.

    It must ask questions where the two others do not, be shorter than the prompt, and have less in common with the
    other response than the prompt has. Of the example and three public data sets this holds for none, and for all but
    one, whose prompts are instructions, once the prompt has changed places with either response.
    """
    prompts, sides = pairs.prompts[:LOOKED_AT], {"chosen": pairs.chosen, "rejected": pairs.rejected}
    if len(prompts) < 2 * FEW_PAIRS or not pairs.has_prompts:
        return None
    asks = {name: _asking(column[:LOOKED_AT]) for name, column in {"prompt": prompts, **sides}.items()}
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if asks[name] < 0.25 or max(asks["prompt"], asks[other]) > 0.1:
            continue
        if np.median(_words(sides[name][:LOOKED_AT])) >= np.median(_words(prompts)):
            continue  # a clarifying question, which answers the prompt
        nearer = [
            _overlap(prompt, answer) > _overlap(suspect, answer)
            for prompt, suspect, answer in zip(prompts, sides[name], sides[other], strict=False)
        ]
        if np.mean(nearer) >= 0.5:
            return (
                f"{asks[name]:.0%} of column {name!r} are questions, but {asks['prompt']:.0%} of the prompts and "
                f"{asks[other]:.0%} of {other!r}: did the columns of prompt and {name} change places?"
            )
    return None


def _words(texts: Sequence[str]) -> NDArray[np.int64]:
    words = {text: len(training_text(text).split()) for text in dict.fromkeys(texts)}
    return np.array([words[text] for text in texts], dtype=np.int64)


def _asking(texts: Sequence[str]) -> float:
    """Return the share of texts that end with a question mark."""
    return float(np.mean([text.rstrip().endswith(("?", "？", "؟")) for text in texts]))


def _overlap(one: str, other: str) -> float:
    """Return the share of the words of either text that both have (Jaccard's index)."""
    first, second = (set(_WORD.findall(text.lower())) for text in (one, other))
    return len(first & second) / max(1, len(first | second))

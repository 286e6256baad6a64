"""A judge that is asked less often: a preference model says who is favoured, and the judge where that is open.

Three savings, each of which can be had alone:

- *pivots*: the best of n candidates is found by n - 1 comparisons with the best so far, begun with the model's
  favourite, in place of n (n - 1) / 2;
- *one order*: a judge that leans to the place shown first is asked with the favourite in the other place; if the
  favourite wins all the same, the second order cannot turn the verdict, and is not asked for;
- *sure pairs*: where the model's probability is at least ``sure``, its verdict stands. What that costs is audited: a
  share of such pairs goes to the judge all the same, and the errors are counted.

Verdicts that the model gave alone say nothing about the model: they must not be labels to train it on, nor judge it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pfm._internal.checks import check_seed
from pfm.data.conversations import conversation_text
from pfm.errors import GenerationError
from pfm.generators.base import Prompt
from pfm.judges.base import NO_VOTES, Comparison, Judge, Verdict
from pfm.protocols import Flow
from pfm.reasoning import judged_text

__all__ = ["Pick", "SparingJudge", "SparingTally", "pair_probability"]

Probability = Callable[[Sequence[Comparison]], Sequence[float]]

WARM_UP = 8  # pairs that are asked in both orders before a lean to one place is believed
NORMAL = 1.959964  # quantile of a 95% interval


@dataclass
class SparingTally:
    """Counts what was asked of the judge, and what was left to the model.

    Attributes:
        pairs: asked for. one_order, both_orders: of these, judged by one question or by two.
        left: decided by the model alone. audited: sure pairs that went to the judge all the same.
        wrong: of these, those on which judge and model named different winners.
        lean: verdicts for what was shown first minus those for what was shown second, of pairs asked in both orders.
    """

    pairs: int = 0
    one_order: int = 0
    both_orders: int = 0
    left: int = 0
    audited: int = 0
    wrong: int = 0
    lean: int = 0

    @property
    def questions(self) -> int:
        """Count the questions to the judge; in both orders for all pairs it would be twice ``pairs``."""
        return self.one_order + 2 * self.both_orders

    @property
    def error_rate(self) -> tuple[float, float, float] | None:
        """Return the share of wrong verdicts on audited pairs, and its 95% interval (Wilson 1927); None without any."""
        if not self.audited:
            return None
        n, share, z = self.audited, self.wrong / self.audited, NORMAL
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return share, max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Pick:
    """The best of a prompt's responses.

    Attributes:
        index: of it. met: the others that it was compared with by the judge. left: those left to the model.
    """

    index: int
    met: tuple[int, ...]
    left: tuple[int, ...]


class SparingJudge(Judge):
    """Asks another judge only where a preference model leaves it open.

    Args:
        judge: the judge. One that asks in both orders (``both_orders``) is asked in one order first.
        probability: gives for comparisons the probability that the first is better, (N,) in [0, 1]; such as
            :func:`pair_probability` of a flow.
        sure: from which probability of the favourite on the model decides alone; 1 never.
        audit: share of sure pairs that go to the judge all the same.
        seed: of that choice, which depends on the texts alone.

    Raises:
        ValueError: a number is out of range. TypeError: the judge does not compare.

    >>> from pfm.judges import ScriptedJudge
    >>> longer = SparingJudge(ScriptedJudge(lambda prompt, text: len(text)), lambda pairs: [0.5] * len(pairs))
    >>> longer.pick("Tea?", ["no", "maybe", "yes"]).index
    1
    >>> longer.tally.questions
    2
    """

    def __init__(
        self, judge: Judge, probability: Probability, *, sure: float = 1.0, audit: float = 0.1, seed: int = 0
    ) -> None:
        seed = check_seed(seed)
        if not callable(getattr(judge, "compare", None)) or not callable(probability):
            raise TypeError("judge must have compare(comparisons), and probability must be a function of comparisons")
        if not 0.5 < sure <= 1:
            raise ValueError(f"sure must be a probability above 0.5, up to 1 (the judge decides all): got {sure!r}")
        if not 0 <= audit <= 1:
            raise ValueError(f"audit must be a share of the sure pairs, from 0 to 1: got {audit!r}")
        self.judge_itself, self.probability = judge, probability
        self.sure, self.audit, self.seed = sure, audit, seed
        self.name, self.against = judge.name, judge.against
        self.tally = SparingTally()
        self._one = _in_one_order(judge)

    @property
    def reasoning(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the judge's own way with hidden reasoning."""
        return self.judge_itself.reasoning

    @reasoning.setter
    def reasoning(self, value: str) -> None:
        self.judge_itself.reasoning = value
        if self._one is not None:
            self._one.reasoning = value

    def describe(self) -> dict[str, Any]:
        """Describe the judge, and that its second order is asked for where the first leaves the winner open."""
        return self.judge_itself.describe() | ({} if self._one is None else {"both_orders": "where open"})

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison; those that the model gave alone are marked ``by_model``."""
        return self._compare(comparisons, self._checked(comparisons))

    def pick(self, prompt: Prompt, responses: Sequence[str]) -> Pick:
        """Return the best of n ≥ 1 responses by at most n - 1 comparisons with the best so far.

        The model's favourite begins; the others challenge it from the most to the least favoured. A tie keeps the one
        that was there. Responses that are the same text are one.

        Raises:
            ValueError: there is no response.
            GenerationError: the judge gave no verdict on a pair.
        """
        places = list(
            {judged_text(text, self.reasoning): place for place, text in reversed(list(enumerate(responses)))}.values()
        )
        places.sort()
        if not places:
            raise ValueError("responses must hold at least one text, got none")
        pairs = [(i, j) for i in places for j in places if i < j]
        found = self._checked([Comparison(prompt, responses[i], responses[j]) for i, j in pairs])
        table = {pair: p for pair, p in zip(pairs, found, strict=True)}
        table |= {(j, i): 1 - p for (i, j), p in table.items()}
        wins = {place: sum(table[place, other] for other in places if other != place) for place in places}
        best, *others = sorted(places, key=lambda place: (-wins[place], place))
        met, left = [], []
        for other in others:
            asked = Comparison(prompt, responses[best], responses[other])
            (verdict,) = self._compare([asked], [table[best, other]])
            if not verdict.given:
                raise GenerationError(f"{self.name} gave no verdict on responses {best} and {other}: {verdict.error}")
            (left if verdict.by_model else met).append(other)
            if verdict.probability < 0.5:
                best = other
        return Pick(best, tuple(place for place in (*met,) if place != best), tuple(left))

    def _checked(self, comparisons: Sequence[Comparison]) -> list[float]:
        found = [float(p) for p in self.probability(comparisons)] if comparisons else []
        if len(found) != len(comparisons):
            raise ValueError(f"probability must give one number a comparison: got {len(found)} for {len(comparisons)}")
        # What the model cannot say is the judge's to decide.
        return [p if 0 <= p <= 1 else 0.5 for p in found]

    def _compare(self, comparisons: Sequence[Comparison], probabilities: Sequence[float]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(comparisons)
        audits = []
        for row, (comparison, p) in enumerate(zip(comparisons, probabilities, strict=True)):
            if self.sure < 1 and max(p, 1 - p) >= self.sure:
                if self._audits(comparison):
                    audits.append(row)
                else:
                    verdicts[row] = Verdict(p, by_model=True)
        asked = [row for row, verdict in enumerate(verdicts) if verdict is None]
        given = self._asked([comparisons[row] for row in asked], [probabilities[row] for row in asked])
        for row, verdict in zip(asked, given, strict=True):
            verdicts[row] = verdict
        self.tally.pairs += len(comparisons)
        self.tally.left += len(comparisons) - len(asked)
        found = [verdict for verdict in verdicts if verdict is not None]
        for row in audits:
            if found[row].given:
                self.tally.audited += 1
                self.tally.wrong += (found[row].probability - 0.5) * (probabilities[row] - 0.5) < 0
        return found

    def _asked(self, comparisons: Sequence[Comparison], probabilities: Sequence[float]) -> list[Verdict]:
        if self._one is None:  # a judge without orders
            self.tally.one_order += len(comparisons)
            return self.judge_itself.compare(comparisons)
        warm_up = max(0, WARM_UP - self.tally.both_orders)
        verdicts = self._in_both(comparisons[:warm_up])
        rest = list(zip(comparisons[warm_up:], probabilities[warm_up:], strict=True))
        if not rest:
            return verdicts
        # The favourite stands where the judge leans to the other place.
        turned = [(p >= 0.5) == (self.tally.lean >= 0) for _, p in rest]
        first = self._one.compare([_turned(c) if turn else c for (c, _), turn in zip(rest, turned, strict=True)])
        first = [_turned_verdict(v) if turn else v for v, turn in zip(first, turned, strict=True)]
        settled = [
            v.given and (v.probability > 0.5) == (p >= 0.5) and v.probability != 0.5
            for v, (_, p) in zip(first, rest, strict=True)
        ]
        pending = [row for row, done in enumerate(settled) if not done]
        second = self._one.compare([rest[row][0] if turned[row] else _turned(rest[row][0]) for row in pending])
        for row, verdict in zip(pending, second, strict=True):
            first[row] = _joined(first[row], verdict if turned[row] else _turned_verdict(verdict))
        self.tally.one_order += len(rest) - len(pending)
        self.tally.both_orders += len(pending)
        return verdicts + first

    def _in_both(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        assert self._one is not None
        if not comparisons:
            return []
        shown = self._one.compare([*comparisons, *map(_turned, comparisons)])
        half = len(comparisons)
        self.tally.lean += sum((v.probability > 0.5) - (v.probability < 0.5) for v in shown if v.given)
        self.tally.both_orders += half
        return [_joined(one, _turned_verdict(two)) for one, two in zip(shown[:half], shown[half:], strict=True)]

    def _audits(self, comparison: Comparison) -> bool:
        key = "\0".join([str(self.seed), conversation_text(comparison.prompt), *sorted(comparison[1:])])
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.audit * 2**64


def pair_probability(flow: Flow, encoder: Any) -> Probability:
    """Return the function that gives, by a flow's b, the probability that the first of two outputs is better.

    With a preference model it is that of the model; else the difference of the log-odds of b, which is Bradley–Terry's
    of the two outputs.

    Args:
        flow: fitted on vectors of the encoder, and never on labels of the outputs that are to be compared.
        encoder: with ``encode``, and ``encode_prompts`` where the flow takes contexts.
    """

    def probability(comparisons: Sequence[Comparison]) -> list[float]:
        import torch

        if not comparisons:
            return []
        texts = [[judged_text(text, "strip") for text in pair[1:]] for pair in comparisons]
        usable = [all(text.strip() for text in pair) for pair in texts]
        kept = [row for row, good in enumerate(usable) if good]
        found = [0.5] * len(comparisons)
        if not kept:
            return found
        distinct = {text: at for at, text in enumerate(dict.fromkeys(text for row in kept for text in texts[row]))}
        vectors = torch.as_tensor(encoder.encode(list(distinct), progress=False)).detach().float().cpu()
        first, second = (vectors[[distinct[texts[row][side]] for row in kept]] for side in (0, 1))
        context = None
        if flow.metadata.get("context_dimension"):
            prompts = [conversation_text(comparisons[row].prompt) for row in kept]
            encode = getattr(encoder, "encode_prompts", encoder.encode)
            context = torch.as_tensor(encode(prompts, progress=False)).detach().float().cpu()
        model = getattr(flow, "preference", None)
        if model is not None:
            odds = model.score(first, second, context)
        else:
            odds = torch.logit(flow.win_probability(first, context).double(), eps=1e-6)
            odds = odds - torch.logit(flow.win_probability(second, context).double(), eps=1e-6)
        for row, value in zip(kept, torch.sigmoid(odds.detach().cpu().double()).tolist(), strict=True):
            found[row] = value
        return found

    return probability


def _in_one_order(judge: Judge) -> Judge | None:
    """Return the judge asking in one order only, with the same tally; None for one that does not ask in both."""
    if not getattr(judge, "both_orders", False):
        return None
    twin: Any = object.__new__(type(judge))  # not copy.copy, which goes by what pickles keep
    twin.__dict__.update(judge.__dict__)
    twin.both_orders = False
    return twin


def _turned(comparison: Comparison) -> Comparison:
    return Comparison(comparison.prompt, comparison.second, comparison.first)


def _turned_verdict(verdict: Verdict) -> Verdict:
    votes = dict(verdict.votes) | {"first": verdict.votes["second"], "second": verdict.votes["first"]}
    return replace(verdict, probability=1 - verdict.probability, votes=votes)


def _joined(one: Verdict, two: Verdict) -> Verdict:
    votes = {name: one.votes[name] + two.votes[name] for name in NO_VOTES}
    return Verdict((one.probability + two.probability) / 2, votes, one.error or two.error)

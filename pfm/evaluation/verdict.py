"""The verdict and the warnings of a report card, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pfm.evaluation.candidates import Candidates
from pfm.evaluation.overshoot import past_its_best
from pfm.evaluation.results import Failure, MethodRow, Verdict
from pfm.statistics import sign_test, warn_of_few

__all__ = ["find_warnings", "judge_method"]


def find_warnings(table: Candidates, failures: Sequence[Failure]) -> list[str]:
    """Return one sentence for each reason to distrust the figures."""
    rows, n = table.rows, len(table.rows)
    warnings = []
    few = warn_of_few(table.prompts)
    if few is not None:
        warnings.append(few)
    if table.prompts < n:
        warnings.append(
            f"{n} rows have {table.prompts} different prompts: intervals and tests are over prompts, all rows of one "
            "prompt together."
        )
    lost = sum(not failure.evaluated for failure in failures)
    if lost:
        warnings.append(f"{lost} of {n + lost} prompts failed and are not in the figures.")
    same = sum(len(set(row.candidates)) == 1 for row in rows)
    if same:
        warnings.append(
            f"At {same} of {n} prompts all candidates are the same text, so that no method could change "
            "anything: raise the generator's temperature or the number of candidates."
        )
    flat = sum(len(set(row.candidates)) > 1 and np.ptp(row.scores) == 0 for row in rows)
    if flat > n / 4:
        warnings.append(f"At {flat} of {n} prompts the judge gives all candidates the same score.")
    judged = [row for row in rows if row.probabilities is not None]
    past = past_its_best(
        [row.probabilities for row in judged if row.probabilities is not None], [row.scores for row in judged]
    )
    if past is not None:
        best, gain = past
        most = max(len(row.candidates) for row in judged)
        warnings.append(
            f"{most} candidates are past the best number: best of {best} by b scores {gain.text(signed=True)} more. "
            "Draw fewer, or choose n and a softer selection on validation data (pfm.evaluation.choose_selection)."
        )
    return warnings


def judge_method(measured: Sequence[MethodRow], table: Candidates, method: str, warnings: list[str]) -> Verdict:
    """Judge by the win rate against the original, then by the strongest baseline, then by length.

    "helps" and "hurts" need both a bootstrap interval that excludes one half and an exact sign test below
    0.05: with few prompts the bootstrap alone is overconfident. With fewer than six that differ no result could pass.
    """
    by_name = {row.name: row for row in measured}
    tested, gain = by_name[method], by_name["identity"].difference
    weights = table.weights(method)
    shares = table.by_prompt(table.mean(weights, table.win))
    best = max((row for row in measured if row.name not in (method, "oracle")), key=lambda row: row.score.value)
    wins, losses, count = int((shares > 0.5).sum()), int((shares < 0.5).sum()), shares.size
    p_value = sign_test(wins, losses)
    ahead = p_value < 0.05 and tested.win.low > 0.5
    behind = p_value < 0.05 and tested.win.high < 0.5

    name, change = "the flow" if method == "pfm" else tested.label, gain.text(signed=True)
    first = f"it wins {tested.win.text(percent=True)} against the original "
    first += f"({count} prompts: {wins} better, {losses} worse, {count - wins - losses} equal)"
    if not (weights * table.changed).any():
        outcome, headline = "no evidence", f"{name} changed nothing"
        first = f"it kept the original at all {count} prompts"
    elif (ahead and gain.high < 0) or (behind and gain.low > 0):
        outcome, headline = "mixed", f"the evidence on {name} is mixed"
        first += f", yet it changes the mean judge score by {change}"
    elif ahead:
        outcome, headline = "helps", f"{name} helps"
    elif behind:
        outcome, headline = "hurts", f"{name} hurts"
    else:
        outcome, headline = "no evidence", f"no evidence that {name} helps"
        gained = gain.low > 0 or gain.high < 0
        few = wins > losses and sign_test(wins + losses, 0) >= 0.05
        if few:
            headline = f"too few prompts to tell whether {name} helps"
            first += f"; so few confirm nothing (sign test p = {p_value:.2g})"
        if gained:
            first += f"{'; ' if few else ', though '}it changes the mean judge score by {change}"
        if gained and best.name not in ("identity", "random") and best.difference.low <= 0:
            headline += f", and it is no better than {_phrase(best)}"

    reservations = []
    if outcome == "helps" and _by_length(tested):
        reservations.append("only by length")
    if outcome == "helps" and best.difference.high < 0:
        reservations.append(f"{_phrase(best)} does better")
    headline += f", but {' and '.join(reservations)}" if reservations else ""
    sentences = [first, *_beside_baselines(best, by_name.get("random")), *_at_equal_length(outcome, tested)]
    return Verdict(
        outcome=outcome,
        headline=_capitalised(headline),
        sentences=[f"{_capitalised(sentence)}." for sentence in sentences],
        warnings=warnings,
        wins=wins,
        losses=losses,
        ties=count - wins - losses,
        p_value=p_value,
    )


def _beside_baselines(best: MethodRow, chance: MethodRow | None) -> list[str]:
    """Compare with the strongest baseline, and with chance where the flow is not clearly above it."""
    phrase, ahead = _phrase(best), best.difference
    measured = f"difference in mean judge score {ahead.text(signed=True)}"
    if ahead.low > 0:
        sentences = [f"it is ahead of the strongest baseline, {phrase}: {measured}"]
    elif ahead.high < 0:
        sentences = [f"{phrase} does better: {measured}"]
    else:
        sentences = [f"{phrase} does as well, as far as these prompts can tell: {measured}"]
    if chance is not None and chance is not best and chance.difference.low <= 0:
        below = (
            "even a random candidate does better"
            if chance.difference.high < 0
            else "it is not above a random candidate"
        )
        sentences.append(f"{below}: difference {chance.difference.text(signed=True)}")
    return sentences


def _by_length(tested: MethodRow) -> bool:
    """Return whether equal length takes away the certainty of the gain and more than half of its size."""
    controlled = tested.win_controlled
    if controlled is None:
        return False
    return controlled.low <= 0.5 and controlled.value - 0.5 < (tested.win.value - 0.5) / 2


def _phrase(row: MethodRow) -> str:
    phrases = {
        "identity": "leaving the original alone",
        "random": "a random candidate",
        "longest": "the longest candidate",
        "mean_shift": "mean shift",
    }
    return phrases.get(row.name, row.label)


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _at_equal_length(outcome: str, tested: MethodRow) -> list[str]:
    controlled = tested.win_controlled
    if controlled is None:
        return []
    figure = controlled.text(percent=True)
    if outcome != "helps":
        if controlled.low > 0.5:
            return [f"at equal length it would win {figure}"]
        return []
    if controlled.low > 0.5:
        return [f"at equal length it still wins {figure}"]
    longer = f"its picks are {tested.length_ratio.value:.2f} times as long"
    if _by_length(tested):
        return [f"at equal length the gain vanishes: {figure}, and {longer}"]
    return [f"at equal length the gain is no longer certain: {figure}, and {longer}"]

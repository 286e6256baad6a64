"""From figures to words: what an audit says of a selector, and what it warns of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pfm.evaluation.auditing.choices import Choices
from pfm.evaluation.auditing.results import AuditRow, Finding
from pfm.statistics import Estimate

__all__ = ["find_warnings", "judge_selector"]

FEW_PROMPTS = 30


def find_warnings(choices: Choices, about: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each reason to distrust the figures."""
    warnings, n = [], choices.prompts
    if n < FEW_PROMPTS:
        warnings.append(
            f"Only {n} prompt{'s' * (n > 1)}: nothing but a large effect can show. Use {FEW_PROMPTS} or more, better "
            "several hundred."
        )
    dropped = sum(about["dropped"].values())
    if dropped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in about["dropped"].items())
        warnings.append(f"{dropped} rows were dropped ({reasons}) and are not in the figures.")
    if about["unreadable"]:
        warnings.append(
            f"{about['unreadable']} lines could not be read, so that their prompts are audited on the candidates that "
            "are left."
        )
    sets, single = len(choices.size), int((choices.size == 1).sum())
    if single:
        warnings.append(f"At {single} of {sets} prompts there is one candidate: no method could choose there.")
    spread = np.maximum.reduceat(choices.score, choices.start) - np.minimum.reduceat(choices.score, choices.start)
    flat = int(((spread == 0) & (choices.size > 1)).sum())
    if flat:
        warnings.append(
            f"At {flat} of {sets} prompts the judge gives all candidates the same score: no choice matters there."
        )
    for name, count in choices.undecided.items():
        if count:
            warnings.append(
                f"At {count} of {sets} prompts {name} gives all candidates the same score: it counts as a random "
                "candidate there."
            )
    if choices.text is not None and choices.size.max() > 1:
        keys = set(zip(choices.owner.tolist(), choices.text, strict=True))
        if len(keys) < len(choices.text):
            warnings.append(f"{len(choices.text) - len(keys)} candidates repeat the text of another of their prompt.")
    return warnings


def judge_selector(name: str, rows: Sequence[AuditRow], phrases: Mapping[str, str], percent: bool) -> Finding:
    """Hold one selector against the simple rules, then length, fitted baselines and the other selectors."""

    def written(estimate: Estimate) -> str:
        return estimate.text(percent=percent)

    def difference_of(estimate: Estimate, signed: bool = False) -> str:
        if not percent:
            return estimate.text(signed=signed)
        value, interval = _scaled(estimate, 100).parts(signed=signed, decimals=1)
        return f"{value} points {interval}"

    by_name = {row.name: row for row in rows}
    tested, random, oracle = by_name[name], by_name["random"], by_name["oracle"]
    if tested.gap_closed is None:
        sentence = "The judge scores all candidates of every prompt alike, so that every method reaches the same score."
        return Finding(name, "nothing to choose", f"There is nothing for {name} to choose", [sentence])
    rules = sorted((row for row in rows if row.kind == "rule"), key=lambda row: -row.score.value)
    signs = {row.name: row.difference(name).sign for row in rules}
    better = [row for row in rules if signs[row.name] < 0]
    level = [row for row in rules if signs[row.name] == 0]
    sentences = [
        f"{name} reaches {written(tested.score)} and closes {tested.gap_closed.text(percent=True)} of the gap from a "
        f"random candidate ({written(random.score)}) to the oracle ({written(oracle.score)})"
    ]
    if better:
        outcome, headline = "behind", f"{_capital(phrases[better[0].name])} beats {name}"
        sentences += [f"{phrases[row.name]} reaches {written(row.score)}: {name} is behind by "
                      f"{difference_of(_scaled(row.difference(name).value, -1))}" for row in better]  # fmt: skip
    elif level:
        outcome = "indistinguishable"
        headline = f"{name} is not distinguishable from {phrases[level[0].name]}"
    else:
        outcome, headline = "ahead", f"{name} is ahead of every simple rule"
        best = rules[0]
        sentences.append(
            f"the strongest rule, {phrases[best.name]}, reaches {written(best.score)}: {name} is ahead by "
            f"{difference_of(best.difference(name).value, True)}"
        )
    if level:
        differences = "; ".join(
            f"{phrases[row.name]}, {difference_of(row.difference(name).value, True)}" for row in level
        )
        sentences.append(f"it is not distinguishable from {differences}")
    sentences += _at_equal_length(tested)
    for row in rows:
        if row.kind == "fitted" or (row.kind == "selector" and row is not tested):
            sentences.append(_beside(name, row, phrases[row.name], difference_of))
    return Finding(
        name,
        outcome,
        headline,
        [f"{sentence if sentence.startswith(name) else _capital(sentence)}." for sentence in sentences],
    )


def _beside(name: str, row: AuditRow, phrase: str, written: Callable[..., str]) -> str:
    """Compare a selector with a fitted baseline or another selector."""
    difference, other = row.difference(name), phrase
    if row.kind == "fitted":
        other += " that was fitted on other prompts"
    if difference.sign == 0:
        return f"{name} is not distinguishable from {other}: difference {written(difference.value, True)}"
    state, size = "ahead of" if difference.sign > 0 else "behind", _scaled(difference.value, difference.sign)
    return f"{name} is {state} {other} by {written(size)}"


def _at_equal_length(tested: AuditRow) -> list[str]:
    win, controlled = tested.win, tested.win_controlled
    if win is None or controlled is None:
        return []
    figures = f"{controlled.text(percent=True)}, as measured {win.text(percent=True)}"
    if win.low > 0.5 >= controlled.low and controlled.value - 0.5 < (win.value - 0.5) / 2:
        return [f"at equal length its lead over the other candidates vanishes: its picks win {figures}"]
    return [f"at equal length its picks win {figures}, against the other candidates"]


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    ends = sorted((factor * estimate.low, factor * estimate.high))
    return Estimate(factor * estimate.value, *ends)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]

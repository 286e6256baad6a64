"""A judge that follows a rule: a function, or patterns that count."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pfm.generators.base import Prompt
from pfm.judges.base import ScoringJudge

__all__ = ["ScriptedJudge"]

Rule = Callable[[Any, str], float] | str | re.Pattern[str] | Mapping[str, float]


class ScriptedJudge(ScoringJudge):
    """Judges by a rule that scores one output.

    Args:
        rule: a function ``(prompt, response) -> number``, higher is better; or a regular expression, of which every
            match counts 1; or several with what a match of each counts.
        temperature: None takes the higher score as certain; else P = sigmoid(difference / temperature).
        name: what reports call it.

    Raises:
        TypeError: the rule is nothing of these.
        ValueError: an expression is not valid.

    >>> judge = ScriptedJudge(r"[?]", name="questions")
    >>> judge.scores(["Hello"] * 2, ["Hello!", "Hello? Who is it?"])
    [0.0, 2.0]
    """

    def __init__(self, rule: Rule, *, temperature: float | None = None, name: str | None = None) -> None:
        super().__init__(temperature=temperature)
        self._patterns: list[tuple[re.Pattern[str], float]] = []
        self._function: Callable[[Any, str], float] | None = None
        if isinstance(rule, str | re.Pattern):
            rule = {rule: 1.0}  # pyright: ignore[reportAssignmentType]
        if isinstance(rule, Mapping):
            self._patterns = [(_compiled(pattern), float(weight)) for pattern, weight in rule.items()]
            shown = ", ".join(f"{weight:g} × /{pattern.pattern}/" for pattern, weight in self._patterns)
        elif callable(rule) and not isinstance(rule, type):
            _check_two(rule)
            self._function = rule
            shown = getattr(rule, "__qualname__", type(rule).__name__)
        else:
            raise TypeError(
                f"rule must be a function (prompt, response) -> number, a regular expression, or a dict of expressions "
                f"and what a match counts; got {type(rule).__name__}"
            )
        self.name = name or shown

    def __repr__(self) -> str:
        return f"ScriptedJudge({self.name})"

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Apply the rule to each response."""
        return [self._score(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Describe the rule by its name; the code of a function is not part of it."""
        rules = [[pattern.pattern, pattern.flags, weight] for pattern, weight in self._patterns]
        return {"type": type(self).__name__, "name": self.name, "rules": rules, "temperature": self.temperature}

    def _score(self, prompt: Prompt, text: str) -> float:
        if self._function is not None:
            return float(self._function(prompt, text))
        return sum(weight * sum(1 for _ in pattern.finditer(text)) for pattern, weight in self._patterns)


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule: {pattern!r} is no regular expression: {error}") from None


def _check_two(rule: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(rule)
    except (TypeError, ValueError):  # some built-ins have none to read
        return
    try:
        signature.bind("prompt", "response")
    except TypeError as error:
        raise TypeError(f"rule must be callable as rule(prompt, response), got {signature}: {error}") from None

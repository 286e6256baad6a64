"""When to stop drawing: the rule behind ``n="auto"``.

Every wave of draws is a box of Pandora's problem (Weitzman 1979): it costs its price and may hold a candidate better
than the best so far. Opening goes on while the expected gain of the next wave exceeds its price. With v = logit b,

- the draws of one prompt are v = mu + s r, with the prompt's level mu and spread s, and one law of r for all prompts;
- k draws tell the level together with a prior worth ``prior`` draws, mu_k = (prior * level + sum v) / (prior + k), and
  the spread with one worth ``spread_prior`` draws; a further draw lies at mu_k + s_k r sqrt(1 + 1 / (prior + k));
- the gain counts in win probability against the prompt's own draws, as at a prompt of mean spread: with the lead t =
  (max v - mu_k) / s_k, the next w draws are worth E[max over them of sigmoid(r) - sigmoid(t)]+.

For draws whose quantile is known (an infinite prior, sigmoid(r) uniform) and single draws this stops at a quantile of 1
- sqrt(2 * price); at the price whose mean quantile equals that of n draws, it takes (n + 1) / 2 draws on average.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfm._internal.checks import check_finite, check_number, check_whole
from pfm._internal.files import replace_json

__all__ = ["FILE", "Decision", "Plan", "Spend", "Stopping"]

FILE = "stopping.json"  # beside a saved flow
KIND = "pfm stopping rule"
CHARACTERS_A_TOKEN = 4  # where a generator does not count its tokens


@dataclass(frozen=True)
class Spend:
    """The price of a draw, or of a token, in win probability; neither: that of the calibration.

    >>> Spend.read(0.01)
    Spend(draw=0.01, token=None)
    >>> Spend.read({"token": 1e-5})
    Spend(draw=None, token=1e-05)
    """

    draw: float | None = None
    token: float | None = None

    @classmethod
    def read(cls, value: Any) -> Spend:
        """Read None, a number (the price of a draw), or a mapping with ``draw`` or ``token``.

        Raises:
            ValueError: a price is no number, negative or not finite, or a name is unknown.
        """
        if value is None or isinstance(value, Spend):
            return value or cls()
        if isinstance(value, Mapping):
            unknown = [str(name) for name in value if name not in ("draw", "token")]
            if unknown or len(value) != 1:
                raise ValueError(f"spend must hold the price of a 'draw' or of a 'token', got {dict(value)!r}")
            (name, price), *_ = value.items()
        else:
            name, price = "draw", value
        hint = "the price of a draw in win probability, as 0.01, or {'token': 1e-5}"
        return cls(**{name: float(check_number("spend", price, least=0, hint=hint))})


@dataclass(frozen=True)
class Decision:
    """What to do after a wave.

    Attributes:
        more: draws of the next wave; 0 to stop.
        ended: why drawing stops ("good enough", "cap", "fixed n"; "all the same" where n draws do not differ), or None.
        expected_gain: of the next wave, in win probability; None where there is none.
        price: of the next wave, in the same unit; None where there is none.
    """

    more: int
    ended: str | None = None
    expected_gain: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Stopping:
    """A calibrated stopping rule: made by :func:`pfm.refiner.calibrate`, saved beside its flow.

    Attributes:
        n: the fixed number of draws that the rule replaces.
        max_n: the most draws that it was calibrated with.
        waves: sizes of the waves; the last one is repeated.
        price: of a draw in win probability, at which the mean held-out score is that of ``n`` draws.
        level, prior: mean logit b of all prompts, and how many draws it is worth in telling the level of one.
        residuals: quantiles of logit b about its prompt's level, at mean spread, in rising order.
        spread, spread_prior: root mean square of logit b about its prompt's level, and how many draws it is worth in
            telling the spread of one prompt; infinity where all prompts have the same.
        refusal: why held-out scores do not confirm the rule, so that ``n`` draws are taken; None if they do.
        evidence: what the calibration measured on prompts that it had left out, as JSON values.
    """

    n: int
    max_n: int
    waves: tuple[int, ...]
    price: float
    level: float
    prior: float
    residuals: tuple[float, ...]
    spread: float = 1.0
    spread_prior: float = math.inf
    refusal: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n", "max_n"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), 1))
        object.__setattr__(self, "waves", read_waves(self.waves))
        object.__setattr__(self, "residuals", tuple(float(value) for value in self.residuals))
        if not self.residuals or list(self.residuals) != sorted(self.residuals):
            raise ValueError("residuals must be quantiles in rising order, at least one")
        check_finite("residuals", np.array(self.residuals))
        check_number("price", self.price, least=0)
        check_number("level", self.level)
        check_number("spread", self.spread, above=0)
        check_number("prior", self.prior, least=0, also=(math.inf,))
        check_number("spread_prior", self.spread_prior, above=0, also=(math.inf,))

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.n} draws: {self.refusal}"
        evidence = self.evidence
        told = f", {evidence['draws']:.1f} draws on average where {self.n} were fixed" if "draws" in evidence else ""
        return f"up to {self.max_n} draws in waves of {', '.join(map(str, self.waves))}{told}"

    def plan(self, max_n: int | None = None, spend: Any = None) -> Plan:
        """Return the rule for one request: its cap, and the price of its draws."""
        return Plan(self, self.max_n if max_n is None else max_n, Spend.read(spend))

    # -- expected gains --------------------------------------------------------------------------------------------

    def lead(self, best: Any, mean: Any, squares: Any, drawn: Any) -> Any:
        """Return how far the best lies above its prompt's level, in units of its spread, times the mean spread.

        Args:
            best: highest logit b so far; arrays are taken elementwise. mean: of all so far. squares: sum of their
                squared differences from it. drawn: how many.
        """
        weight = self.prior / (self.prior + drawn) if math.isfinite(self.prior) else 1.0
        above = best - (weight * self.level + (1 - weight) * mean)
        if math.isinf(self.spread_prior):
            return above
        known = self.spread_prior * self.spread**2 + squares + weight * drawn * (mean - self.level) ** 2
        return above * self.spread / np.sqrt(known / (self.spread_prior + drawn))

    def gain(self, lead: float, drawn: int, wave: int) -> float:
        """Return what the next ``wave`` draws are expected to add, in win probability.

        Args:
            lead: of the best so far, see :meth:`lead`.
            drawn: draws so far.
            wave: draws to come.
        """
        quantiles, masses = self._best_of(drawn, wave)
        return float(np.maximum(quantiles - _sigmoid(lead), 0) @ masses)

    def threshold(self, drawn: int, wave: int, price: float) -> float:
        """Return the lead from which the next ``wave`` draws are not worth ``price`` each: the inverse of the gain."""
        quantiles, masses = self._best_of(drawn, wave)
        # From place j on, gain(u) = sum over i >= j of mass_i (quantile_i - u): linear between neighbouring quantiles.
        above = np.cumsum((masses * quantiles)[::-1])[::-1]
        mass = np.cumsum(masses[::-1])[::-1]
        found = (above - wave * price) / np.maximum(mass, 1e-300)
        place = int(np.searchsorted(quantiles - found, 0, side="left"))  # the first quantile at or above its solution
        u = found[min(place, len(found) - 1)]
        if u <= 0:
            return -math.inf
        return math.inf if u >= 1 else math.log(u / (1 - u))

    def _best_of(self, drawn: int, wave: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the best of ``wave`` further draws: values of sigmoid(r) (Q,), rising, and their masses."""
        widened = math.sqrt(1 + 1 / (self.prior + drawn)) if self.prior + drawn > 0 else math.inf
        quantiles = _sigmoid(self._residuals * min(widened, 1e6))
        steps = np.linspace(0, 1, len(quantiles) + 1) ** wave
        return quantiles, np.diff(steps)

    @cached_property
    def _residuals(self) -> NDArray[np.float64]:
        return np.array(self.residuals)

    # -- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; infinite priors become None."""
        values = asdict(self) | {"waves": list(self.waves), "residuals": list(self.residuals)}
        for name in ("prior", "spread_prior"):
            values[name] = values[name] if math.isfinite(values[name]) else None
        return {"kind": KIND, **values}

    @classmethod
    def from_dict(cls, values: Any) -> Stopping:
        """Rebuild from :meth:`to_dict`.

        Raises:
            ValueError: it is no stopping rule, or values are missing or out of range.
        """
        if not isinstance(values, Mapping) or values.get("kind") != KIND:
            raise ValueError(f'not a stopping rule: expected what Stopping.to_dict wrote, with "kind": "{KIND}"')
        names = list(cls.__dataclass_fields__)
        missing = [name for name in names if name not in values and name not in ("refusal", "evidence")]
        if missing:
            raise ValueError(f"a stopping rule needs {', '.join(missing)}; got {', '.join(map(str, values))}")
        found = {name: values[name] for name in names if name in values}
        for name in ("prior", "spread_prior"):
            found[name] = math.inf if found[name] is None else found[name]
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"a stopping rule is damaged: {error}") from error

    def save(self, path: str | os.PathLike[str], **more: Any) -> Path:
        """Write JSON to a file, or to ``stopping.json`` in a folder; ``more`` is noted beside."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        replace_json(path, self.to_dict() | more)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stopping:
        """Read what :meth:`save` wrote; a folder stands for its ``stopping.json``.

        Raises:
            FileNotFoundError: it is not there. ValueError: it is damaged.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Plan:
    """A stopping rule with the cap and the price of one request."""

    stopping: Stopping
    max_n: int
    spend: Spend = Spend()

    @property
    def first(self) -> int:
        """Return the size of the first wave."""
        rule = self.stopping
        return min(rule.n if rule.refusal is not None else rule.waves[0], self.max_n)

    def next_wave(self, asked: int) -> int:
        """Return the size of the wave after ``asked`` draws; 0 at the cap."""
        place, total, waves = 0, 0, self.stopping.waves
        while total < asked:
            total += waves[min(place, len(waves) - 1)]
            place += 1
        return max(0, min(waves[min(place, len(waves) - 1)], self.max_n - asked))

    def decide(self, log_odds: Sequence[float], asked: int, tokens: float | None = None) -> Decision:
        """Say whether to draw on.

        Args:
            log_odds: logit b of the candidates so far; those that are not finite count as worthless.
            asked: draws so far, unusable ones included.
            tokens: mean tokens of a draw so far, where the price is that of a token.
        """
        rule = self.stopping
        if rule.refusal is not None:
            return Decision(0, "fixed n")
        more = self.next_wave(asked)
        if not more:
            return Decision(0, "cap")
        price = more * self.price(tokens)
        values = np.array([value for value in log_odds if math.isfinite(value)])
        if not len(values):
            return Decision(more, None, None, price)
        if asked >= rule.n and values.min() == values.max():
            return Decision(0, "all the same", None, price)
        mean, count = float(values.mean()), len(values)
        lead = rule.lead(float(values.max()), mean, float(((values - mean) ** 2).sum()), count)
        gain = rule.gain(float(lead), count, more)
        return Decision(0, "good enough", gain, price) if gain <= price else Decision(more, None, gain, price)

    def price(self, tokens: float | None = None) -> float:
        """Return the price of one draw, in win probability."""
        if self.spend.draw is not None:
            return self.spend.draw
        if self.spend.token is not None:
            return self.spend.token * (tokens or 0.0)
        return self.stopping.price


def read_waves(waves: Any) -> tuple[int, ...]:
    """Return the sizes of the waves; one number stands for waves of that size.

    Raises:
        ValueError: a size is no whole number of at least 1, or there is none.
    """
    sizes = (waves,) if isinstance(waves, int) else tuple(waves) if isinstance(waves, Sequence) else ()
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"waves must be a number of draws, as 2, or a list of them, as [1, 1, 2, 4]: got {waves!r}")
    return sizes


def _sigmoid(values: Any) -> Any:
    return 0.5 + 0.5 * np.tanh(np.asarray(values, dtype=np.float64) / 2)

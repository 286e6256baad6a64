"""Win rates between sources, and the shares of a pool that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_number, check_shape
from pfm.devices import standard_defaults

__all__ = ["WinRates", "learned_shares", "maximin_shares", "winners_shares"]


@dataclass(frozen=True)
class WinRates:
    """Holds how K sources do against each other.

    ``rates`` (K, K) chance that row beats column, rates + rates' = 1; ``votes`` (K, K) weight of the pairs behind
    each, symmetric. Sources that were never compared are at 1/2.
    """

    names: tuple[str, ...]
    rates: Tensor
    votes: Tensor


def winners_shares(rates: Any, shares: Any) -> Tensor:
    """Return the share (K,) of each source among the winners of two draws of the pool: 2 alpha_k (W alpha)_k."""
    rates = _checked_rates(rates)
    shares = _checked_shares(shares, rates)
    return (2 * shares * (rates @ shares)).float()


@standard_defaults
def learned_shares(rates: Any, shares: Any = None, *, temperature: float = 0.1) -> Tensor:
    """Return the shares that beat the pool in use most often, at a price for departing from it.

    They maximise over alpha the mean chance to beat a draw of the pool, alpha . W alpha_0, less
    ``temperature`` KL(alpha || alpha_0); the solution is alpha_k ~ alpha_0k exp((W alpha_0)_k / temperature).

    Args:
        rates: :class:`WinRates`, or (K, K) chances that row beats column.
        shares: (K,) of the pool in use, alpha_0; None for equal ones.
        temperature: in units of chance a nat; towards 0 only the best source remains, towards infinity all stays.

    Raises:
        ValueError: rates + rates' is not 1, shares are negative or do not sum to 1, or the temperature is not positive.
    """
    rates = _checked_rates(rates)
    shares = torch.full((len(rates),), 1 / len(rates)) if shares is None else shares
    shares = _checked_shares(shares, rates)
    temperature = check_number("temperature", temperature, above=0)
    return (shares.log() + rates @ shares / temperature).softmax(0).float()


@standard_defaults
def maximin_shares(rates: Any) -> Tensor:
    """Return the shares that do best against their worst opponent: max over alpha of min over j of (alpha' W)_j.

    That is an optimal strategy of the symmetric game with these chances, the maximal lottery or von Neumann winner:
    defined for cycles of sources too, and the best source alone where one beats every other.
    It takes the rates at their word: sources of few votes look strong by chance, which a larger ``prior`` of
    :meth:`TaggedPairs.win_rates` guards against.
    """
    from scipy.optimize import linprog

    rates = _checked_rates(rates)
    count = len(rates)
    # Maximise the value u with alpha' W >= u for every column, alpha >= 0, sum alpha = 1.
    bounds = torch.cat([-rates.T, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    found = linprog(
        [0.0] * count + [-1.0], A_ub=bounds.numpy(), b_ub=[0.0] * count,
        A_eq=[[1.0] * count + [0.0]], b_eq=[1.0], bounds=[(0, None)] * count + [(None, None)],
    )  # fmt: skip
    if found.x is None:
        raise RuntimeError(f"no optimal shares were found: {found.message}")
    shares = torch.tensor(found.x[:count]).clamp_min(0)
    return (shares / shares.sum()).float()


def _checked_rates(rates: Any) -> Tensor:
    found = as_float_tensor("rates", rates.rates if isinstance(rates, WinRates) else rates).double()
    if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) == 0:
        raise ValueError(f"rates must be (K, K), the chance that row beats column: got {tuple(found.shape)}")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError("rates must lie in [0, 1] and be finite")
    off = (found + found.T - 1).abs()
    if float(off.max()) > 1e-4:
        row, column = divmod(int(off.argmax()), len(found))
        raise ValueError(
            f"rates must be skew about 1/2, rates[i, j] + rates[j, i] = 1: [{row}, {column}] and its mirror sum to "
            f"{float(found[row, column] + found[column, row]):g}"
        )
    return found


def _checked_shares(shares: Any, rates: Tensor) -> Tensor:
    from pfm.flow.composition import check_weights

    found = check_weights("shares", shares, len(rates))
    check_shape("shares", found, (len(rates),), "one a source")
    return found.double()

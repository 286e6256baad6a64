"""What a generator may spend, and what it has spent."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from pfm._internal.checks import check_whole
from pfm.errors import BudgetError
from pfm.generators.base import add_usage

__all__ = ["Budget"]


class Budget:
    """Counts calls and tokens over the life of a generator, and refuses calls beyond what is allowed.

    Args:
        max_calls: calls that may be made; None for no bound.
        max_tokens: tokens after which no further call is made. Calls under way are not cut off, so the total
            may pass it by what they take.

    Raises:
        ValueError: a bound is below 1.
    """

    def __init__(self, max_calls: int | None = None, max_tokens: int | None = None) -> None:
        for name, bound in (("max_calls", max_calls), ("max_tokens_total", max_tokens)):
            check_whole(name, bound, 1, also=(None,))
        self.max_calls = max_calls
        self.max_tokens = max_tokens
        self.calls = 0
        self.usage: dict[str, int] = {}
        self._estimated = 0
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Count one more call.

        Raises:
            BudgetError: it is not allowed.
        """
        with self._lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise BudgetError(f"the budget of max_calls={self.max_calls:,} is spent")
            tokens = self.usage.get("total_tokens", 0) + self._estimated
            if self.max_tokens is not None and tokens >= self.max_tokens:
                raise BudgetError(f"the budget of max_tokens_total={self.max_tokens:,} is spent ({tokens:,} tokens)")
            self.calls += 1

    def spend(self, usage: Mapping[str, int], characters: int) -> None:
        """Add what a call took; a server that does not say is taken to need a token for four characters."""
        with self._lock:
            add_usage(self.usage, usage)
            if "total_tokens" not in usage:
                self._estimated += -(-characters // 4)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

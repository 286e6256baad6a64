"""How speed is compared: ratios of processor time, taken in turns in one process, never wall time.

On a shared machine a second is worth more at one moment than at another, and a cache is warmer. So contestants take
turns in rotating order; each round gives one ratio of neighbours; the median of some rounds is one reading; and many
readings are taken. One contestant runs twice in every round: how far its two places differ is what the clock cannot
tell apart, and a race in which they differ by more than 5% is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pfm.statistics import Estimate

__all__ = ["STEADY", "Contestant", "Race", "device_clock", "race"]

Contestant = Callable[[int], object]
"""Does a number of equal units of work."""

STEADY = (0.95, 1.05)
_AGAIN = " again"


@dataclass(frozen=True)
class Race:
    """Holds the seconds a unit of every contestant, by its name: (readings, rounds).

    ``twin`` names the contestant that ran twice.
    """

    seconds: dict[str, NDArray[np.float64]]
    twin: str

    def ratio(self, of: str, to: str) -> Estimate:
        """Return the seconds of one contestant over those of another: how many times as fast the other is.

        The value is the median of the readings; the interval runs from the lowest to the highest of them, which of
        eight readings holds the median of all with a chance of 99%.
        """
        return _spread(np.median(self.seconds[of] / self.seconds[to], axis=1))

    def units_a_second(self, of: str) -> Estimate:
        """Return the units of work a second of the clock."""
        return _spread(np.median(1 / self.seconds[of], axis=1))

    @property
    def itself(self) -> Estimate:
        """Return the ratio of the contestant that ran twice to itself."""
        return self.ratio(self.twin + _AGAIN, self.twin)

    @property
    def steady(self) -> bool:
        """Tell whether the contestant that ran twice was equal to itself, within :data:`STEADY`."""
        return STEADY[0] <= self.itself.value <= STEADY[1]


def race(
    contestants: Mapping[str, Contestant],
    *,
    twin: str,
    block: float = 0.1,
    rounds: int = 5,
    readings: int = 8,
    tries: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> Race:
    """Let contestants take turns until there are enough readings.

    Args:
        contestants: the work, by name.
        twin: which of them runs twice in a round.
        block: seconds that one turn takes at least, so that the clock's grain does not count.
        rounds: rounds a reading. readings: how many.
        tries: races at most, if the twin does not come out equal to itself; the last one counts.
        clock: gives seconds.
    """
    if twin not in contestants:
        raise ValueError(f"twin must be one of {', '.join(contestants)}: got {twin!r}")
    runners = dict(contestants) | {twin + _AGAIN: contestants[twin]}
    units = {name: _units(work, block, clock) for name, work in contestants.items()}
    units[twin + _AGAIN] = units[twin]
    names = list(runners)
    found = None
    for _ in range(tries):
        seconds = {name: np.empty((readings, rounds)) for name in names}
        for turn in range(readings * rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                began = clock()
                runners[name](units[name])
                seconds[name].flat[turn] = (clock() - began) / units[name]
        found = Race(seconds, twin)
        if found.steady:
            break
    assert found is not None
    return found


def device_clock(device: torch.device) -> Callable[[], float]:
    """Return the clock for work on a device: processor time, or on CUDA the time until the work is done."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _units(work: Contestant, block: float, clock: Callable[[], float]) -> int:
    work(1)  # the first unit allocates
    units = 1
    while True:
        began = clock()
        work(units)
        took = clock() - began
        if took >= block:
            return units
        units = max(2 * units, int(1.2 * units * block / took)) if took > 0.1 * block else 4 * units


def _spread(readings: NDArray[np.float64]) -> Estimate:
    return Estimate(float(np.median(readings)), float(readings.min()), float(readings.max()))

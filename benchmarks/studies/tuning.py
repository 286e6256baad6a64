"""How often pfm.tune follows a flow, where nothing helps and where something does.

python -m benchmarks.studies.tuning [--sets 200] [--rows ...]
python -m benchmarks.studies.tuning --power 64 200 600 [--sets 40]

A flow is fitted on one set of Gaussian pairs and tuned on another, by all settings of the grid and by the win
probability alone (``weight=0``): no content is asked for, so that nothing but the test holds a setting back. The labels
of the pairs held out are random, and in most rows those of the fit as well; then no setting helps, and at one-sided 5%
one in twenty may be chosen. Beside it stands the same with labels of log-odds twice the first coordinate's lead.

The last row judges by independent numbers in place of labels. Rates stand with their exact 95% interval (Clopper &
Pearson 1934). What was run is kept in ``--folder`` and is not run again.

``--power`` fits no flow: all outputs are moved by one standard deviation, in a direction of which the gain in b is
known (:func:`shift_of`), and the held-out pairs, with labels of log-odds twice the first coordinate's lead, confirm it
or do not. The smaller the gain, the more of the move is along the second coordinate, which no label is about.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.studies.confirmation import pairs_of_prompts
from pfm import FlowConfig, PreferenceFlow
from pfm.flow import Setting, tune
from pfm.flow.tuning import HeldOutWin

__all__ = ["GAINS", "ROWS", "Row", "Shift", "confirmed_gains", "exact_interval", "followed", "main", "shift_of"]

SIGNAL = 2.0
GAINS = (0.0, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Row:
    """Holds how data sets are made: pairs of either set, whether labels of each tell something, and who judges."""

    pairs: int
    fitted: bool = False
    held_out: bool = False
    noise: bool = False

    def __str__(self) -> str:
        said = {False: "random", True: "with a signal"}
        return f"{self.pairs} | {said[self.fitted]} | {'random numbers' if self.noise else said[self.held_out]}"


ROWS = {
    "64": Row(64),
    "200": Row(200),
    "600": Row(600),
    "flow": Row(200, fitted=True),
    "64-signal": Row(64, fitted=True, held_out=True),
    "200-signal": Row(200, fitted=True, held_out=True),
    "600-signal": Row(600, fitted=True, held_out=True),
    "noise": Row(200, noise=True),
}


def followed(row: Row, seed: int, *, dimension: int = 8) -> Setting | None:
    """Return the setting that is chosen on one data set, None where outputs stay as they are."""
    fitted, held_out = (
        pairs_of_prompts(row.pairs, row.pairs, dimension, 2 * seed + place, signal=SIGNAL * told)
        for place, told in enumerate((row.fitted, row.held_out))
    )
    flow = PreferenceFlow.fit(fitted, FlowConfig(residual=False, seed=seed), progress=False)
    generator = torch.Generator().manual_seed(seed)

    def numbers(y: Tensor, context: Tensor | None) -> Tensor:
        return torch.rand(len(y), generator=generator)

    return tune(flow, held_out, weight=0.0, judge=numbers if row.noise else None, seed=seed, progress=False).best


@dataclass(frozen=True)
class Shift:
    """Moves every output by 1, so far along the first coordinate and the rest along the second: its gain is known."""

    ahead: float

    def transport(self, y: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        """Move outputs (N, D)."""
        moved = y.clone()
        moved[:, 0] += self.ahead
        moved[:, 1] += (1 - self.ahead**2) ** 0.5
        return moved


def shift_of(gain: float) -> float:
    """Return the distance along the first coordinate by which standard normal outputs gain that much in b.

    b(y) = E sigmoid(2 (y - y')) over standard normal y', and y - y' is normal with variance 2.

    >>> round(shift_of(0.1), 2)
    0.35
    """
    from scipy.optimize import brentq

    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    weights /= weights.sum()

    def beyond(distance: float) -> float:
        return float(weights @ (1 / (1 + np.exp(-SIGNAL * (distance + np.sqrt(2) * nodes))))) - 0.5 - gain

    return cast(float, brentq(beyond, -1e-9, 20.0)) if gain else 0.0


def confirmed_gains(pairs: int, seed: int, *, dimension: int = 8, gains: tuple[float, ...] = GAINS) -> dict[str, bool]:
    """Return which true gains are confirmed on one set of held-out pairs."""
    held_out = pairs_of_prompts(pairs, pairs, dimension, seed, signal=SIGNAL)
    judge = HeldOutWin.fit(held_out, seed=seed, progress=False)
    found = {}
    for gain in gains:
        flow = Shift(shift_of(gain))
        chosen = tune(flow, held_out, weight=0.0, judge=judge, settings=[Setting()], seed=seed, progress=False)
        found[str(gain)] = chosen.best is not None
    return found


def exact_interval(count: int, of: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Clopper & Pearson 1934).

    >>> [round(bound, 3) for bound in exact_interval(0, 200)]
    [0.0, 0.018]
    """
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(method="exact")
    return float(low), float(high)


def rate(name: str, sets: int, folder: Path) -> str:
    """Run what is left of a row's data sets; return the row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    found: dict[int, bool] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            each = json.loads(line)
            found[each["seed"]] = each["setting"] is not None
    with path.open("a", encoding="utf-8") as file:
        for seed in tqdm([seed for seed in range(sets) if seed not in found], desc=name, leave=False):
            setting = followed(ROWS[name], seed)
            found[seed] = setting is not None
            file.write(json.dumps({"seed": seed, "setting": None if setting is None else asdict(setting)}) + "\n")
            file.flush()
    count = sum(found[seed] for seed in range(sets))
    low, high = exact_interval(count, sets)
    return f"{ROWS[name]} | {count} of {sets} | {count / sets:.3f} [{low:.3f}, {high:.3f}]"


def power(pairs: int, sets: int, folder: Path) -> str:
    """Run what is left of the data sets with so many held-out pairs; return the row of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"power-{pairs}.jsonl"
    found: dict[int, dict[str, bool]] = {}
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {each["seed"]: each["confirmed"] for each in rows}
    with path.open("a", encoding="utf-8") as file:
        for seed in tqdm([seed for seed in range(sets) if seed not in found], desc=f"{pairs} pairs", leave=False):
            found[seed] = confirmed_gains(pairs, seed)
            file.write(json.dumps({"seed": seed, "confirmed": found[seed]}) + "\n")
            file.flush()
    cells = [str(pairs)]
    for gain in GAINS:
        count = sum(found[seed][str(gain)] for seed in range(sets))
        low, high = exact_interval(count, sets)
        cells.append(f"{count} of {sets}: {count / sets:.2f} [{low:.2f}, {high:.2f}]")
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--sets", type=int, default=200, help="data sets a row; rows with a signal take a fifth of it")
    parser.add_argument("--power", nargs="+", type=int, metavar="PAIRS", help="the table of true gains instead")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies/tuning"), help="where results are kept")
    options = parser.parse_args()
    if options.power:
        print("held-out pairs | " + " | ".join(f"gain {gain:g}" for gain in GAINS), flush=True)
        for pairs in options.power:
            print(power(pairs, options.sets, options.folder), flush=True)
        return
    print("pairs | labels of the fit | held-out labels | followed | rate", flush=True)
    for name in options.rows:
        sets = max(1, options.sets // 5) if ROWS[name].held_out else options.sets
        print(rate(name, sets, options.folder), flush=True)


if __name__ == "__main__":
    main()

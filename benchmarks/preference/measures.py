"""What is measured on predicted comparisons, from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfm.statistics import Bootstrap, Estimate, Reliability, reliability

__all__ = ["PredictionTable"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PredictionTable:
    """Holds N comparisons of two outputs, and what one method said of each without having seen its prompt.

    Attributes:
        group: (N,) str, the prompt; comparisons of one prompt are resampled together.
        part: (N,) str, the part of the data.
        share: (N,) in [0, 1], how much was said for the first output.
        logit: (N,) the predicted log-odds that the first is preferred.
        fold: (N,) in which fold it was held out.
    """

    group: NDArray[np.str_]
    part: NDArray[np.str_]
    share: Array
    logit: Array
    fold: NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Write all arrays to one .npz file."""
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> PredictionTable:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})

    @classmethod
    def join(cls, tables: Sequence[PredictionTable]) -> PredictionTable:
        """Put the predictions of several seeds one after the other; a prompt stays one prompt."""
        return cls(**{f.name: np.concatenate([getattr(table, f.name) for table in tables]) for f in fields(cls)})

    def same_comparisons(self, other: PredictionTable) -> bool:
        """Tell whether two methods predicted the same comparisons, from the same folds."""
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in ("group", "part", "share", "fold"))

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """Number the prompt of each comparison, (N,), prompts in the order of their names."""
        return np.unique(self.group, return_inverse=True)[1]

    @property
    def prompts(self) -> int:
        """Count the prompts P."""
        return int(self.owner.max()) + 1

    # -- a comparison's own figures -------------------------------------------------------------------------------

    @property
    def decided(self) -> NDArray[np.bool_]:
        """Tell which comparisons (N,) are no ties."""
        return self.share != 0.5

    def right(self) -> Array:
        """Tell which are predicted rightly, (N,): 1 or 0; 1/2 where the prediction is none, or nothing was decided."""
        return 0.5 + 0.5 * np.sign(self.logit) * np.sign(self.share - 0.5)

    def loss(self) -> Array:
        """Return the cross-entropy (N,) of the prediction against the share, in nats."""
        return np.logaddexp(0, -self.logit) + (1 - self.share) * self.logit

    def gap(self) -> tuple[Array, Array]:
        """Return what is said for the predicted output above one half, and for the better one: (N,) each.

        They are the gain of choosing by the prediction over choosing at random, and that of the oracle.
        """
        lead = self.share - 0.5
        return np.sign(self.logit) * lead, np.abs(lead)

    def entropy(self) -> Array:
        """Return the entropy (N,) of the share itself, in nats: no prediction has a lower loss."""
        p = np.clip(self.share, 1e-12, 1 - 1e-12)
        return -(p * np.log(p) + (1 - p) * np.log(1 - p)) * ((self.share > 0) & (self.share < 1))

    # -- figures ----------------------------------------------------------------------------------------------------

    def ratio(self, bootstrap: Bootstrap, values: Array, counted: NDArray[np.bool_] | None = None) -> Estimate | None:
        """Estimate the mean of values (N,) over the counted comparisons, with whole prompts resampled."""
        weight = np.ones(len(values)) if counted is None else counted.astype(float)
        top, bottom = (np.bincount(self.owner, v, minlength=self.prompts) for v in (values * weight, weight))
        return bootstrap.ratio(top, bottom)

    def reliability(self, bootstrap: Bootstrap, bins: int = 10) -> Reliability:
        """Hold the probability of the output that is predicted to win, 1/2 to 1, against what was said for it."""
        first = self.logit >= 0
        return reliability(
            0.5 + 0.5 * np.tanh(0.5 * np.abs(self.logit)), np.where(first, self.share, 1 - self.share), self.owner,
            bootstrap, bins,
        )  # fmt: skip

    def measure(self, bootstrap: Bootstrap) -> dict[str, Estimate | None]:
        """Return every figure with its interval over prompts.

        ``accuracy``: of the comparisons that are no ties, the share predicted rightly; ``accuracy.X`` of part X.
        ``gap_closed``: share of the gap from a random output of the two to the better one that is closed.
        ``log_loss``: against the shares, in nats; ``log_loss.X``; ``excess``: above the shares' own entropy.
        ``ece``: expected calibration error; ``ece_chance``: of a calibrated prediction, its mean and 95% quantile as
        low and high. ``slope``: of what was said on what was predicted, below 1 for predictions too sure.
        """
        calibration = self.reliability(bootstrap)
        gained, gap = (np.bincount(self.owner, values, minlength=self.prompts) for values in self.gap())
        chance, ceiling = calibration.noise_floor, calibration.noise_ceiling
        figures = {
            "accuracy": self.ratio(bootstrap, self.right(), self.decided),
            "gap_closed": bootstrap.ratio(gained, gap),
            "log_loss": self.ratio(bootstrap, self.loss()),
            "excess": self.ratio(bootstrap, self.loss() - self.entropy()),
            "ece": calibration.ece,
            "ece_chance": Estimate(chance, chance, ceiling),
            "slope": calibration.slope,
        }
        parts = sorted(set(self.part.tolist()) - {""})
        for part in parts if len(parts) > 1 else []:
            among = self.part == part
            figures[f"accuracy.{part}"] = self.ratio(bootstrap, self.right(), self.decided & among)
            figures[f"log_loss.{part}"] = self.ratio(bootstrap, self.loss(), among)
        return figures

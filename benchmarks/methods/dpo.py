"""Direct preference optimisation and its kin: losses of rho = log pi/pi_ref (chosen) - log pi/pi_ref (rejected).

| name | loss of one pair | optimum on all pairs of cells | source |
|---|---|---|---|
| dpo | -log sigmoid(beta rho) | pi_ref exp(r / beta) / Z, under Bradley–Terry | 2305.18290, eq. 7 |
| ipo | (rho - 1 / (2 beta))^2 | pi_ref exp(b / beta) / Z, any preference | 2310.12036, eq. 17 (its tau is beta) |
| robust | ((1 - e) l(rho) - e l(-rho)) / (1 - 2 e) | that of dpo on labels before a share e was flipped | 2403.00409 |
| conservative | (1 - e) l(rho) + e l(-rho) | that of dpo after a share e is flipped | Mitchell, note of 2023 |

with l = -log sigmoid(beta .), b(y|x) = E over y' ~ pi_ref of P(y > y' | x), e = ``flip``. Here pairs are drawn from
pi_ref, as the closed form of ipo asks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.baselines.policies import Grid, PairLoss, PolicyMover, fit_sampled, pair_rows, reference_of
from benchmarks.core.bench import Bench
from benchmarks.core.config import DPOConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["DPO", "conservative_dpo_loss", "dpo_loss", "ipo_loss", "make", "robust_dpo_loss"]


def dpo_loss(rho: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta rho) (B,)."""
    return softplus(-beta * rho)


def ipo_loss(rho: Tensor, beta: float) -> Tensor:
    """Return (rho - 1 / (2 beta))^2 (B,)."""
    return (rho - 1 / (2 * beta)).square()


def robust_dpo_loss(rho: Tensor, beta: float, flip: float) -> Tensor:
    """Return the loss (B,) whose mean over labels of which a share ``flip`` is wrong is DPO's on the right ones.

    It is not bounded from below, and neither is its mean where a preference is surer than 1 - ``flip``: labels that
    were flipped less often than ``flip`` says push rho without end.
    """
    return ((1 - flip) * dpo_loss(rho, beta) - flip * dpo_loss(-rho, beta)) / (1 - 2 * flip)


def conservative_dpo_loss(rho: Tensor, beta: float, flip: float) -> Tensor:
    """Return DPO's loss (B,) under the soft label 1 - ``flip``."""
    return (1 - flip) * dpo_loss(rho, beta) + flip * dpo_loss(-rho, beta)


class DPO(PolicyMover):
    """Trains the policy on the pairs themselves, without a reward."""

    config: DPOConfig

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        if config.loss not in ("dpo", "ipo", "robust", "conservative"):
            raise ValueError(f"method.loss must be 'dpo', 'ipo', 'robust' or 'conservative', got {config.loss!r}")
        if not 0 <= config.flip < 0.5:
            raise ValueError(f"method.flip must lie in [0, 0.5): got {config.flip}")

    def loss(self) -> PairLoss:
        """Return the loss at the beta of training."""
        beta, flip = self.beta, self.config.flip
        return {
            "dpo": lambda rho: dpo_loss(rho, beta),
            "ipo": lambda rho: ipo_loss(rho, beta),
            "robust": lambda rho: robust_dpo_loss(rho, beta, flip),
            "conservative": lambda rho: conservative_dpo_loss(rho, beta, flip),
        }[self.config.loss]

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; of the law, the reference's density is read."""
        grid = Grid.over(law, self.config.cells)
        policy = self.make(grid, reference_of(law, grid), train, bench.seed)
        fitted = fit_sampled(policy, pair_rows(policy, self.loss(), train), train, seed=bench.seed)
        return fitted.notes() | self.release(policy, law, train)


def make(config: DPOConfig) -> DPO:
    """Make the method of a config."""
    return DPO(config)

"""Fitting one field on coupled samples: the closed-form part, the residual beyond it, the number of steps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfm.flow.config import FlowConfig
from pfm.flow.couplings import Coupled, Coupling
from pfm.flow.distributed import Processes
from pfm.flow.fields import Field, Moments, Normalizer
from pfm.flow.integration import ADAPTIVE_SOLVERS, STAGES, integrate
from pfm.flow.problem import FlowProblem
from pfm.flow.registered_field import RegisteredField
from pfm.flow.training import TrainingLog, train_residual
from pfm.tracking import Tracker

__all__ = ["FieldFit", "Steps", "at_most", "choose_steps", "fit_field", "matmul_precision", "on_unit_sphere"]

STATISTICS_ROWS = 20_000  # that means and scales are taken from
MOMENT_ROWS = 200_000
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
STEP_CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
STEP_ROWS = 256
HARDLY = 1e-3  # of the outputs' spread


@dataclass(frozen=True)
class FieldFit:
    """Holds the result of fitting a field: its ridge, infinity for no slope, and the residual's training."""

    ridge: float
    log: TrainingLog

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        training = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in asdict(self.log).items()
        }
        ridge = None if math.isinf(self.ridge) else self.ridge
        return {"ridge": ridge, "residual_kept": self.log.gain > 0, "training": training}


def fit_field(
    field: Field,
    normalizer: Normalizer,
    coupling: Coupling,
    check: Coupling,
    config: FlowConfig,
    *,
    one_step: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
    tracker: Tracker | None = None,
    processes: Processes | None = None,
) -> FieldFit:
    """Fit both parts of a field, in place; ``check`` joins samples of held-out prompts, on which parts are judged.

    ``one_step`` fits the displacement at t = 0 only, for a single Euler step. ``tracker`` keeps the validation loss.
    ``processes`` share the training of the residual; all else is computed in each.
    """
    if isinstance(field.residual, RegisteredField):
        field.residual.check()
    problem = FlowProblem(field, normalizer, config.sigma, one_step=one_step)
    ridge = _fit_linear(problem, coupling, check, config)
    log = TrainingLog()
    if config.residual:
        with matmul_precision(config.dtype, normalizer.mean.device):
            watch = (
                None if tracker is None else lambda update, loss: tracker.log({"validation_loss": loss}, step=update)
            )
            log = train_residual(
                problem, coupling, check, config,
                checkpoint=checkpoint, progress=progress, on_validation=watch, processes=processes,
            )  # fmt: skip
    if log.gain == 0.0:
        field.drop_residual()
    return FieldFit(ridge, log)


@torch.no_grad()
def _fit_linear(problem: FlowProblem, coupling: Coupling, check: Coupling, config: FlowConfig) -> float:
    """Fit the closed-form part at the ridge that predicts held-out displacements best."""
    field, normalizer = problem.model, problem.normalizer
    if not field.linear.present:
        return math.inf
    noise = (problem.sigma * normalizer.displacement).square()
    with matmul_precision("float32", normalizer.mean.device):
        moments, judged = (Moments.of(_all_rows(part, config.seed), normalizer, noise) for part in (coupling, check))
    times = {"times": (0.0,)} if problem.one_step else {}
    ridge = moments.best_ridge(RIDGES, judged, field.unit, **times)
    field.linear.fit(moments, ridge, at_start=problem.one_step)
    return ridge


def _all_rows(coupling: Coupling, seed: int, size: int = 8192) -> Iterator[Coupled]:
    generator = torch.Generator().manual_seed(seed)
    for index in at_most(len(coupling), MOMENT_ROWS, seed).split(size):
        yield coupling.draw(index, generator)


def at_most(count: int, most: int, seed: int) -> Tensor:
    """Return the numbers below ``count``, or a sorted random choice of ``most`` of them."""
    if count <= most:
        return torch.arange(count, device="cpu")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")[:most].sort().values


def on_unit_sphere(chosen: Tensor, rejected: Tensor, config: FlowConfig) -> bool:
    """Return whether results go to the unit sphere: as configured, or because all outputs (N, D) lie on it."""
    if config.unit_norm != "auto":
        return config.unit_norm == "on"
    # Below a handful of dimensions, outputs of norm one are more likely labels or signs than embeddings.
    both = torch.cat([chosen[:4096], rejected[:4096]])
    return both.shape[1] >= 8 and bool((both.norm(dim=1) - 1).abs().max() < 1e-3)


class Steps(NamedTuple):
    """Holds the steps of a pass, under the names that a flow's metadata have for them.

    Attributes:
        steps: fixed steps of a pass.
        steps_error: relative to the distance moved; None where nothing was chosen.
        evaluations: of the field in a pass.
    """

    steps: int
    steps_error: float | None
    evaluations: int


@torch.no_grad()
def choose_steps(field: Field, normalizer: Normalizer, check: Coupling, config: FlowConfig) -> Steps:
    """Return the fewest steps within the tolerance of a tight adaptive solution, on held-out rows."""
    device = normalizer.mean.device
    rows = check.draw(at_most(len(check), STEP_ROWS, config.seed), torch.Generator().manual_seed(0)).to(device)
    y, context = normalizer(rows.source), normalizer.context(rows.row_context())
    velocity = field.at(context)
    if config.solver in ADAPTIVE_SOLVERS:
        return Steps(1, None, integrate(velocity, y, (0.0, 1.0), solver=config.solver).evaluations)
    stages = STAGES[config.solver]
    if config.steps != "auto":
        return Steps(config.steps, None, config.steps * stages)
    exact = integrate(
        copy.deepcopy(field).double().at(None if context is None else context.double()),
        y.double(), (0.0, 1.0), solver="dopri5", rtol=1e-6, atol=1e-8,
    ).states[-1]  # fmt: skip
    # A flow that moves almost nothing is not worth many steps, whatever its relative error.
    moved = max(float((exact - y).square().mean().sqrt()), HARDLY)
    error = math.inf
    for steps in STEP_CHOICES:
        result = integrate(velocity, y, (0.0, 1.0), solver=config.solver, steps=steps).states[-1]
        error = float((result - exact).square().mean().sqrt()) / moved
        if error <= config.tolerance:
            return Steps(steps, error, steps * stages)
    warnings.warn(
        f"{STEP_CHOICES[-1]} steps of {config.solver} are {error:.3g} from the exact solution, above "
        f"tolerance={config.tolerance:g}: the field is rough; use solver='dopri5' or a larger sigma",
        RuntimeWarning,
        stacklevel=5,
    )
    return Steps(STEP_CHOICES[-1], error, STEP_CHOICES[-1] * stages)


class matmul_precision:
    """Sets torch's precision of float32 matrix products as ``dtype`` says, and restores it.

    On CUDA ``"float32"`` sets full precision; on the CPU it keeps the caller's setting.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        medium = dtype == "medium" or (dtype == "auto" and device.type == "cuda")
        self.wanted = "medium" if medium else "highest" if device.type == "cuda" else None

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.wanted:
            torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            torch.set_float32_matmul_precision(self.before)

"""PreferenceFlow: a vector field and a win probability, fitted on pairs, applied to outputs."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from pfm.config import FlowConfig
from pfm.couplings import BestOf, Paired, make_coupling
from pfm.encoded import EncodedPairs, as_float_tensor, check_finite
from pfm.fields import Field, Moments, Normalizer
from pfm.files import replace_file
from pfm.training import FlowProblem, TrainingLog, remove_checkpoint, train_residual
from pfm.transport import ADAPTIVE_SOLVERS, integrate
from pfm.win import WinHead

__all__ = ["PreferenceFlow"]

logger = logging.getLogger(__name__)

MODES = ("single", "gated", "reapply")
CHUNK = 1024
MOMENT_ROWS = 200_000
STATISTICS_ROWS = 50_000
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
STEP_CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
STEP_ROWS = 256


class PreferenceFlow(nn.Module, PyTorchModelHubMixin, library_name="preference-flow", tags=["preference-flow"]):
    """Carries less-preferred outputs to preferred ones: dy/dt = v(t, y | x), t from 0 to 1.

    Make one with :meth:`fit` or :meth:`from_pretrained`. One pass of a flow fitted with ``source="reference"``
    carries the reference's law pi_ref to the winners' law p1 = 2 pi_ref b, the law of best of two, as far as the
    field is learned; b(y|x) is the chance that y beats an independent draw of the reference.

    Args:
        event_shape: shape (\\*D) of one output.
        context_dimension: number of values C in a context, 0 for none.
        config: a :class:`pfm.FlowConfig` or its dict.
        metadata: what the fit found and where the vectors come from (JSON values).
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_dimension: int = 0,
        config: dict[str, Any] | FlowConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.context_dimension = int(context_dimension)
        self.config = config if isinstance(config, FlowConfig) else FlowConfig.from_dict(dict(config or {}))
        self.metadata: dict[str, Any] = dict(metadata or {})
        dimension = self.dimension
        small = dimension <= 64
        self.normalizer = Normalizer(dimension, self.context_dimension)
        self.field = Field(
            dimension,
            self.context_dimension,
            (256 if small else 512) if self.config.hidden == "auto" else self.config.hidden,
            (4 if small else 3) if self.config.layers == "auto" else self.config.layers,
        )
        self.win = WinHead(dimension, self.context_dimension)
        if self.metadata.get("residual_kept") is False:
            self.field.drop_residual()
        if self.metadata.get("win_network_kept") is False:
            self.win.drop_network()
        self.eval()

    # -- what it knows of itself ---------------------------------------------------------------------------------

    @property
    def dimension(self) -> int:
        """Give the number of values in one output."""
        return math.prod(self.event_shape)

    @property
    def steps(self) -> int:
        """Give the number of fixed steps of a pass."""
        return int(self.metadata.get("steps") or (1 if self.config.steps == "auto" else self.config.steps))

    @property
    def guard_margin(self) -> float:
        """Give the smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
        return float(self.win.margin)

    @property
    def device(self) -> torch.device:
        """Give the device of the parameters."""
        return self.normalizer.mean.device

    # -- fitting ------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        encoded: EncodedPairs,
        config: FlowConfig | Mapping[str, Any] | None = None,
        validation: EncodedPairs | None = None,
        progress: bool = True,
        *,
        checkpoint: str | Path | None = None,
    ) -> PreferenceFlow:
        """Fit a flow on labelled pairs.

        Args:
            encoded: the pairs, N of them.
            config: settings; None for the defaults.
            validation: pairs of other prompts, on which the ridge, the residual and the number of steps are
                decided; None holds out ``config.validation_share`` of the prompts of ``encoded``.
            progress: show a progress bar.
            checkpoint: folder for the training state; a fit that was stopped goes on from it.

        Raises:
            TypeError: ``encoded`` is not EncodedPairs.
            ValueError: shapes of training and validation pairs disagree, or the configuration asks for what the
                pairs do not carry.
        """
        if not isinstance(encoded, EncodedPairs):
            raise TypeError(
                f"encoded must be EncodedPairs: got {type(encoded).__name__}; text pairs are encoded by "
                "PreferencePairs.encode(encoder), tensors by EncodedPairs(chosen, rejected)"
            )
        if config is None:
            config = FlowConfig()
        elif not isinstance(config, FlowConfig):
            config = FlowConfig.from_dict(dict(config))
        began = time.perf_counter()
        train, held = _training_sets(encoded, validation, config)
        device = _device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            flow = cls(encoded.event_shape, encoded.context_dimension, config)
        flow.to(device)
        with torch.no_grad():
            some = train.gather(_at_most(len(train), STATISTICS_ROWS, config.seed))
            flow.normalizer.fit(some.chosen, some.rejected, some.context)
            flow.field.unit.copy_(flow.normalizer.displacement)
        coupling, check = (
            make_coupling(part, source=config.source, coupling=config.coupling, best_of=config.best_of)
            for part in (train, held)
        )
        ridge = flow._fit_linear(coupling, check)
        flow.metadata |= {
            "encoder": encoded.encoder,
            "dimension": flow.dimension,
            "context_dimension": flow.context_dimension,
            "pairs": len(encoded),
            "prompts": len(torch.unique(encoded.group)),
            "ridge": None if math.isinf(ridge) else ridge,
            "version": _version(),
        }
        with _matmul_precision(config.dtype, device):
            flow._fit_residual(coupling, check, progress, None if checkpoint is None else Path(checkpoint))
        head = flow.win.to("cpu").fit(encoded, seed=config.seed)
        flow.win.to(device)
        flow.metadata["win"] = head.to_dict()
        flow.metadata["win_network_kept"] = head.network_kept
        flow.metadata["unit_norm"] = _on_unit_sphere(some.chosen, some.rejected, config)
        flow.metadata["steps"], flow.metadata["steps_error"] = flow._choose_steps(check)
        flow.metadata["seconds"] = round(time.perf_counter() - began, 3)
        if checkpoint is not None:
            remove_checkpoint(Path(checkpoint))
        logger.info("fitted on %d pairs: %s", len(encoded), json.dumps(flow.metadata, default=str))
        return flow.eval()

    @torch.no_grad()
    def _fit_linear(self, coupling: Paired | BestOf, check: Paired | BestOf) -> float:
        """Fit the closed-form part at the ridge that predicts held-out displacements best."""
        noise = (self.config.sigma * self.normalizer.displacement).square().cpu()
        normalizer = copy.deepcopy(self.normalizer).cpu()
        moments = Moments.of(_all_rows(coupling, self.config.seed), normalizer, noise)
        linear = self.field.linear
        if not self.config.linear:
            linear.matrices.zero_()
            linear.shifts.zero_()
            return math.inf
        judged = Moments.of(_all_rows(check, self.config.seed), normalizer, noise)
        ridge = moments.best_ridge(RIDGES, judged, self.field.unit.cpu())
        linear.fit(moments, ridge)
        return ridge

    def _fit_residual(
        self, coupling: Paired | BestOf, check: Paired | BestOf, progress: bool, checkpoint: Path | None
    ) -> None:
        log = TrainingLog()
        if self.config.residual:
            problem = FlowProblem(self.field, self.normalizer, self.config.sigma)
            log = train_residual(problem, coupling, check, self.config, checkpoint=checkpoint, progress=progress)
        if log.gain == 0.0:
            self.field.drop_residual()
        self.metadata["residual_kept"] = log.gain > 0
        self.metadata["training"] = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in asdict(log).items()
        }

    @torch.no_grad()
    def _choose_steps(self, check: Paired | BestOf) -> tuple[int, float | None]:
        """Give the fewest steps within the tolerance of a tight adaptive solution, and their relative error."""
        if self.config.steps != "auto":
            return self.config.steps, None
        if self.config.solver in ADAPTIVE_SOLVERS:
            return 1, None
        rows = check.draw(_at_most(len(check), STEP_ROWS, self.config.seed), torch.Generator().manual_seed(0))
        y = self.normalizer(rows.source.to(self.device))
        context = self.normalizer.context(None if rows.context is None else rows.context.to(self.device))
        exact_field = copy.deepcopy(self.field).double()
        exact = integrate(
            exact_field.at(None if context is None else context.double()),
            y.double(), (0.0, 1.0), solver="dopri5", rtol=1e-6, atol=1e-8,
        )[-1]  # fmt: skip
        velocity = self.field.at(context)
        moved = float((exact - y).square().mean().sqrt())
        if moved == 0:
            return 1, 0.0
        error = math.inf
        for steps in STEP_CHOICES:
            result = integrate(velocity, y, (0.0, 1.0), solver=self.config.solver, steps=steps)[-1]
            error = float((result - exact).square().mean().sqrt()) / moved
            if error <= self.config.tolerance:
                return steps, error
        warnings.warn(
            f"{STEP_CHOICES[-1]} steps of {self.config.solver} are {error:.3g} from the exact solution, above "
            f"tolerance={self.config.tolerance:g}: the field is rough; use solver='dopri5' or a larger sigma",
            RuntimeWarning,
            stacklevel=3,
        )
        return STEP_CHOICES[-1], error

    # -- applying -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def transport(
        self,
        y: Any,
        context: Any = None,
        *,
        mode: str = "single",
        steps: int | None = None,
        rounds: int = 1,
        strength: float = 1.0,
    ) -> Tensor:
        """Carry outputs along the flow.

        Args:
            y: (B, \\*D) outputs, finite.
            context: (B, C), or (C,) for one context for all rows; None if the flow was fitted without.
            mode: ``"single"``: one pass, pi_ref to best of two with the reference source. ``"gated"``: each row is
                kept with probability b(y|x), else carried; exact for a flow with ``source="rejected"``. Which rows
                are kept is drawn from the row's own values, so it is repeatable and independent of the batch.
                ``"reapply"``: ``rounds`` passes of the same flow; it has no target law and leaves the data's
                support as rounds grow.
            steps: fixed steps a pass; None for the number chosen at the end of the fit.
            rounds: passes of ``"reapply"``.
            strength: up to 1, the time at which the integration stops, so that 0 leaves y as it is; above 1 the
                whole displacement is multiplied: y + strength (T(y) - y).

        Returns:
            (B, \\*D) float32. Rows do not depend on their neighbours in the batch, with fixed-step solvers.

        Raises:
            ValueError: shapes disagree with the flow's, values are not finite, or an argument is out of range.
        """
        if mode not in MODES:
            raise ValueError(
                f"mode must be one of {', '.join(MODES)}: got {mode!r}"
                + ("; relabel is a way of fitting, on labels of refined samples" if mode == "relabel" else "")
            )
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1: got {rounds}")
        if rounds > 1 and mode != "reapply":
            raise ValueError(f"rounds={rounds} needs mode='reapply': got mode={mode!r}")
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength must be a number >= 0: got {strength}")
        if mode == "gated" and self.config.source != "rejected":
            warnings.warn(
                "mode='gated' is exact for flows with source='rejected'; this one was fitted with "
                f"source={self.config.source!r}, for which mode='single' is",
                stacklevel=2,
            )
        y, context = self._checked(y, context)
        steps = self._checked_steps(steps)
        if strength == 0:
            return y.clone()
        result = y.flatten(1)
        for _ in range(rounds):
            result = self._pass(result, context, steps, strength)
        if mode == "gated":
            kept = torch.sigmoid(self.win(y.flatten(1), context)) > _row_uniforms(y.flatten(1))
            result = torch.where(kept[:, None], y.flatten(1), result)
        return result.unflatten(1, self.event_shape)

    def _pass(self, y: Tensor, context: Tensor | None, steps: int, strength: float) -> Tensor:
        end = min(strength, 1.0)
        pieces = [self._integrate(*part, (0.0, end), steps)[-1] for part in _chunks(y, context)]
        result = torch.cat(pieces) if pieces else y
        if strength > 1:
            result = y + strength * (result - y)
        if self.metadata.get("unit_norm"):
            result = nn.functional.normalize(result, dim=1)
        return result

    def _integrate(self, y: Tensor, context: Tensor | None, times: Sequence[float], steps: int) -> Tensor:
        velocity = self.field.at(self.normalizer.context(context))
        states = integrate(velocity, self.normalizer(y), times, solver=self.config.solver, steps=steps)
        return self.normalizer.inverse(states)

    @torch.no_grad()
    def trajectory(self, y: Any, context: Any = None, *, times: Any) -> Tensor:
        """Give the states along one pass.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
            times: (T,) increasing times in [0, 1].

        Returns:
            (T, B, \\*D); on a flow of unit vectors every state is projected to the sphere.
        """
        marks = [float(t) for t in torch.as_tensor(times).flatten().tolist()]
        if not marks or any(not 0 <= t <= 1 for t in marks) or marks != sorted(set(marks)):
            raise ValueError(f"times must be increasing numbers in [0, 1]: got {marks}")
        y, context = self._checked(y, context)
        path = marks if marks[0] == 0 else [0.0, *marks]
        if len(path) == 1:
            return y[None].clone()
        pieces = [self._integrate(*part, path, self.steps) for part in _chunks(y.flatten(1), context)]
        if not pieces:
            return y.expand(len(marks), *y.shape).clone()
        states = torch.cat(pieces, dim=1)
        if self.metadata.get("unit_norm"):
            states = nn.functional.normalize(states, dim=2)
        return states[-len(marks) :].unflatten(2, self.event_shape)

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None) -> Tensor:
        """Give b(y|x) (B,) in [0, 1]: the chance that y beats an independent draw of the reference.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        y, context = self._checked(y, context)
        return torch.sigmoid(self.win(y.flatten(1), context))

    @torch.no_grad()
    def alignment(self, y: Any, context: Any = None) -> Tensor:
        """Give how far each of one prompt's candidates lies along the flow's displacement of them.

        Args:
            y: (B, \\*D) the candidates of one prompt. context: (C,), (1, C) or (B, C).

        Returns:
            (B,): the projection of each candidate, from the candidates' mean, on their mean displacement
            T(y) - y, both in normalised coordinates; zeros where the flow does not move them.
        """
        y, context = self._checked(y, context)
        flat = y.flatten(1)
        moved = self._pass(flat, context, self.steps, 1.0)
        scale = self.normalizer.scale
        direction = ((moved - flat) / scale).mean(0)
        return ((flat - flat.mean(0)) / scale) @ nn.functional.normalize(direction, dim=0)

    def _checked(self, y: Any, context: Any) -> tuple[Tensor, Tensor | None]:
        y = as_float_tensor("y", y).to(self.device, torch.float32)
        if y.shape[1:] != self.event_shape or y.ndim < 2:
            wanted = ", ".join(["B", *map(str, self.event_shape)])
            raise ValueError(f"y must be ({wanted}), as this flow was fitted: got {tuple(y.shape)}")
        check_finite("y", y)
        if self.context_dimension == 0:
            if context is not None:
                raise ValueError("context must be None: this flow was fitted without contexts")
            return y, None
        if context is None:
            raise ValueError(f"context (B, {self.context_dimension}) is missing: this flow was fitted with contexts")
        context = as_float_tensor("context", context).to(self.device, torch.float32)
        if context.ndim == 1:
            context = context[None]
        if context.ndim != 2 or context.shape[1] != self.context_dimension or context.shape[0] not in (1, len(y)):
            raise ValueError(
                f"context must be ({len(y)}, {self.context_dimension}), one row an output, or one row for all: "
                f"got {tuple(context.shape)}"
            )
        check_finite("context", context)
        return y, context.expand(len(y), -1)

    def _checked_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1: got {steps!r}")
        return steps

    # -- saving -------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        folder = Path(save_directory)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        replace_file(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        described = {
            "event_shape": list(self.event_shape),
            "context_dimension": self.context_dimension,
            "config": self.config.to_dict(),
            "metadata": self.metadata,
        }
        text = json.dumps(described, indent=2, allow_nan=False) + "\n"
        replace_file(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PreferenceFlow:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a flow from a folder written by ``save_pretrained``, or from the hub.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the hub.
            options: as for ``huggingface_hub.PyTorchModelHubMixin.from_pretrained`` (revision, token, ...).

        Raises:
            FileNotFoundError: the folder or one of its files is not there.
            ValueError: a file is damaged, or the two do not belong together.
        """
        name = os.fspath(pretrained_model_name_or_path)
        path = Path(name)
        if not path.is_dir() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or path.exists()):
            raise FileNotFoundError(f"{name} is not a folder: give one written by PreferenceFlow.save_pretrained")
        try:
            return super().from_pretrained(name, **options)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}/config.json is damaged ({error}): copy or fit the flow again") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> PreferenceFlow:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                path = Path(model_id) / name
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{model_id} holds no {name}: give a folder written by PreferenceFlow.save_pretrained"
                    )
                return path
            from huggingface_hub import hf_hub_download

            found = hf_hub_download(
                model_id, name, revision=revision, cache_dir=cache_dir,
                force_download=force_download, local_files_only=local_files_only, token=token,
            )  # fmt: skip
            return Path(found)

        try:
            described = json.loads(find("config.json").read_text(encoding="utf-8"))
            known = {name: described[name] for name in ("event_shape", "context_dimension", "config", "metadata")}
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{model_id}/config.json is damaged or is not a preference flow's: {error}") from error
        flow = cls(**known)
        try:
            tensors = load_file(find("model.safetensors"), device=map_location)
        except SafetensorError as error:
            raise ValueError(
                f"{model_id}/model.safetensors is damaged or was cut short ({error}): copy or fit it again"
            ) from error
        wanted = flow.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            shapes = [tuple(part[name].shape) if name in part else None for part in (wanted, tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{model_id}/model.safetensors does not fit its config.json at {name}: "
                    f"expected shape {shapes[0]}, got {shapes[1]}"
                )
        flow.load_state_dict(tensors)
        return flow.to(map_location).eval()

    def summary(self) -> str:
        """Say in a few lines what was fitted and what held-out prompts confirmed."""
        found, win, training = self.metadata, self.metadata.get("win", {}), self.metadata.get("training", {})
        residual = "residual not confirmed by held-out prompts, dropped"
        if found.get("residual_kept"):
            residual = f"residual kept at {100 * training['gain']:.0f}%"
        elif not self.config.residual:
            residual = "no residual, as configured"
        ridge, error, z = found.get("ridge"), found.get("steps_error"), win.get("z")
        return "\n".join(
            [
                f"PreferenceFlow on outputs {tuple(self.event_shape)}, context {self.context_dimension or 'none'}",
                f"  data   {found.get('pairs')} pairs of {found.get('prompts')} prompts, {found.get('seconds')} s",
                f"  field  linear part {'without slope' if ridge is None else f'at ridge {ridge:g}'}; {residual}",
                f"  path   {self.config.solver}, {self.steps} steps"
                + ("" if error is None else f", {error:.1%} from the exact solution"),
                f"  b      orders {win.get('accuracy', math.nan):.1%} of held-out pairs rightly, "
                + ("all of them" if z is None else f"{z:.1f} standard errors above chance")
                + f"; guard at a difference of {self.guard_margin:.3g}",
            ]
        )


def _training_sets(
    encoded: EncodedPairs, validation: EncodedPairs | None, config: FlowConfig
) -> tuple[EncodedPairs, EncodedPairs]:
    if validation is not None:
        for name in ("event_shape", "context_dimension"):
            ours, theirs = getattr(encoded, name), getattr(validation, name)
            if ours != theirs:
                raise ValueError(f"validation must have the training pairs' {name} {ours}: got {theirs}")
        return encoded, validation
    if len(torch.unique(encoded.group)) >= 2:
        return encoded.split(config.validation_share, config.seed)
    if len(encoded) < 2:
        raise ValueError("one pair is not enough to fit and to validate: at least two are needed")
    warnings.warn(
        "all pairs belong to one prompt: validating on held-out pairs instead of held-out prompts, so nothing "
        "here says how the flow does on another prompt",
        stacklevel=3,
    )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(config.seed))
    count = min(max(round(config.validation_share * len(encoded)), 1), len(encoded) - 1)
    return encoded.select(order[count:]), encoded.select(order[:count])


def _at_most(count: int, most: int, seed: int) -> Tensor:
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _all_rows(coupling: Paired | BestOf, seed: int, size: int = 8192):
    generator = torch.Generator().manual_seed(seed)
    for index in _at_most(len(coupling), MOMENT_ROWS, seed).split(size):
        yield coupling.draw(index, generator)


def _on_unit_sphere(chosen: Tensor, rejected: Tensor, config: FlowConfig) -> bool:
    if config.unit_norm != "auto":
        return config.unit_norm == "on"
    # Below a handful of dimensions, outputs of norm one are more likely labels or signs than embeddings.
    both = torch.cat([chosen[:4096], rejected[:4096]])
    return both.shape[1] >= 8 and bool((both.norm(dim=1) - 1).abs().max() < 1e-3)


def _chunks(y: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for at in range(0, len(y), CHUNK):
        yield y[at : at + CHUNK], None if context is None else context[at : at + CHUNK]


def _row_uniforms(y: Tensor) -> Tensor:
    """Give a uniform number in [0, 1) a row, a hash of the row's bits: independent of the row's neighbours."""
    bits = y.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    state = torch.zeros(len(y), dtype=torch.long, device=y.device)
    for column in bits.T:
        state = (state ^ column) * 0x2545F4914F6CDD1D
        state = state ^ ((state >> 29) & 0x7FFFFFFFF)
    state = state * 0x2545F4914F6CDD1D
    return ((state >> 11) & 0x1FFFFFFFFFFFFF).double().div(2**53).float()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} was asked for and this machine has no CUDA device: use device='auto'")
    return torch.device(name)


class _matmul_precision:
    """Sets torch's matrix-product precision and puts it back."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        medium = dtype == "medium" or (dtype == "auto" and device.type == "cuda")
        self.wanted = "medium" if medium else None

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.wanted:
            torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("preference-flow")
    except PackageNotFoundError:
        return "unknown"

"""Settings of a fit: one plain dataclass, usable as a Hydra structured config."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NoReturn

from pfm._internal.checks import check_choice, check_flag, check_number, check_seed, check_whole

__all__ = ["FlowConfig", "refuse_options"]

DTYPES = ("auto", "float32", "medium", "bfloat16")


@dataclass(frozen=True)
class FlowConfig:
    """Configures :meth:`pfm.PreferenceFlow.fit`: what is learned, by which network, how it is trained and integrated.

    Attributes:
        source: ``"reference"`` (default) trains from draws of the reference and carries it to the winners'
            distribution; ``"rejected"`` trains from the losers, as the paper does, for use with ``mode="gated"``.
        coupling: which source sample goes with which target, see :mod:`pfm.flow.couplings`; ``"paired"`` takes the
            data's own pairs, ``"independent"`` any of one context, ``"ot"`` the assignment of least total squared
            distance within one context (optimal transport), ``"c2ot"`` that with the contexts' distance in the cost; or
            a name of :func:`pfm.register_coupling`.
        best_of: target of one pass, best of this many reference draws; above 2 it needs candidate sets.
        sigma: noise on the training path at its middle, in units of the displacement's root mean square a
            dimension; >= 0.
        context_free: also fit a field without contexts, which ``transport(guidance=...)`` needs.
        linear: contain the closed-form linear part.
        residual: learn a network beyond the linear part, kept as far as held-out prompts confirm it.
        unit_norm: ``"auto"`` projects results back to the unit sphere if the training outputs all lie on it;
            ``"on"``, ``"off"``.
        field: ``"mlp"``, or a name of :func:`pfm.register_field`, for one of your own.
        field_options: keyword arguments of its builder, JSON values.
        hidden: width of the hidden layers of ``"mlp"``; ``"auto"`` is 256 up to 64 dimensions, else 512.
        layers: number of hidden layers of ``"mlp"``; ``"auto"`` is 4 up to 64 dimensions, else 3.
        epochs: passes over the training pairs; ``"auto"`` spends about 1e12 multiply-adds, for two passes up to
            four times that, and at most 400 passes.
        batch_size: rows an update.
        learning_rate: of AdamW, with a cosine schedule to zero; ``"auto"`` is 4e-3 up to 64 dimensions, else 2e-3.
        weight_decay: of AdamW.
        ema: decay of the weights' exponential moving average, which is what is kept.
        patience: validations (40 a run) without improvement before training stops.
        validation_share: share of the prompts held out when no validation set is given, in (0, 1).
        seed: the same seed, data and machine give the same flow.
        device: ``"auto"``, a name such as ``"cuda:1"``, the number of a CUDA device or a ``torch.device``, see
            :func:`pfm.devices.resolve_device`.
        dtype: ``"float32"``; ``"medium"`` allows reduced-precision matrix products where the machine has them;
            ``"bfloat16"`` trains the network under autocast, and elsewhere than on the CPU integrates so as well, with
            states in float32; ``"auto"`` is ``"medium"`` on CUDA, else ``"float32"``.
        compile: train the network through ``torch.compile``, which needs a C++ compiler on the CPU.
        solver: a name in :data:`pfm.flow.integration.SOLVERS`, or of :func:`pfm.register_solver`.
        steps: fixed steps for a pass, or ``"auto"``: the fewest whose result on validation data is within
            ``tolerance`` of a tight adaptive solution, relative to the distance moved.
        tolerance: of ``steps="auto"``, above 0.

    Raises:
        ValueError, TypeError: a value out of its range, or a misspelt name (with the nearest right one).
        NotRegisteredError: a field, coupling or solver that is not registered.

    >>> config = FlowConfig(source="rejected", epochs=10)
    >>> config.coupling, config.solver
    ('paired', 'rk4')
    >>> FlowConfig(sigma=-1)
    Traceback (most recent call last):
        ...
    ValueError: sigma ...
    """

    source: str = "reference"
    coupling: str = "paired"
    best_of: int = 2
    sigma: float = 0.05
    context_free: bool = False
    linear: bool = True
    residual: bool = True
    unit_norm: str = "auto"
    field: str = "mlp"
    # Without a part in the hash: a dict has none. Equal configurations still have equal hashes.
    field_options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any], hash=False)
    hidden: Any = "auto"
    layers: Any = "auto"
    epochs: Any = "auto"
    batch_size: int = 512
    learning_rate: Any = "auto"
    weight_decay: float = 1e-4
    ema: float = 0.999
    patience: int = 8
    validation_share: float = 0.1
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    solver: str = "rk4"
    steps: Any = "auto"
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        from pfm.devices import device_name
        from pfm.flow.couplings import SOURCES, check_coupling
        from pfm.flow.integration import check_solver

        check_choice("source", self.source, SOURCES)
        check_coupling(self.coupling)
        check_choice("unit_norm", self.unit_norm, ("auto", "on", "off"))
        check_choice("dtype", self.dtype, DTYPES)
        check_solver(self.solver)
        object.__setattr__(self, "field_options", self._checked_field_options())
        object.__setattr__(self, "device", device_name(self.device))
        for name in ("context_free", "linear", "residual", "compile"):
            check_flag(name, getattr(self, name))
        checked = {
            name: check_whole(name, getattr(self, name), 1, also=("auto",))
            for name in ("hidden", "layers", "epochs", "steps")
        }
        checked |= {
            "best_of": check_whole("best_of", self.best_of, 2),
            "batch_size": check_whole("batch_size", self.batch_size, 1),
            "patience": check_whole("patience", self.patience, 1),
            "seed": check_seed(self.seed),
            "sigma": check_number("sigma", self.sigma, least=0),
            "weight_decay": check_number("weight_decay", self.weight_decay, least=0),
            "tolerance": check_number("tolerance", self.tolerance, above=0),
            "learning_rate": check_number("learning_rate", self.learning_rate, above=0, also=("auto",)),
            "ema": check_number("ema", self.ema, least=0, below=1),
            "validation_share": check_number("validation_share", self.validation_share, above=0, below=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _checked_field_options(self) -> dict[str, Any]:
        """Return the field's options as JSON values, as saving and loading gives them."""
        from pfm.flow.registered_field import FIELDS, MLP

        builder, options = FIELDS[self.field], self.field_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"field_options must be a dict with names for keys: got {options!r:.80}")
        if self.field == MLP:
            if options:
                raise ValueError(
                    f"field_options are of a registered field; field='mlp' has hidden and layers: got {options}"
                )
            return {}
        if not self.residual:
            raise ValueError(f"residual=False leaves out field={self.field!r}: use field='mlp' with it")
        for name in ("hidden", "layers"):
            if getattr(self, name) != "auto":
                raise ValueError(f"{name} is of field='mlp': give sizes of field={self.field!r} in field_options")
        try:
            options = json.loads(json.dumps(dict(options), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"field_options must be JSON values, which are saved with a flow: {error}") from error
        try:
            inspect.signature(builder).bind((), 0, **options)
        except TypeError as error:
            raise TypeError(
                f"field={self.field!r} must take (event_shape, context_dimension) and field_options "
                f"{', '.join(options) or 'none'}: {error}"
            ) from error
        return options

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FlowConfig:
        """Make a config from a mapping; a misspelt key is refused with the nearest right one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"FlowConfig has no key {key!r}: {_nearest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    def replace(self, **changes: Any) -> FlowConfig:
        """Copy with some settings changed."""
        return replace(self, **changes)


def refuse_options(function: str, unknown: Iterable[str], known: Sequence[str]) -> NoReturn:
    """Refuse keyword arguments that a function does not have, with the nearest right one.

    Raises:
        TypeError: always.
    """
    name = next(iter(unknown))
    raise TypeError(f"{function} has no option {name!r}: {_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"

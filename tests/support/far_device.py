"""A second device on a machine with a CPU only: what would fail on a GPU for mixed devices fails here.

``install()`` registers PyTorch's PrivateUse1 backend under the name "far", once for the process, which should be one of
its own. A tensor on it keeps its values in an ordinary tensor, and PyTorch dispatches every operation on it to
:func:`_run`, which imitates what CUDA is strict about:

- tensors of both devices in one operation raise, but for zero-dimensional ones, copies and indexing by CPU indices;
- a generator belongs to one device, and draws on no other (``torch.Generator("far")`` works);
- ``.numpy()`` needs ``.cpu()`` first; a device index that is not there raises;
- memory is limited while :func:`memory_limit` is in force, and exceeding it raises ``torch.OutOfMemoryError``;
- :func:`count_syncs` counts what makes the host wait for the device: ``.item()``, ``float()``, comparisons used as
  conditions, and copies to the CPU that are not ``non_blocking``;
- :func:`capture` records operations as a CUDA graph does. A replay repeats them on the same memory: Python code does
  not run again, numbers that came from Python stay what they were, and what makes the host wait is refused.

With ``has_float64 = False`` float64 tensors are refused, as on Apple's GPUs. The device says nothing of speed nor of
CUDA's numerics.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
# Operations that may take tensors of both devices.
CROSSING = (
    "_to_copy",
    "copy_",
    "_local_scalar_dense",
    "index_put",
    "index.Tensor",
    "set_data",
    "_pin",
    "_foreach_copy_",
)
# Operations that make tensors; PyTorch makes the others of these, or by resizing, which a far tensor cannot do.
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m",
    "tril_indices", "triu_indices",
)  # fmt: skip
WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._unique",
    "aten.unique",
)
MARK = 0xFA5 << 51  # in the seed of a generator that lives on the device


@dataclass
class _State:
    """What the imitation knows beside the tensors."""

    installed: bool = False
    has_float64: bool = True
    limit: float = math.inf
    syncs: list[str] = field(default_factory=list)
    counting: bool = False
    recording: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] | None = None
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


state = _State()


class Far(torch.Tensor):
    """A tensor that says it is on ``far:0``; ``near`` holds its values."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            layout=near.layout, device=torch.device(NAME, 0), requires_grad=near.requires_grad,
        )  # fmt: skip
        made.near = near
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Far({self.near})"

    def tolist(self) -> Any:
        _waits("tolist")
        return self.near.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert far:0 device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """``torch.Generator`` for both devices; one for the far device draws on the CPU, with a mark in its seed."""

    far: bool

    def __new__(cls, device: Any = "cpu") -> _Generator:
        far = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if far else device)  # pyright: ignore[reportCallIssue]
        made.far = far
        return made.manual_seed(0) if far else made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device(NAME, 0) if self.far else super().device

    def manual_seed(self, seed: int) -> Any:
        super().manual_seed((seed % 2**50) | MARK if self.far else seed)
        return self


class _Module:
    """``torch.far``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = int(min(state.limit, 2**36))
        return total, total

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        _waits("synchronize")


def _waits(name: str) -> None:
    if state.recording is not None:
        raise RuntimeError(f"operation not permitted while a graph is being captured: {name} waits for the device")
    if state.counting:
        state.syncs.append(name)


@dataclass(frozen=True)
class _Operation:
    """What the imitation looks up of an operation."""

    name: str
    crosses: bool
    waits: bool
    indexes: bool
    mutable: bool

    @classmethod
    def of(cls, func: Any) -> _Operation:
        name = str(func)
        return cls(
            name,
            any(part in name for part in CROSSING),
            name.startswith(WAITING),
            "index" in name,
            func._schema.is_mutable,
        )


_operations: dict[Any, _Operation] = {}


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    op = _operations.get(func) or _operations.setdefault(func, _Operation.of(func))
    leaves = _flat((*args, *kwargs.values()) if kwargs else args)
    far = near = False
    for leaf in leaves:
        if isinstance(leaf, Far):
            far = True
        elif isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            near = True
    if far and near and not op.crosses:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        shapes = ", ".join(f"{'far' if isinstance(x, Far) else 'cpu'} {tuple(x.shape)}" for x in tensors)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu, "
            f"in {op.name}: {shapes}"
        )
    if far and op.indexes and op.crosses:
        _check_indexing(op.name, args)
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if target is not None and target.type == NAME and (target.index or 0) != 0:
        raise RuntimeError(f"{NAME} error: invalid device ordinal {target.index}")
    to_far = target.type == NAME if target is not None else far
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator) and (leaf.initial_seed() >> 51 == MARK >> 51) != (to_far or far):
            raise RuntimeError(
                f"Expected a '{NAME if far or to_far else 'cpu'}' device type for generator but found the other"
            )
    if state.counting or state.recording is not None:
        leaves_device = far and target is not None and target.type == "cpu"
        onto_cpu = op.name.startswith("aten.copy_") and isinstance(args[1], Far) and not isinstance(args[0], Far)
        non_blocking = kwargs.get("non_blocking") or (onto_cpu and len(args) > 2 and args[2])
        if op.waits or ((leaves_device or onto_cpu) and not non_blocking):
            _waits(op.name)
        if far and near and op.indexes:
            _waits(f"{op.name} with an index on the CPU")
    options = {name: _near(value) for name, value in kwargs.items()}
    if target is not None:
        options["device"] = "cpu"
    if options.get("pin_memory"):
        options["pin_memory"] = False
    inputs = tuple(_near(value) for value in args)
    if state.recording is not None and op.mutable:
        for place, value in zip(func._schema.arguments, inputs, strict=False):
            if place.alias_info is not None and place.alias_info.is_write:
                for tensor in _flat((value,)):
                    state.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
    out = func(*inputs, **options)
    if op.name.startswith("aten._local_scalar_dense"):
        return out
    if to_far and (not state.has_float64 or state.limit < math.inf):
        made = [leaf for leaf in _flat((out,)) if isinstance(leaf, torch.Tensor)]
        if not state.has_float64 and any(tensor.dtype == torch.float64 for tensor in made):
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype as the framework doesn't support float64")
        if any(tensor.numel() * tensor.element_size() > state.limit for tensor in made):
            raise torch.OutOfMemoryError(f"{NAME} out of memory in {op.name}")
    if state.recording is not None:
        state.recording.append((func, inputs, options, out))
    if op.mutable and args and isinstance(args[0], torch.Tensor):
        if isinstance(args[0], Far) and args[0].shape != args[0].near.shape:
            args[0].data = Far(args[0].near)  # its shape follows; its own ``near`` stays
        return args[0]
    return _far(out) if to_far else out


def _check_indexing(name: str, args: tuple[Any, ...]) -> None:
    """Refuse indices on the device into a CPU tensor, and values of another device than what they are written to."""
    indexed, indices, *values = args
    if not isinstance(indexed, Far) and any(isinstance(index, Far) for index in indices):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    for value in values[:1]:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and isinstance(value, Far) != isinstance(indexed, Far):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two, in {name}")


def _autocast(func: Any) -> Callable[..., Any]:
    """Cast to bfloat16 what a product takes, as autocast does."""

    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def lower(*args: Any, **kwargs: Any) -> Any:
        key = torch._C.DispatchKey.AutocastPrivateUse1  # pyright: ignore[reportAttributeAccessIssue]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return lower


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += _flat(value)
        else:
            found.append(value)
    return found


def _near(value: Any) -> Any:
    if isinstance(value, Far):
        return value.near
    return type(value)(_near(each) for each in value) if isinstance(value, list | tuple) else value


def _far(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Far(value)
    return type(value)(_far(each) for each in value) if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def count_syncs() -> Iterator[list[str]]:
    """Count what makes the host wait for the device; gives the names of these operations, growing."""
    state.syncs, state.counting = [], True
    try:
        yield state.syncs
    finally:
        state.counting = False


@contextlib.contextmanager
def memory_limit(values: float) -> Iterator[None]:
    """Refuse tensors of more than so many bytes each; the free memory of the device is that number as well."""
    state.limit = values
    try:
        yield
    finally:
        state.limit = math.inf


def capture(work: Callable[[], Any]) -> Callable[[], None]:
    """Record what ``work`` does on the device, without an effect, as a CUDA graph does; return its replay."""
    state.recording, state.before = [], {}
    recorded = state.recording
    try:
        work()
    finally:
        state.recording = None
        for tensor, value in state.before.values():
            tensor.copy_(value)
        state.before = {}

    def replay() -> None:
        for func, args, kwargs, out in recorded:
            again = func(*args, **kwargs)
            for old, new in zip(_flat((out,)), _flat((again,)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay


def install() -> None:
    """Register the device for this process; a second call does nothing."""
    if state.installed:
        return
    state.installed = True
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        operation, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, operation), overload or "default")
        factories.impl(name, lambda *args, _op=op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
    automatic = torch.library.Library("_", "IMPL")
    automatic.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "addmm", "mm", "bmm", "baddbmm", "addmv"):
        factories.impl(name, _autocast(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _kept.extend([everything, factories, automatic])
    # ``module.double()`` would keep the parameters and exchange their data, which a far tensor does not notice.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Generator = _Generator  # pyright: ignore[reportAttributeAccessIssue]
    # Made from Python numbers, tensors pass by the dispatcher: make them on the CPU and copy.
    torch.tensor, torch.as_tensor = _by_copy(torch.tensor), _by_copy(torch.as_tensor)


def _by_copy(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, torch.Tensor):
            return factory(data, *args, device=device, **kwargs)
        where = torch.empty(0).device if device is None else torch.device(device)
        found = factory(data, *args, device="cpu" if where.type == NAME else where, **kwargs)
        if where.type != NAME:
            return found
        _waits("a tensor from Python numbers, copied to the device")
        return found.to(where)

    return made


_kept: list[Any] = []  # registrations end with their libraries

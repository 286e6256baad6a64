"""Fields of a user's own: any torch module of (t, y, context), chosen by name, in place of the built-in network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pfm._internal.registry import Registry

__all__ = ["FIELDS", "MLP", "RegisteredField", "register_field"]

MLP = "mlp"
TRIED = 3  # rows on which a field is tried out
AGREEMENT = 1e-6  # of a row's velocity alone and among others, in float64, relative to the largest

Builder = Callable[..., nn.Module]
"""Makes a field: (event_shape, context_dimension, **options) -> module of (t, y, context)."""
B = TypeVar("B", bound=Builder)


def _built_in(event_shape: torch.Size, context_dimension: int, **options: Any) -> nn.Module:
    raise TypeError("the built-in network is made by pfm.flow.fields.Field")


FIELDS: Registry[Builder] = Registry("field", "@pfm.register_field({name})", {MLP: _built_in})


def register_field(name: str) -> Callable[[B], B]:
    """Register a vector field of your own, to be named in ``FlowConfig(field=name, field_options={...})``.

    It takes the place of the built-in network: it learns what the closed-form linear part leaves (with
    ``FlowConfig(linear=False)`` all of the velocity), and is kept as far as held-out prompts confirm it.

    The module is called with t (B,) in [0, 1], y (B, \\*D) and context (B, C) or None, and returns (B, \\*D). Outputs
    and contexts come with zero mean and unit scale a value; the result is in units of the pairs' root mean square
    displacement. Rows are independent of each other. The result has y's number type: a fit calls it in float64 too.

    Args:
        name: the name, which is saved with a flow. Register the builder under it before you load one.

    Returns:
        a decorator of a class or function ``builder(event_shape, context_dimension, **options)`` that makes the module.
        ``context_dimension`` is 0 where ``context`` is None. The same arguments must make the same parameters, also
        under ``torch.device("meta")``; options are JSON values.

    Raises:
        TypeError, ValueError: the name is no name, or another field's.

    >>> @register_field("one-layer")
    ... class OneLayer(torch.nn.Module):
    ...     def __init__(self, event_shape, context_dimension):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(event_shape.numel(), event_shape.numel())
    ...
    ...     def forward(self, t, y, context):
    ...         return t.view(-1, *[1] * (y.ndim - 1)) * self.layer(y.flatten(1)).view_as(y)
    """

    def register(builder: B) -> B:
        FIELDS.add(name, builder)
        return builder

    return register


class RegisteredField(nn.Module):
    """Gives a registered field the signature of :class:`pfm.flow.fields.ResidualField`, on flat outputs (B, D).

    Args:
        name: of the registered field.
        event_shape: shape (\\*D) of one output. context_dimension: values of a context, 0 for none.
        options: of its builder.
    """

    def __init__(
        self, name: str, event_shape: Sequence[int], context_dimension: int, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.name = name
        self.event_shape = torch.Size(event_shape)
        self.context_dimension = context_dimension
        self.options = dict(options)
        self.module = self._build()

    def _build(self) -> nn.Module:
        made = FIELDS[self.name](self.event_shape, self.context_dimension, **copy.deepcopy(self.options))
        if not isinstance(made, nn.Module):
            raise TypeError(f"field={self.name!r} must be built as a torch.nn.Module: got {type(made).__name__}")
        return made

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None, repeats: int = 1) -> Tensor:
        """Evaluate at t (B,), (S,) or scalar, flat y (B, D), context (B / repeats, C) or None.

        Times and contexts go with the rows as :meth:`pfm.flow.fields.ResidualField.forward` says.
        """
        if t.ndim == 0:
            t = t.expand(len(y))
        else:
            t = t.repeat_interleave(len(y) // (len(t) * repeats)).repeat(repeats)
            context = None if context is None else context.repeat(repeats, 1)
        return self._evaluate(t.to(y.dtype), y, context)

    def at(self, context: Tensor | None) -> Callable[[float, Tensor], Tensor]:
        """Fix the contexts (B, C) for many evaluations at scalar times."""

        def velocity(t: float, y: Tensor) -> Tensor:
            return self._evaluate(torch.full((len(y),), t, dtype=y.dtype, device=y.device), y, context)

        return velocity

    def _evaluate(self, t: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        given = y.unflatten(1, self.event_shape)
        found = self.module(t, given, context)
        if not isinstance(found, Tensor) or found.shape != given.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"field={self.name!r} must return a velocity of the shape of y, {tuple(given.shape)}: got {got}"
            )
        return found.flatten(1)

    @property
    def multiply_adds(self) -> int:
        """Return the multiplications of one row's evaluation, by torch's count of matrix products and convolutions."""
        from torch.utils.flop_counter import FlopCounterMode

        weight = next(self.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._evaluate(*self._trial(1, weight.device, weight.dtype))
        return max(counter.get_total_flops() // 2, sum(p.numel() for p in self.parameters()))

    def _trial(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make rows to try the field on, the same on every device: t (R,), y (R, D), context (R, C) or None."""
        generator = torch.Generator().manual_seed(0)
        columns = 1 + self.event_shape.numel() + self.context_dimension
        values = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        context = values[:, -self.context_dimension :] if self.context_dimension else None
        return values[:, 0], values[:, 1 : 1 + self.event_shape.numel()], context

    @torch.no_grad()
    def check(self) -> None:
        """Try the field out before it is trained.

        Raises:
            ValueError: it has nothing to learn, fails, returns another shape than that of y, computes in another number
                type than y's, mixes rows, or cannot be built again from its description.
        """
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"field={self.name!r} has no parameters to learn")
        self._check_description()
        device = next(self.parameters()).device
        for dtype in (torch.float32, torch.float64):
            twin, (t, y, context) = copy.deepcopy(self).to(dtype), self._trial(TRIED, device, dtype)
            try:
                found = twin._evaluate(t, y, context)
            except (RuntimeError, TypeError, IndexError, KeyError) as error:
                shape = ", ".join(map(str, (TRIED, *self.event_shape)))
                raise ValueError(
                    f"field={self.name!r} fails on t ({TRIED},), y ({shape}) and context "
                    f"{None if context is None else tuple(context.shape)} in {dtype}: {error}"
                ) from error
            if found.dtype != dtype:
                raise ValueError(
                    f"field={self.name!r} must return y's number type, {dtype}: got {found.dtype}; a tensor that it "
                    "makes itself takes dtype=y.dtype"
                )
            if dtype == torch.float64:
                for row in range(TRIED):
                    part = slice(row, row + 1)
                    alone = twin._evaluate(t[part], y[part], None if context is None else context[part])
                    if not bool((alone - found[part]).abs().max() <= AGREEMENT * found.abs().max()):
                        raise ValueError(
                            f"field={self.name!r} gives a row another velocity alone than among others: rows are "
                            "independent outputs, over which nothing may be normalised, attended to or mixed"
                        )

    def _check_description(self) -> None:
        """Build the field again without memory, as loading does, and compare."""
        ours = _shapes(self.module)
        try:
            with torch.device("meta"):
                theirs = _shapes(self._build())
        except Exception as error:
            raise ValueError(
                f"field={self.name!r} cannot be built under torch.device('meta'), where loading checks a description "
                f"without memory; read no values of tensors in the builder: {error}"
            ) from error
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"field={self.name!r} must be built with the same tensors by the same arguments, or a saved flow "
                    f"cannot be loaded: {name} is {ours.get(name)}, and {theirs.get(name)} when built again"
                )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters and buffers; other values are none that can be saved."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}

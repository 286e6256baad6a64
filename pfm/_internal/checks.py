"""Checks of arguments: whole numbers, numbers in a range, flags, choices, lengths, shapes, finite values.

Every message names the argument, what was expected and what was given: ``hidden must be a whole number of at least 1:
got 0``. A ``hint`` adds the way out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sized
from numbers import Integral
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "as_float_tensor",
    "check_choice",
    "check_finite",
    "check_flag",
    "check_length",
    "check_number",
    "check_same_sizes",
    "check_seed",
    "check_shape",
    "check_whole",
    "checked_column",
    "checked_index",
]

CHUNK = 8192  # rows looked at together
LONGEST_VALUE = 80  # characters of a wrong value that a message shows


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@overload
def check_whole(name: str, value: Any, least: int | None = None, most: int | None = None, *, hint: str = "") -> int: ...
@overload
def check_whole(
    name: str, value: Any, least: int | None = None, most: int | None = None, *, also: tuple[Any, ...], hint: str = ""
) -> Any: ...
def check_whole(
    name: str, value: Any, least: int | None = None, most: int | None = None, *, also: tuple[Any, ...] = (),
    hint: str = "",
) -> Any:  # fmt: skip
    """Check a whole number from ``least`` to ``most`` and return it as an int; numpy's integers are taken too.

    Args:
        name: of the argument.
        value: of the argument. True and False are no numbers.
        least, most: smallest and largest value that is allowed, or None.
        also: other values that are allowed and returned as they are, such as None or "auto".
        hint: the way out.

    Raises:
        ValueError: it is none.

    >>> check_whole("hidden", 64, 1)
    64
    >>> check_whole("steps", 0, 1, also=("auto",))
    Traceback (most recent call last):
        ...
    ValueError: steps must be a whole number of at least 1, or 'auto': got 0
    """
    if _is_one_of(value, also):
        return value
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and (least is None or int(value) >= least) and (most is None or int(value) <= most):
        return int(value)
    wanted = "a whole number"
    if least is not None:
        wanted += f" of at least {least}" if most is None else f" from {least} to {most}"
    raise _refusal(name, f"be {wanted}{_alternatives(also)}", _shown(value), hint)


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    also: tuple[Any, ...] = (),
    hint: str = "",
) -> Any:
    """Check a finite number and return it; a tensor or an array of one value is turned into a float.

    Args:
        name: of the argument.
        value: of the argument. True, False and texts are no numbers.
        least, above: lower end of the range, included or excluded.
        most, below: upper end of the range, included or excluded.
        also: other values that are allowed and returned as they are, such as None or "auto".
        hint: the way out.

    Raises:
        ValueError: it is none, or out of the range.

    >>> check_number("share", 1, above=0, most=1)
    1
    >>> check_number("held_out", 1, above=0, below=1)
    Traceback (most recent call last):
        ...
    ValueError: held_out must lie between 0 and 1: got 1
    >>> check_number("strength", -0.5, least=0)
    Traceback (most recent call last):
        ...
    ValueError: strength must be a number of at least 0: got -0.5
    """
    if _is_one_of(value, also):
        return value
    number = _as_number(value)
    if (
        math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    ):
        return value if isinstance(value, int | float) else number
    raise _refusal(name, _range(least, above, most, below) + _alternatives(also), _shown(value), hint)


def check_seed(seed: Any) -> int:
    """Check a seed, which numpy and torch take in different ranges, and return it as an int.

    Raises:
        ValueError: it is no whole number from 0 to 2⁶³ − 1.

    >>> check_seed(-1)
    Traceback (most recent call last):
        ...
    ValueError: seed must be a whole number from 0 to 9223372036854775807: got -1
    """
    return check_whole("seed", seed, 0, 2**63 - 1)


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise _refusal(name, "be true or false", _shown(value), "")


def check_choice(name: str, value: Any, choices: Iterable[Any], *, hint: str = "") -> None:
    """Check that a value is one of several.

    Raises:
        ValueError: it is not.

    >>> check_choice("ties", "keep", ("half", "drop"))
    Traceback (most recent call last):
        ...
    ValueError: ties must be one of half, drop: got 'keep'
    """
    known = tuple(choices)
    if not _is_one_of(value, known):
        raise _refusal(name, f"be one of {', '.join(map(str, known))}", _shown(value), hint)


def check_length(name: str, values: Sized, count: int, unit: str) -> None:
    """Check that there is one entry for each of several things.

    Raises:
        ValueError: there are more, or fewer.

    >>> check_length("group", [1, 2], 3, "prompt")
    Traceback (most recent call last):
        ...
    ValueError: group must have one entry a prompt: got 2 for 3 prompts
    """
    if len(values) != count:
        article, things = "an" if unit[0] in "aeiou" else "a", unit if count == 1 else f"{unit}s"
        raise ValueError(f"{name} must have one entry {article} {unit}: got {len(values)} for {count} {things}")


def check_shape(name: str, array: _Array, shape: tuple[int | str, ...], meaning: str = "", *, hint: str = "") -> None:
    r"""Check the shape of a tensor or an array.

    Args:
        name: of the argument.
        array: a tensor, or an array of numpy.
        shape: numbers for sizes that are fixed, texts for sizes that are free; a last text with a star, as in
            ``("N", "*D")``, stands for one dimension or more.
        meaning: said after the shape, such as "one row a pair".
        hint: the way out.

    Raises:
        ValueError: it has another shape.

    >>> check_shape("context", torch.zeros(3), (3, "C"), "one row a pair")
    Traceback (most recent call last):
        ...
    ValueError: context must be (3, C), one row a pair: got (3,)
    """
    got = tuple(array.shape)
    fixed = shape[:-1] if isinstance(shape[-1], str) and shape[-1].startswith("*") else shape
    matches = len(got) == len(shape) if fixed is shape else len(got) >= len(shape)
    if not matches or any(not isinstance(size, str) and size != own for size, own in zip(fixed, got, strict=False)):
        wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        raise _refusal(name, f"be {wanted}" + (f", {meaning}" if meaning else ""), str(got), hint)


def check_same_sizes(name: str, given: Any, like: Any, whose: str) -> None:
    """Check that pairs, flows or models are of outputs of one shape, under contexts of one dimension.

    Raises:
        ValueError: their ``event_shape`` or ``context_dimension`` differ.
    """
    for size in ("event_shape", "context_dimension"):
        ours, theirs = getattr(like, size), getattr(given, size)
        if ours != theirs:
            raise ValueError(f"{name} must have {whose} {size} {ours}: got {theirs}")


def check_finite(name: str, array: Tensor | np.ndarray) -> None:
    r"""Refuse NaN and infinity in a tensor or an array (N, \*D), naming the first row that holds one.

    Raises:
        ValueError: there is one.
    """
    bad = _bad_rows(array)
    if bad is None:
        return
    row = int(bad.nonzero()[0])
    raise ValueError(
        f"{name} must be finite: {int(bad.sum())} of {len(bad)} rows hold NaN or infinity, "
        f"the first is row {row} (shape {tuple(array.shape)}); remove or repair them"
    )


def as_float_tensor(name: str, value: Any) -> Tensor:
    """Turn an array-like into a floating-point tensor (float16, bfloat16 and float64 are kept).

    Arrays in the byte order of another machine, with negative strides, or of more than 64 bits are copied.

    Raises:
        TypeError: it holds no real numbers, is masked, or is no dense tensor.
    """
    wanted = f"{name} must be a tensor or an array of numbers"
    if type(value).__module__.partition(".")[0] == "scipy":  # its sparse matrices, which become arrays of objects
        raise TypeError(f"{wanted}: got the sparse {type(value).__name__}; pass {name}.toarray()")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        masked = int(np.ma.count_masked(value))
        raise TypeError(f"{wanted}: got a masked array, {masked} of whose values are missing; remove or fill them")
    try:
        tensor = torch.as_tensor(_plain_array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{wanted}: got {got}") from error
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers: got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{wanted}: got a tensor of layout {tensor.layout}; pass {name}.to_dense()")
    if tensor.is_quantized:
        raise TypeError(f"{wanted}: got a quantized tensor; pass {name}.dequantize()")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():  # of no use where gradients are wanted
        tensor = tensor.clone()
    return tensor if tensor.is_floating_point() else tensor.float()


def _plain_array(array: np.ndarray) -> np.ndarray | Tensor:
    """Return an array that torch can take: of this machine's byte order, positive strides and at most 64 bits."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if not array.flags.writeable:  # torch warns of it; nothing here is written to
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
            return torch.as_tensor(array)
    return array


def checked_index(name: str, value: Any, table: Tensor) -> Tensor:
    """Check a one-dimensional index into a table's rows and return it on the table's device."""
    plain = _plain_array(value) if isinstance(value, np.ndarray) else value
    index, rows = torch.as_tensor(plain).to(table.device), len(table)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{name} must be a one-dimensional integer tensor: got {index.dtype} {tuple(index.shape)}")
    index = index.long()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise ValueError(f"{name} must lie in 0..{rows - 1}: got values from {int(index.min())} to {int(index.max())}")
    return index


def checked_column(name: str, value: Any, count: int, low: float, high: float, device: torch.device) -> Tensor | None:
    """Check a column (N,) of numbers in [low, high] and return it as float32; None stays None."""
    if value is None:
        return None
    column = as_float_tensor(name, value).to(device, torch.float32)
    check_shape(name, column, (count,), "one number a pair")
    check_finite(name, column)
    if bool((column < low).any()) or bool((column > high).any()):
        row = int(((column < low) | (column > high)).nonzero()[0])
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]: row {row} is {float(column[row]):g}")
    return column


def _bad_rows(array: Tensor | np.ndarray) -> Tensor | None:
    """Return which rows hold NaN or infinity, (N,) bool, or None if none does."""
    if isinstance(array, np.ndarray):
        finite = np.isfinite(np.atleast_1d(array))
        return None if finite.all() else torch.from_numpy(~finite.reshape(len(finite), -1).all(1))
    rows = array.flatten(1) if array.ndim > 1 else array.reshape(-1, 1)
    # A sum is finite whenever every value is (float64 cannot overflow on float32 values): one cheap pass, in
    # pieces, since summing in another type copies.
    if rows.device.type == "cpu":
        fine = all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in rows.split(CHUNK))
    else:  # one look at the device; the largest and smallest value are NaN if any is
        fine = rows.numel() == 0 or bool(torch.isfinite(torch.stack(rows.aminmax())).all())
    if fine:
        return None
    bad = torch.cat([(~torch.isfinite(part)).any(1) for part in rows.split(CHUNK)])
    return bad if bool(bad.any()) else None


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Compare within a type: False is not 0, and arrays, which compare entry by entry, are none of the choices."""
    return any(
        value is each or (isinstance(value, type(each)) and not isinstance(value, bool) and value == each)
        for each in choices
    )


def _as_number(value: Any) -> float:
    """Return a number as a float, and NaN for what is none."""
    if isinstance(value, bool | str | bytes | bytearray):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _range(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """Describe the range of numbers that are wanted."""
    low, high = (above if least is None else least), (below if most is None else most)
    if low is not None and high is not None:
        if least is None and most is None:
            return f"lie between {low:g} and {high:g}"
        return f"lie in {'(' if least is None else '['}{low:g}, {high:g}{')' if most is None else ']'}"
    if above is not None:
        return "be a positive number" if above == 0 else f"be a number above {above:g}"
    if least is not None:
        return f"be a number of at least {least:g}"
    if high is not None:
        return f"be a number {'below' if most is None else 'of at most'} {high:g}"
    return "be a finite number"


def _alternatives(also: tuple[Any, ...]) -> str:
    return "".join(f", or {each!r}" for each in also)


def _shown(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)


def _refusal(name: str, wanted: str, got: str, hint: str) -> ValueError:
    got = got if len(got) <= LONGEST_VALUE else f"{got[: LONGEST_VALUE - 1]}…"
    return ValueError(f"{name} must {wanted}: got {got}" + (f"; {hint}" if hint else ""))

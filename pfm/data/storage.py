"""A folder of .npy arrays beside a description, which is written last."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_choice
from pfm._internal.files import replace_file, replace_json
from pfm.data.tensors import CHUNK

__all__ = ["read_arrays", "write_arrays"]

DESCRIPTION = "pairs.json"


def write_arrays(
    folder: str | Path,
    large: Mapping[str, Tensor | None],
    columns: Mapping[str, Tensor | None],
    described: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> Path:
    """Write named tensors to a folder, those in ``large`` as ``dtype`` (see :meth:`EncodedPairs.save`); skip None.

    Raises:
        ValueError: ``dtype`` is no choice, or a value is too large for float16.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # it comes last: without it the folder is unfinished
    for name, table in large.items():
        if table is not None:
            _write_table(folder / f"{name}.npy", name, table, dtype)
    for name, column in columns.items():
        if column is not None:
            np.save(folder / f"{name}.npy", column.cpu().numpy(), allow_pickle=False)
    names = [name for name, value in {**large, **columns}.items() if value is not None]
    replace_json(folder / DESCRIPTION, {"version": 1, "arrays": names, **described})
    return folder


def read_arrays(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors, mapped into memory, that :func:`write_arrays` wrote.

    Raises:
        FileNotFoundError: the folder holds no finished pairs.
    """
    folder = Path(folder).expanduser()
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {DESCRIPTION}: give a folder that EncodedPairs.save has finished writing"
        )
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    return described, {name: _mapped(folder / f"{name}.npy") for name in described["arrays"]}


def _mapped(path: Path) -> Tensor:
    """Map a file into memory: columns copy-on-write, tables read-only.

    Linux refuses a copy-on-write map that is larger than the memory.
    """
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim == 1:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing ever writes to it
        return torch.from_numpy(array)


def _write_table(path: Path, name: str, table: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None:
        dtype = table.dtype if table.dtype in (torch.float16, torch.float32) else torch.float32
    check_choice("dtype", dtype, (torch.float16, torch.float32))
    kind = np.float16 if dtype == torch.float16 else np.float32

    def write(partial: Path) -> None:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=tuple(table.shape))
        for begin in range(0, len(table), CHUNK):
            part = table[begin : begin + CHUNK].float()
            if dtype == torch.float16 and float(part.abs().max()) > torch.finfo(torch.float16).max:
                raise ValueError(f"{name} holds values up to {float(part.abs().max()):g}, beyond float16: use float32")
            array[begin : begin + CHUNK] = part.cpu().numpy()
        array.flush()

    replace_file(path, write)

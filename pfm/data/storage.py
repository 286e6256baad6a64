"""A folder of .npy arrays beside a description, which is written last."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_choice
from pfm._internal.files import replace_file, replace_json
from pfm.data.tensors import CHUNK

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs

__all__ = ["GrowingArrays", "read_arrays", "write_arrays"]

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


class GrowingArrays:
    """A folder of arrays like that of :func:`write_arrays`, to which encoded pairs are added part by part.

    Files are written beside those of finished pairs, and take their places when the block is left without an error.

    Args:
        folder: made if absent. dtype: of outputs and contexts, float16 or float32.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
        check_choice("dtype", dtype, (torch.float16, torch.float32))
        self.folder, self.dtype = Path(folder).expanduser(), dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self.described: dict[str, Any] | None = None
        self.count = self.outputs = self.contexts = 0
        self._files: dict[str, _Growing] = {}

    def add(self, pairs: EncodedPairs, group: Tensor) -> None:
        """Add pairs, of the prompts (N,) int64; candidate sets are left out.

        Raises:
            ValueError: they are of another shape or encoder than those before, or too large for float16.
        """
        described = {"event_shape": list(pairs.event_shape), "encoder": pairs.encoder}
        outputs, (chosen, rejected) = pairs.output_table(), pairs.row_numbers()
        contexts, context_index = pairs.context_table()
        found = described | {"context_dimension": pairs.context_dimension}
        if self.described is None:
            self.described = found
        if found != self.described:
            raise ValueError(f"every part must be encoded alike: got {found} after {self.described}")
        self._write("outputs", outputs)
        self._write("chosen_index", chosen + self.outputs)
        self._write("rejected_index", rejected + self.outputs)
        if contexts is not None and context_index is not None:
            self._write("contexts", contexts)
            self._write("context_index", context_index + self.contexts)
            self.contexts += len(contexts)
        for name, column in (("weight", pairs.weight), ("probability", pairs.probability)):
            if column is not None and name not in self._files and self.count:
                self._write(name, torch.ones(self.count, dtype=torch.float32))  # of the parts before
            if column is not None or name in self._files:
                self._write(name, torch.ones(len(pairs), dtype=torch.float32) if column is None else column)
        self._write("group", group)
        self.outputs += len(outputs)
        self.count += len(pairs)

    def _write(self, name: str, rows: Tensor) -> None:
        if rows.ndim == 2:
            for part in rows.split(CHUNK):
                self._append(name, _rounded(name, part, self.dtype))
        else:
            self._append(name, rows.cpu().numpy())

    def _append(self, name: str, rows: Any) -> None:
        if name not in self._files:
            self._files[name] = _Growing(self.folder / f".{name}.{os.getpid()}.partial")
        self._files[name].append(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            for file in self._files.values():
                file.close()
            if kind is None and self.described is not None:
                (self.folder / DESCRIPTION).unlink(missing_ok=True)
                for name, file in self._files.items():
                    os.replace(file.path, self.folder / f"{name}.npy")
                described = {name: self.described[name] for name in ("event_shape", "encoder")}
                replace_json(self.folder / DESCRIPTION, {"version": 1, "arrays": list(self._files), **described})
        finally:
            for file in self._files.values():
                file.path.unlink(missing_ok=True)


class _Growing:
    """One .npy file whose number of rows is written last; its header has room for any."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.shape, self.kind = path, 0, (), np.dtype(np.float32)
        self.file = path.open("wb")

    def append(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        if not self.count:
            self.shape, self.kind = rows.shape[1:], rows.dtype
            self._write_header()
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def _write_header(self) -> None:
        header = {"descr": self.kind.str, "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.close()


def _rounded(name: str, rows: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return rows as float16 or float32.

    Raises:
        ValueError: a value is too large for float16.
    """
    part = rows.float()
    if dtype == torch.float16 and float(part.abs().max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} holds values up to {float(part.abs().max()):g}, beyond float16: use float32")
    return part.to(dtype).cpu().numpy()


def _write_table(path: Path, name: str, table: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is None:
        dtype = table.dtype if table.dtype in (torch.float16, torch.float32) else torch.float32
    check_choice("dtype", dtype, (torch.float16, torch.float32))
    kind = np.float16 if dtype == torch.float16 else np.float32

    def write(partial: Path) -> None:
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=tuple(table.shape))
        for begin in range(0, len(table), CHUNK):
            array[begin : begin + CHUNK] = _rounded(name, table[begin : begin + CHUNK], dtype)
        array.flush()

    replace_file(path, write)

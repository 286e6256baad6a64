"""Files of rows to encoded pairs on disk, one file at a time: together they need not fit into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pfm.data.encoded import EncodedPairs
from pfm.data.pairs import PreferencePairs
from pfm.data.readers import FILE_READERS, without_compression
from pfm.data.storage import GrowingArrays

__all__ = ["encode_files", "row_files"]


def row_files(files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files of rows of a folder, in the order of their names, or the files that are given.

    Raises:
        ValueError: there are none. FileNotFoundError: one of them does not exist.
    """
    if isinstance(files, str | os.PathLike):
        folder = Path(files).expanduser()
        if not folder.is_dir():
            found = [folder]
        else:
            found = sorted(path for path in folder.iterdir() if _is_row_file(path))
            if not found:
                raise ValueError(
                    f"{folder} holds no file of rows: expected names that end in {', '.join(FILE_READERS)}"
                )
    else:
        found = [Path(path).expanduser() for path in files]
    if not found:
        raise ValueError("files must name at least one file of rows: got none")
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file")
    return found


def _is_row_file(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))  # what other programs keep beside their rows
    return not hidden and path.is_file() and without_compression(path).suffix.lower() in FILE_READERS


def encode_files(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    encoder: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    context: bool = True,
    reasoning: str = "strip",
    progress: bool = True,
    **options: Any,
) -> EncodedPairs:
    """Encode files of preference rows one after the other into a folder, and map the pairs into memory.

    In memory are the rows of one file, and of all pairs their numbers: about 40 bytes a pair. Rows of equal prompts
    are of one group wherever they stand, so that a split of the result never cuts a prompt. Candidate sets are left
    out: what is fitted on the result has ``best_of=2``.

    Args:
        files: a folder, of which all files of rows are taken, or the files; each as
            :meth:`pfm.PreferencePairs.from_file` reads it.
        encoder: as for :meth:`pfm.PreferencePairs.encode`.
        folder: where the vectors go; what is there under the same names is replaced once all files are encoded.
        dtype: of the vectors on disk, float16 or float32.
        context, reasoning: as for :meth:`pfm.PreferencePairs.encode`.
        progress: show a bar over the files.
        options: columns and bad rows, as for :meth:`pfm.PreferencePairs.from_file`.

    Returns:
        the pairs; :meth:`pfm.EncodedPairs.load` maps them again.

    Raises:
        ValueError, TypeError, FileNotFoundError: there are no files, or as the two methods raise.

    >>> import json
    >>> from pathlib import Path
    >>> from pfm.encoders import SurfaceEncoder
    >>> Path("rows").mkdir()
    >>> for part in range(2):
    ...     row = {"prompt": f"Tea {part}?", "chosen": "Yes, please!", "rejected": "no"}
    ...     _ = Path(f"rows/{part}.jsonl").write_text(json.dumps(row))
    >>> encode_files("rows", SurfaceEncoder(), "pairs", progress=False)
    EncodedPairs(2 pairs of (28,), context 28)
    """
    paths = row_files(files)
    bar = tqdm(paths, desc="encoding", unit="file", disable=True) if not progress else tqdm(paths, desc="encoding")
    with GrowingArrays(folder, dtype) as arrays, bar:
        for path in bar:
            rows = PreferencePairs.from_file(path, **options)
            pairs = rows.encode(encoder, context=context, reasoning=reasoning, progress=False)
            arrays.add(pairs, group_names(rows))
    return EncodedPairs.load(Path(folder))


def group_names(rows: PreferencePairs) -> Tensor:
    """Return a number (N,) int64 for the prompt of each pair, the same in every file; two prompts share one by chance.

    The chance is N^2 / 2^64.
    """
    names = {}
    for identity in rows._identities:
        if identity not in names:
            digest = hashlib.blake2b(repr(identity).encode("utf-8", "surrogatepass"), digest_size=8).digest()
            names[identity] = int.from_bytes(digest, "little", signed=True)
    return torch.tensor([names[identity] for identity in rows._identities])

"""Folders of safetensors and JSON: saved as a whole, and checked before anything is allocated.

A save writes its files into a folder beside their places (``.saving-*``), and renames that folder to ``.saved`` once
all of them are there. This rename is the one point at which the old save becomes the new one: before it every reader
finds the old files; after it the files only remain to be moved, which the next reader or writer does if this one is
killed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pfm._internal.files import replace_file
from pfm.errors import NotRegisteredError

__all__ = [
    "finish_save",
    "load_module",
    "load_tensors",
    "read_description",
    "read_folder",
    "save_folder",
    "save_tensors",
    "tensor_shapes",
]

logger = logging.getLogger(__name__)

STAGING, COMMITTED = ".saving-", ".saved"
STALE_SECONDS = 3600.0  # age of what a killed save has left, before the next save removes it
MAX_DESCRIPTION_BYTES = 100_000_000  # as safetensors bounds its own header
ATTEMPTS = 20
PAUSE_SECONDS = 0.002  # more before each further attempt
FLOATS = ("F", "BF")  # how safetensors' names of such number types begin

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


# -- saving ------------------------------------------------------------------------------------------------------


@contextmanager
def save_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, and put what is in it into ``folder`` as a whole.

    Files of other names in ``folder`` stay. If writing fails or the process is killed, ``folder`` keeps what it had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    _remove_stale(folder)
    staging = folder / f"{STAGING}{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    try:
        yield staging
        _commit(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        finish_save(folder)
    except OSError as error:  # the save is done all the same: every reader moves the files before it reads
        logger.warning("%s is saved, but not yet moved into place (%s); the next load does it", folder, error)


def finish_save(folder: Path) -> None:
    """Move the files of a save that was committed into place; call it before reading ``folder``.

    Raises:
        OSError: a file cannot be moved, as on a read-only disk. ValueError: a link leads out of ``folder``.
    """
    committed = folder / COMMITTED
    if committed.is_symlink() or not committed.is_dir():
        return
    home = folder.resolve()
    for parent, _, names in os.walk(committed, topdown=False):
        target = folder / os.path.relpath(parent, committed)
        # A folder may come from a stranger: a link in it must not lead the files anywhere else.
        if not target.resolve().is_relative_to(home):
            raise ValueError(f"{target} leads out of {folder}: remove this link before you load from there")
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                os.replace(Path(parent, name), target / name)
            except FileNotFoundError:  # another process finishes the same save
                continue
        try:
            os.rmdir(parent)
        except OSError:  # gone, or another save has been committed meanwhile
            continue


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, atomically."""
    from safetensors.torch import save_file

    whole: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        whole[name] = value.clone() if memory in taken else value  # the format holds no tensors that share memory
        taken.add(memory)
    replace_file(path, lambda partial: save_file(whole, partial, metadata={"format": "pt"}))


def _commit(staging: Path, folder: Path) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_SECONDS * attempt)
        try:
            os.rename(staging, folder / COMMITTED)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            finish_save(folder)  # another process has committed a save, and may not have moved it yet
    raise OSError(f"{folder} is being saved to by another process without end: save to another folder")


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"{STAGING}*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


# -- loading -----------------------------------------------------------------------------------------------------


def read_folder(folder: Path, patterns: Sequence[str], read: Callable[[], T]) -> T:
    """Read files that belong together, again if another process has saved to the folder meanwhile.

    Args:
        folder: the folder; a save that was committed is moved into place first.
        patterns: of the names of the files that are read.
        read: reads them.

    Raises:
        OSError: saves follow each other without end.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_SECONDS * attempt)
        finish_save(folder)
        before = _stamps(folder, patterns)
        try:
            found = read()
        except (OSError, ValueError):
            if _stamps(folder, patterns) == before:
                raise
            continue
        if _stamps(folder, patterns) == before:
            return found
    raise OSError(f"{folder} is being saved to by another process without end: load it when that is done")


def _stamps(folder: Path, patterns: Sequence[str]) -> dict[Path, tuple[int, ...]]:
    """Return what changes when a file is replaced, and the folder of a save that is not moved yet."""
    found: dict[Path, tuple[int, ...]] = {}
    for pattern in (*patterns, COMMITTED):
        for path in folder.glob(pattern):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def read_description(path: Path) -> dict[str, Any]:
    """Read the JSON object that describes an archive.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, too large, or no object.
    """
    size = path.stat().st_size
    if size > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, of at most {MAX_DESCRIPTION_BYTES:,}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): save or fit it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): save or fit it again")
    return found


def tensor_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read shape and number type of every tensor from the header of a safetensors file, and allocate nothing.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged or was cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy, save or fit it again") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file to the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged or was cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or was cut short ({error}): copy, save or fit it again") from error


def load_module(
    build: Callable[[], M], path: Path, described: str, *, prefix: str = "", device: torch.device | None = None
) -> M:
    """Make a module and load its tensors, after its shapes were found to be those of the file.

    The shapes are those of a first module without memory, so that a description of a huge one costs nothing.

    Args:
        build: makes the module as its description says; called twice.
        path: the safetensors file.
        described: name of the file that holds the description, for errors.
        prefix: of the names in the file that belong to the module; others are left alone.
        device: where to load to; None for the CPU.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, or the two do not belong together.
    """
    header = {
        name[len(prefix) :]: torch.empty(
            shape, dtype=torch.float32 if kind.startswith(FLOATS) else torch.int64, device="meta"
        )
        for name, (shape, kind) in tensor_shapes(path).items()
        if name.startswith(prefix)
    }
    try:
        with torch.device("meta"), _SmallRanges():
            skeleton = build()
            wanted, header = skeleton.state_dict(), _upgraded(skeleton, header)
    except NotRegisteredError as error:
        raise NotRegisteredError(f"{path.with_name(described)}: {error}") from error
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: its {described} is damaged or describes something else ({reason})") from error
    for name in sorted(wanted.keys() | header.keys()):
        expected, found = (tuple(part[name].shape) if name in part else None for part in (wanted, header))
        if expected != found:
            raise ValueError(
                f"{path} does not fit its {described} at {prefix}{name}: expected shape {expected}, got {found}"
            )
        if wanted[name].is_floating_point() != header[name].is_floating_point():
            raise ValueError(f"{path} does not fit its {described} at {prefix}{name}: got numbers of another type")
    module = build()
    tensors = load_tensors(path)
    tensors = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(_upgraded(module, tensors))
    return module if device is None else module.to(device)


def _upgraded(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors of an older save into today's layout, by each part that has ``upgraded(tensors, prefix)``."""
    for name, part in module.named_modules():
        upgrade: Any = getattr(part, "upgraded", None)
        if callable(upgrade):
            tensors = cast(dict[str, Tensor], upgrade(tensors, f"{name}." if name else ""))
    return tensors


class _SmallRanges(TorchFunctionMode):
    """Makes short ranges on the CPU: on the meta device they import a compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.arange and all(isinstance(end, int) and abs(end) < 1000 for end in args):
            options.setdefault("device", "cpu")
        return func(*args, **options)

"""Save and load small networks of observations, each in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pfm._internal.files import replace_file

__all__ = ["load_network", "save_network"]


def save_network(path: str | Path, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write tensors, with what else is needed to make the network again as the file's metadata; return the path."""
    meta = {"kind": kind, "config": json.dumps(config)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = Path(path).expanduser()
    replace_file(path, lambda partial: save_file(whole, partial, meta))
    return path


def load_network(path: str | Path, kind: str, sizes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`save_network` wrote: the configuration and the tensors.

    Args:
        path: the file.
        kind: what it must hold.
        sizes: names of the whole numbers in the configuration, of which ``layers`` is one.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give one that {kind}.save wrote")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if meta.get("kind") != kind:
        raise ValueError(f"{path} holds {meta.get('kind', 'no named kind')}, expected {kind}")
    try:
        config = json.loads(meta["config"])
        wrong = [name for name in sizes if type(config[name]) is not int or config[name] < 0]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration is damaged ({error!r}): save it again") from error
    if wrong or config["layers"] > len(tensors):
        name = (wrong or ["layers"])[0]
        raise ValueError(f"{path}: its configuration does not fit its tensors at {name}={config[name]!r}")
    return config, tensors

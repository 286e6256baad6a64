"""Networks that are trained once: resumable training, and a cache of safetensors and JSON outside the repository."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pfm._internal.archive import load_tensors, save_folder, save_tensors
from pfm._internal.files import cache_folder, replace_json
from pfm._internal.optimizers import optimizer_state, optimizer_tensors

__all__ = ["Training", "batches", "progress_bar", "trained"]

logger = logging.getLogger(__name__)

MODEL, DESCRIPTION, STATE = "model.safetensors", "model.json", "state.safetensors"
DONE = "done"  # the state's tensor that counts finished parts


class Training:
    """Keeps the state of a training: modules and optimisers by name, and how many parts of it are done.

    What is random in a part must come from the part's number, so that an interrupted training continues as if it
    had not been.

    Args:
        folder: where the state lies while training goes on.
        parts: modules and optimisers by name.
    """

    def __init__(self, folder: Path, parts: Mapping[str, nn.Module | Optimizer]) -> None:
        self.folder, self.parts, self.done = folder, dict(parts), 0
        path = folder / STATE
        if not path.is_file():
            return
        try:
            tensors = load_tensors(path)
            for name, part in self.parts.items():
                own = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
                part.load_state_dict(optimizer_state(part, own) if isinstance(part, Optimizer) else own)
            self.done = int(tensors[DONE])
        except (ValueError, LookupError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged or of another training ({error}): delete it to start anew") from error

    def save(self) -> None:
        """Count one more part as done, and write the state."""
        self.done += 1
        tensors: dict[str, Tensor] = {DONE: torch.tensor(self.done)}
        for name, part in self.parts.items():
            own = optimizer_tensors(part) if isinstance(part, Optimizer) else part.state_dict()
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.folder / STATE, tensors)

    def remaining(self, parts: int, label: str, progress: bool) -> Iterator[int]:
        """Yield the numbers of the parts that are left."""
        yield from progress_bar(range(self.done, parts), label, progress)


def trained(
    kind: str, settings: Mapping[str, Any], module: nn.Module, train: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Load a module's tensors from the cache, or train it and keep them; return what the training found.

    Args:
        kind: names the cached folder, with a digest of the settings.
        settings: all that determines the training, JSON values.
        module: what is trained, in place; it is then in evaluation mode and without gradients.
        train: trains it with a folder for its state, and returns JSON values to be kept beside it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder("images") / f"{kind}-{digest}"
    if (folder / DESCRIPTION).is_file() and (folder / MODEL).is_file():
        found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["found"]
        try:
            module.load_state_dict(load_tensors(folder / MODEL))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} is damaged ({error}): delete it, and it is trained again") from error
    else:
        logger.info("training %s into %s", kind, folder)
        found = train(folder)
        with save_folder(folder) as staging:
            save_tensors(staging / MODEL, module.state_dict())
            replace_json(staging / DESCRIPTION, {"kind": kind, "settings": dict(settings), "found": found})
        (folder / STATE).unlink(missing_ok=True)
    module.eval().requires_grad_(False)
    return found


def batches(count: int, size: int, seed: int) -> list[Tensor]:
    """Deal ``count`` rows into batches of ``size`` in random order; what is left over is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order[: max(1, count // size) * size].split(size))


def progress_bar(items: Any, label: str, progress: bool) -> Any:
    """Show a progress bar over items."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, disable=not progress, leave=False)

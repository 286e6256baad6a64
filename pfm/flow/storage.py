"""A flow as two files, safetensors and JSON, checked against each other before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from pfm._internal.archive import load_module, read_description, read_folder, save_tensors, tensor_shapes
from pfm._internal.checks import check_whole
from pfm._internal.files import replace_json, require_files
from pfm.flow.model import FlowModel
from pfm.flow.preference_win import PreferenceWin

__all__ = ["check_vacant", "download", "load_files", "load_folder", "save_files"]

DESCRIPTION, TENSORS = "config.json", "model.safetensors"  # the hub's names
MOST_STEPS = 100_000  # of a pass; a fit finds 128 at most
DESCRIBED = ("event_shape", "context_dimension", "config", "metadata")

F = TypeVar("F", bound=FlowModel)


def check_vacant(folder: Path) -> None:
    """Refuse to save a flow over the files of something else, such as a language model, that have the same names.

    Raises:
        FileExistsError: the folder's description or tensors are whole, and not those of a flow.
    """
    description, tensors = folder / DESCRIPTION, folder / TENSORS
    foreign = None
    try:
        if description.is_file():
            found = read_description(description)
            foreign = description if found and not any(key in found for key in DESCRIBED) else None
        elif tensors.is_file():
            foreign = tensors if "normalizer.mean" not in tensor_shapes(tensors) else None
    except ValueError:  # damaged: nothing that could be lost
        return
    if foreign is not None:
        raise FileExistsError(f"{foreign} is not a preference flow's and would be lost: save to another folder")


def save_files(flow: FlowModel, folder: Path) -> None:
    """Write a flow's two files to a folder."""
    save_tensors(folder / TENSORS, flow.state_dict())
    replace_json(folder / DESCRIPTION, _describe(flow))


def load_folder(kind: type[F], folder: Path, device: torch.device) -> F:
    """Load a flow of class ``kind`` from a folder.

    Raises:
        FileNotFoundError: one of the files is not there. ValueError: as :func:`load_files`.
    """

    def load() -> F:
        require_files(folder, (DESCRIPTION, TENSORS), "PreferenceFlow.save_pretrained")
        return load_files(kind, folder / DESCRIPTION, folder / TENSORS, device)

    return read_folder(folder, (DESCRIPTION, TENSORS), load)


def load_files(kind: type[F], description: Path, tensors: Path, device: torch.device) -> F:
    """Load a flow of class ``kind`` from its two files.

    Raises:
        ValueError: a file is damaged, or the two do not belong together.
    """
    described = read_description(description)
    missing = [key for key in DESCRIBED if key not in described]
    if missing:
        raise ValueError(f"{description} is damaged or is not a preference flow's: it lacks {', '.join(missing)}")
    shapes = tensor_shapes(tensors)
    try:
        _check_sizes(described, shapes)
        _check_pass(described["config"], described["metadata"])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{tensors} does not fit its {DESCRIPTION} at {error}") from error
    flow = load_module(
        lambda: kind(**{key: described[key] for key in DESCRIBED}), tensors, DESCRIPTION, device=device
    ).eval()
    for name, value in flow.state_dict().items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):  # infinite spreads there are
            raise ValueError(f"{tensors} is damaged: {name} holds NaN; copy, save or fit it again")
    return flow


def download(name: str, **options: Any) -> tuple[Path, Path]:
    """Return where the hub's files of a flow lie on this machine, fetched if they are not here yet.

    Raises:
        FileNotFoundError: there is no such repository, or the hub was not reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        first, second = (Path(hf_hub_download(name, file, **options)) for file in (DESCRIPTION, TENSORS))
    except (OSError, ValueError) as error:  # all errors of the hub are one of these
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no folder here, and was not loaded from the hub ({type(error).__name__}: {reason}): give a "
            "folder written by PreferenceFlow.save_pretrained, or a repository on the hub that you can reach"
        ) from error
    return first, second


def _describe(flow: FlowModel) -> dict[str, Any]:
    metadata = dict(flow.metadata)
    if isinstance(flow.win, PreferenceWin):
        metadata["preference"] = flow.win.describe()
    rounds = [_describe(later) for later in flow.later if isinstance(later, FlowModel)]
    if rounds:
        metadata["later"] = [{name: found[name] for name in ("config", "metadata")} for found in rounds]
    return {
        "event_shape": list(flow.event_shape),
        "context_dimension": flow.context_dimension,
        "config": flow.config.to_dict(),
        "metadata": metadata,
    }


def _check_pass(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Check what a pass goes by, of every round: a stranger's number of steps must not take all day."""
    for steps in (config.get("steps"), metadata.get("steps")):
        check_whole("steps", steps, 1, MOST_STEPS, also=("auto", None))
    for name, kind in (("unit_norm", bool), ("win", Mapping)):
        if metadata.get(name) is not None and not isinstance(metadata[name], kind):
            wanted = "true or false" if kind is bool else "an object"
            raise TypeError(f"{name}: expected {wanted}, got {metadata[name]!r:.80}")
    for later in metadata.get("later", []):
        _check_pass(later["config"], later["metadata"])


def _check_sizes(described: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Compare the sizes in a description with the shapes of the tensors, before a module is made by them."""
    event_shape, context_dimension = described["event_shape"], described["context_dimension"]
    if not isinstance(event_shape, list):
        raise TypeError(f"event_shape: expected a list of whole numbers, got {event_shape!r}")
    for number in (*event_shape, context_dimension):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise TypeError(f"event_shape or context_dimension: expected whole numbers of at least 0, got {number!r}")
    for name, size in (("normalizer.mean", math.prod(event_shape)), ("normalizer.context_mean", context_dimension)):
        found = shapes[name][0] if name in shapes else None
        if found != (size,):
            raise ValueError(f"{name}: expected shape {(size,)}, got {found}")
    # A field has a tensor and more for each of its layers, and a normalizer for each of its rounds.
    flows = sum(name.endswith("normalizer.mean") for name in shapes)
    pending = [described]
    while pending:
        part = pending.pop()
        flows -= 1
        if flows < 0:
            raise ValueError("later: expected no more rounds than there are tensors of")
        layers = dict(part["config"]).get("layers", 1)
        if isinstance(layers, int) and layers > len(shapes):
            raise ValueError(f"layers: expected at most {len(shapes)}, the number of its tensors, got {layers}")
        pending += part["metadata"].get("later", [])

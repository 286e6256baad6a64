"""Folders of trained writers: JSON and safetensors, checked before anything is allocated."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from pfm._internal.archive import load_tensors, read_description, read_folder, save_folder, save_tensors, tensor_shapes
from pfm._internal.byte_pairs import read_tokenizer
from pfm._internal.files import replace_file, replace_json, require_files
from pfm.decoders.editing.language_model import BUNDLED, LanguageModelWriter, load_base
from pfm.decoders.editing.pointer import PointerWriter
from pfm.decoders.editing.writer import Writer

__all__ = ["DESCRIPTION", "load_writer", "save_writer"]

DESCRIPTION, WEIGHTS, TOKENIZER = "editor.json", "editor.safetensors", "tokenizer.json"
_FORMAT = 1


def save_writer(
    writer: Writer, folder: str | os.PathLike[str], *, encoder: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Save what was trained of a writer, and what it needs to be built again.

    Args:
        writer: the network.
        folder: is made; what is there is replaced as a whole.
        encoder: description of the encoder whose vectors it was trained on.
        training: what the training found, in JSON values.
    """
    described = {
        "format": _FORMAT,
        "kind": writer.kind,
        "settings": writer.settings(),
        "encoder": encoder,
        "training": training or {},
    }
    with save_folder(Path(folder).expanduser()) as target:
        if isinstance(writer, PointerWriter):
            text = writer.tokenizer.to_str()
            replace_file(target / TOKENIZER, lambda path: path.write_text(text, encoding="utf-8"))
        kind = torch.bfloat16 if isinstance(writer, LanguageModelWriter) else torch.float32
        save_tensors(target / WEIGHTS, {name: value.to(kind) for name, value in writer.trained().items()})
        replace_json(target / DESCRIPTION, described)


def load_writer(
    folder: str | os.PathLike[str], *, base: Any = None, device: torch.device | str = "cpu"
) -> tuple[Writer, dict[str, Any]]:
    """Load a writer and the folder's description; no code from the folder runs.

    Args:
        folder: written by :func:`save_writer`.
        base: the base model in place of the one that the folder names: a folder, or (model, tokenizer). Needed where
            it names any other than the known one, since a folder may come from a stranger.
        device: where to compute.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged or too large, the files do not belong
            together, or the base model has to be given.
    """
    source = Path(folder).expanduser()

    def read() -> tuple[Writer, dict[str, Any]]:
        require_files(source, (DESCRIPTION, WEIGHTS), "save_writer or pfm train-decoder")
        described = read_description(source / DESCRIPTION)
        if described.get("format") != _FORMAT or not isinstance(described.get("settings"), dict):
            raise ValueError(f"{source / DESCRIPTION} is damaged or of another version: train the decoder again")
        return _built(source, described, base, torch.device(device)), described

    return read_folder(source, (DESCRIPTION, WEIGHTS, TOKENIZER), read)


def _built(source: Path, described: dict[str, Any], base: Any, device: torch.device) -> Writer:
    settings, kind = dict(described["settings"]), described.get("kind")
    shapes = {name: shape for name, (shape, _) in tensor_shapes(source / WEIGHTS).items()}
    elements = sum(math.prod(shape) for shape in shapes.values())
    try:
        if kind == PointerWriter.kind:
            tokenizer = _tokenizer(source)
            with torch.device("meta"):
                skeleton = PointerWriter(tokenizer, **settings)
            _compare(source, {name: tuple(value.shape) for name, value in skeleton.trained().items()}, shapes)
            writer: Writer = PointerWriter(tokenizer, **settings)
        elif kind == LanguageModelWriter.kind:
            name = settings.pop("base")
            if base is None and name != BUNDLED:
                raise ValueError(
                    f"{source} was trained on the base model {str(name)[:200]!r}: pass base=, its folder or "
                    "(model, tokenizer)"
                )
            kind_of_number = torch.float32 if device.type == "cpu" else torch.bfloat16
            model, tokens = base if isinstance(base, tuple) else load_base(base or BUNDLED, dtype=kind_of_number)
            wanted = _elements(settings, model.config.hidden_size)
            if wanted > elements:
                raise ValueError(f"it describes at least {wanted:,} numbers, and {WEIGHTS} holds {elements:,}")
            writer = LanguageModelWriter(model.to(device), tokens, base_name=name, **settings)
            _compare(source, {name: tuple(value.shape) for name, value in writer.trained().items()}, shapes)
        else:
            raise ValueError(f"it names no known kind of writer: {str(kind)[:200]!r}")
    except (TypeError, KeyError) as error:
        raise ValueError(f"{source / DESCRIPTION} is damaged ({error}): train the decoder again") from error
    tensors = load_tensors(source / WEIGHTS)
    with torch.no_grad():
        for name, value in writer.trained().items():
            value.copy_(tensors[name])
    return writer.to(device).eval()


def _elements(settings: dict[str, Any], width: int) -> int:
    """Return how many numbers the prefix network alone has, which a description could make huge."""
    given = [settings.get(name) for name in ("dimension", "prefix_hidden", "prefix", "rank")]
    sizes = [size for size in given if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    if len(sizes) < len(given):
        raise ValueError(f"its settings are damaged: {str(settings)[:300]}")
    dimension, hidden, prefix, rank = sizes
    return 2 * dimension * hidden + hidden * prefix * width + 2 * rank * width


def _tokenizer(source: Path) -> Any:
    require_files(source, (TOKENIZER,), "save_writer or pfm train-decoder")
    return read_tokenizer(source / TOKENIZER, "train the decoder again")


def _compare(source: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{source / WEIGHTS} and {DESCRIPTION} do not belong together: {name[:200]} is "
                f"{found.get(name, 'missing')} in the file, and {wanted.get(name, 'not expected')} as described"
            )

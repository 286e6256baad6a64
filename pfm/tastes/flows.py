"""Fields of tastes: one flow a taste, or one field that reads a code of the rater."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_finite, check_length, check_shape
from pfm.data.encoded import EncodedPairs
from pfm.devices import standard_defaults
from pfm.flow.composition import Composition, check_weights
from pfm.flow.config import FlowConfig
from pfm.flow.preference_flow import PreferenceFlow
from pfm.tastes.likelihood import NEGLIGIBLE, vote_weight
from pfm.tastes.raters import number_raters, renumber

__all__ = ["append_code", "taste_flows", "with_code"]


@standard_defaults
def taste_flows(
    pairs: EncodedPairs,
    memberships: Any,
    config: FlowConfig | Mapping[str, Any] | None = None,
    *,
    names: Sequence[Hashable] | None = None,
    progress: bool = True,
) -> Composition:
    """Fit one flow a taste, each on all pairs of its raters, and compose them with equal weights.

    Args:
        pairs: N labelled pairs.
        memberships: (N,) the group of each pair's rater; or (N, K) its rater's responsibilities, each row with sum 1,
            as ``mixture.responsibilities[index]`` gives them: pairs count for a taste with that weight.
        config: settings of all flows.
        names: of the tastes; with groups, those that there should be.

    Raises:
        ValueError: a group or taste has no pairs.
    """
    if isinstance(memberships, Tensor) and memberships.ndim == 2:
        share = check_weights("memberships", memberships, memberships.shape[1])
        names = list(range(share.shape[1])) if names is None else list(names)
        check_length("names", names, share.shape[1], "taste")
    else:
        present, index = number_raters(memberships, len(pairs), "memberships")
        if names is not None:
            index, present = renumber(present, index, list(names)), list(names)
        names, share = present, torch.nn.functional.one_hot(index, len(present)).float()
    check_length("memberships", share, len(pairs), "pair")
    share = share.cpu()
    held = share * vote_weight(pairs)[:, None].cpu() > NEGLIGIBLE
    for name, kept in zip(names, held.T, strict=True):
        if int(kept.sum()) < 2:
            raise ValueError(f"taste {name!r} has {int(kept.sum())} pairs: at least two are needed to fit a flow")
    flows = []
    for column, kept in zip(share.T, held.T, strict=True):
        part = pairs.select(kept)
        if bool((column[kept] < 1).any()) or pairs.weight is not None:
            part.weight = (vote_weight(pairs).cpu() * column)[kept].to(pairs.device)
        flows.append(PreferenceFlow.fit(part, config, progress=progress))
    return Composition(flows, torch.full((len(flows),), 1 / len(flows)), [str(name) for name in names])


def with_code(pairs: EncodedPairs, code: Any) -> EncodedPairs:
    """Append a code of the rater to each pair's context, for a single flow that is conditioned on it.

    The code may be one-hot in the groups, a rater's responsibilities, or any numbers that distinguish raters;
    :func:`append_code` makes the contexts to apply such a flow under. Its closed-form field shifts outputs with the
    code, and its network may turn them; the reward in its b is linear in the outputs alone, so that opposite tastes
    cancel there: for b by taste use the models of a :class:`TasteMixture`.

    Args:
        pairs: N labelled pairs, with contexts or without.
        code: (N, K).
    """
    code = as_float_tensor("code", code).to(pairs.device, torch.float32)
    check_shape("code", code, (len(pairs), "K"), "one row a pair")
    check_finite("code", code)
    context = pairs.context
    joined = code if context is None else torch.cat([context.float(), code], dim=1)
    contexts, context_index = torch.unique(joined, dim=0, return_inverse=True)
    return EncodedPairs.from_table(
        pairs.output_table().unflatten(1, pairs.event_shape), *pairs.row_numbers(),
        contexts=contexts, context_index=context_index,
        weight=pairs.weight, probability=pairs.probability, group=pairs.group, encoder=pairs.encoder, check=False,
    )  # fmt: skip


def append_code(context: Any, code: Any, count: int | None = None) -> Tensor:
    """Return contexts (B, C + K), on their device, from contexts (B, C), (C,) or None and a code (K,) or (B, K)."""
    code = as_float_tensor("code", code).float()
    code = code.to(context.device) if isinstance(context, Tensor) else code
    code = code[None] if code.ndim == 1 else code
    if context is None:
        return code if count is None else code.expand(count, -1)
    context = as_float_tensor("context", context).float()
    context = context[None] if context.ndim == 1 else context
    rows = max(len(context), len(code), count or 1)
    if len(context) not in (1, rows) or len(code) not in (1, rows):
        raise ValueError(f"context and code must have equally many rows, or one: got {len(context)} and {len(code)}")
    return torch.cat([context.expand(rows, -1), code.expand(rows, -1)], dim=1)

"""From the texts of preference pairs to encoded pairs: every distinct text is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfm.data.candidates import CandidateGroup
from pfm.data.encoded import EncodedPairs
from pfm.data.identity import PromptIdentity, prompt_identity
from pfm.reasoning import checked_reasoning, training_text

__all__ = ["encode_columns"]

#: What is encoded for an empty prompt beside others: encoders take no empty text, and all parts of a split must agree.
EMPTY_PROMPT = "(no prompt)"


def encode_columns(
    encoder: Any,
    prompts: Sequence[str],
    chosen_texts: Sequence[str],
    rejected_texts: Sequence[str],
    identities: Sequence[PromptIdentity],
    candidate_groups: Sequence[CandidateGroup],
    *,
    context: bool,
    reasoning: str,
    progress: bool,
    weight: Sequence[float] | None,
    probability: Sequence[float] | None,
) -> EncodedPairs:
    """Encode the columns of N pairs, as :meth:`pfm.PreferencePairs.encode` says."""
    from pfm.encoders import as_encoder

    encoder, reasoning = as_encoder(encoder), checked_reasoning(reasoning)
    outputs: dict[str, int] = {}
    chosen = [outputs.setdefault(text, len(outputs)) for text in chosen_texts]
    rejected = [outputs.setdefault(text, len(outputs)) for text in rejected_texts]
    numbers: dict[PromptIdentity, int] = {}
    groups = [numbers.setdefault(identity, len(numbers)) for identity in identities]
    # Without contexts a candidate set is found by its prompt's number, with them by its text's.
    texts: dict[Any, int] = {}
    text_index = [texts.setdefault(prompt, len(texts)) for prompt in prompts]
    candidates = [
        (
            texts.setdefault(entry.prompt, len(texts))
            if context
            else numbers[prompt_identity(entry.prompt, entry.group)],
            torch.tensor([outputs.setdefault(text, len(outputs)) for text in entry.texts]),
            torch.tensor(entry.scores, dtype=torch.float32),
        )
        for entry in candidate_groups
    ]
    contexts = None
    if context:
        encode_prompts = getattr(encoder, "encode_prompts", encoder.encode)
        contexts = _encode(encode_prompts, [text or EMPTY_PROMPT for text in texts], progress)
    return EncodedPairs.from_table(
        _encode(encoder.encode, [training_text(text, reasoning) for text in outputs], progress),
        torch.tensor(chosen),
        torch.tensor(rejected),
        contexts=contexts,
        context_index=None if contexts is None else torch.tensor(text_index),
        weight=weight,
        probability=probability,
        group=torch.tensor(groups),
        encoder=encoder.describe() or None,
        candidates=candidates or None,
    )


def _encode(encode: Callable[..., Tensor], texts: list[str], progress: bool) -> Tensor:
    vectors = torch.as_tensor(encode(texts, progress=progress))
    if len(vectors) != len(texts):
        raise ValueError(f"the encoder must return one vector a text: got {len(vectors)} for {len(texts)} texts")
    return vectors

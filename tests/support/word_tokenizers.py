"""Tokenizers of a few words, for tiny models."""

from __future__ import annotations

from typing import Any

WORDS = ["<pad>", "<end>", "<unknown>", "<user>", "<assistant>", "hello", "there"]


def make_tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unknown>", eos_token="<end>", **options)

"""Sentences, and a tokenizer of their words."""

from __future__ import annotations

from typing import Any

SAID = [
    "the film was lovely",
    "the film was dull",
    "the meal was warm and late",
    "a long walk in the cold",
    "the room",
    "nobody was there but the song was bright",
]


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in SAID for word in text.split()})
    table = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", ".", *words])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )

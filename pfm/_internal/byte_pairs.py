"""Byte-pair tokenizers of small models: trained on texts, and read from folders that may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["read_tokenizer", "train_tokenizer"]

MOST_BYTES = 50_000_000


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, fold: bool = False) -> Tokenizer:
    """Train byte-level byte-pair encoding on texts, with the end of text at id 0.

    Args:
        texts: what it is trained on.
        vocabulary: most tokens.
        fold: whether texts are read in Unicode's form NFKC and in lower case.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    if fold:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: Path, again: str) -> Tokenizer:
    """Read a tokenizer's file.

    Args:
        path: of the file.
        again: what to do where it is damaged, such as "train the decoder again".

    Raises:
        ValueError: it is damaged or too large.
    """
    from tokenizers import Tokenizer

    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, of at most {MOST_BYTES:,}")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # what the library raises has no common class
        raise ValueError(f"{path} is damaged ({str(error)[:200]}): {again}") from error

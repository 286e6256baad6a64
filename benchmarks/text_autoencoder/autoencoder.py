"""The text autoencoder with its tokenizer: texts in, vectors out and back; folders in Hugging Face's layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.text_autoencoder.network import END, Network, NetworkSettings
from benchmarks.text_autoencoder.search import draw, search
from pfm._internal.archive import load_module, read_description, read_folder, save_folder, save_tensors
from pfm._internal.byte_pairs import read_tokenizer
from pfm._internal.checks import check_finite, check_number, check_shape, check_whole
from pfm._internal.files import replace_file, replace_json, require_files
from pfm.decoders.latent import weights_identity
from pfm.encoders.base import check_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["AGAIN", "CONFIG", "MODEL_TYPE", "SentenceAutoencoder", "padded"]

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
MODEL_TYPE = "sentence-autoencoder"
AGAIN = "train the autoencoder again"
ROWS = 256  # encoded or decoded at once


class SentenceAutoencoder:
    """Encodes sentences to vectors (B, D) of length sqrt(D), and writes the sentence of a vector.

    Args:
        network: the trained network. tokenizer: of the ``tokenizers`` library, with END at id 0.
        training: what the training found, JSON values.

    >>> model = SentenceAutoencoder.from_pretrained("runs/autoencoder")  # doctest: +SKIP
    >>> model.decode(model.encode(["a wonderful film, from the first scene to the last ."]))  # doctest: +SKIP
    ['a wonderful film, from the first scene to the last.']
    """

    name = MODEL_TYPE

    def __init__(self, network: Network, tokenizer: Tokenizer, training: dict[str, Any] | None = None) -> None:
        if tokenizer.get_vocab_size() != network.settings.vocabulary:
            raise ValueError(
                f"tokenizer must have the network's {network.settings.vocabulary} tokens: got "
                f"{tokenizer.get_vocab_size()}; load both from one folder"
            )
        self.network, self.tokenizer, self.training = network.eval().requires_grad_(False), tokenizer, training or {}

    def __repr__(self) -> str:
        return f"SentenceAutoencoder({self.network.settings})"

    @property
    def dimension(self) -> int:
        """The length D of the vectors."""
        return self.network.settings.width

    def describe(self) -> dict[str, Any]:
        """Describe the autoencoder in JSON values."""
        return {
            "type": type(self).__name__,
            "name": self.name,
            "revision": weights_identity(self.network),
            "dimension": self.dimension,
        }

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without END."""
        return [row.ids for row in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Encode N texts as (N, D) float32.

        Raises:
            TypeError, ValueError: a text is no string, is empty, or has more tokens than the window.
        """
        rows = self.tokenize(check_texts(texts, "error"))
        window = self.network.settings.window
        for number, row in enumerate(rows):
            if len(row) > window:
                raise ValueError(
                    f"texts[{number}] has {len(row)} tokens, and the autoencoder's window {window}: split it into "
                    f"shorter sentences, which are encoded one by one: got {texts[number][:80]!r}"
                )
        parts = [self.network.encode(*padded(rows[at : at + ROWS])) for at in range(0, len(rows), ROWS)]
        return torch.cat(parts) if parts else torch.zeros(0, self.dimension)

    @property
    def is_language_model(self) -> bool:
        """Whether the decoder was trained without latents as well, so that ``decode`` takes a fluency."""
        return "writer" in self.training

    def decode(
        self, vectors: Tensor, *, temperature: float = 0.0, seed: int = 0, fluency: float = 0.0, beams: int = 1
    ) -> list[str]:
        """Write the texts of vectors (N, D), of any length.

        Args:
            vectors: (N, D).
            temperature: of the draws of tokens; 0 for the likeliest text.
            seed: of the draws.
            fluency: weight of the texts' own log-probability, without a latent, beside that of the texts given the
                vector; see :func:`benchmarks.text_autoencoder.search.search`.
            beams: of the search for the likeliest text; 1 takes the likeliest token each time.

        Raises:
            ValueError: another shape, values that are not finite, or a setting out of its range; a fluency where the
                decoder is no language model; beams where texts are drawn.
        """
        table = torch.as_tensor(vectors).detach().float()
        check_shape("vectors", table, ("N", self.dimension))
        check_finite("vectors", table)
        check_number("temperature", temperature, least=0)
        check_number("fluency", fluency, least=0)
        check_whole("beams", beams, 1, self.network.settings.vocabulary)
        if fluency and not self.is_language_model:
            raise ValueError(
                f"fluency={fluency} needs a decoder that is a language model, which this one is not: let python -m "
                "benchmarks.text_autoencoder train it again, or set fluency to 0"
            )
        if temperature and beams > 1:
            raise ValueError(f"beams must be 1 where texts are drawn: got beams={beams}, temperature={temperature}")
        random = torch.Generator().manual_seed(seed)
        nats = float(self.training["writer"]["nats"]) if fluency else 0.0
        texts: list[str] = []
        for some in table.split(max(1, ROWS // beams)):
            if beams > 1:
                ids = search(self.network, some, fluency, beams, nats).tolist()
            else:
                ids = draw(self.network, some, temperature, random, fluency, nats).tolist()
            rows = [row[: row.index(END)] if END in row else row for row in ids]
            texts += [text.strip() for text in self.tokenizer.decode_batch(rows)]
        return texts

    def save_pretrained(self, folder: str | os.PathLike[str], card: str = "") -> None:
        """Save config.json, model.safetensors, tokenizer.json and README.md; what is there is replaced as a whole."""
        described = {"model_type": MODEL_TYPE, **asdict(self.network.settings), "training": self.training}
        with save_folder(Path(folder).expanduser()) as target:
            text = self.tokenizer.to_str()
            replace_file(target / TOKENIZER, lambda path: path.write_text(text, encoding="utf-8"))
            save_tensors(target / WEIGHTS, self.network.state_dict())
            if card:
                replace_file(target / CARD, lambda path: path.write_text(card, encoding="utf-8"))
            replace_json(target / CONFIG, described)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SentenceAutoencoder:
        """Load a folder; no code from it runs, and sizes are checked before anything is allocated.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged, or the files do not belong together.
        """
        source = Path(folder).expanduser()

        def read() -> SentenceAutoencoder:
            require_files(source, (CONFIG, WEIGHTS, TOKENIZER), "python -m benchmarks.text_autoencoder")
            described = read_description(source / CONFIG)
            if described.get("model_type") != MODEL_TYPE:
                raise ValueError(
                    f"{source / CONFIG} must have the model_type {MODEL_TYPE!r}: got "
                    f"{str(described.get('model_type'))[:80]!r}"
                )
            given = {field.name: described[field.name] for field in fields(NetworkSettings) if field.name in described}
            try:
                settings = NetworkSettings(**given)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source / CONFIG} is damaged ({error}): train the autoencoder again") from error
            network = load_module(lambda: Network(settings), source / WEIGHTS, CONFIG)
            training = described.get("training")
            tokenizer = read_tokenizer(source / TOKENIZER, AGAIN)
            return cls(network, tokenizer, training if isinstance(training, dict) else None)

        return read_folder(source, (CONFIG, WEIGHTS, TOKENIZER), read)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of token ids with END appended as (B, T), and a mask (B, T) that is True up to there."""
    width = max(len(row) for row in rows) + 1
    ids = torch.full((len(rows), width), END)
    lengths = torch.tensor([len(row) for row in rows])
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, torch.arange(width) <= lengths[:, None]

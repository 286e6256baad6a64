"""Training of the text autoencoder: denoising, resumable, on one CPU core."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from benchmarks.images.stored import STATE, Training
from benchmarks.text_autoencoder.autoencoder import (
    AGAIN,
    CONFIG,
    TOKENIZER,
    SentenceAutoencoder,
    padded,
)
from benchmarks.text_autoencoder.card import model_card
from benchmarks.text_autoencoder.network import END, Network, NetworkSettings
from benchmarks.text_autoencoder.search import draw
from pfm._internal.byte_pairs import read_tokenizer, train_tokenizer
from pfm._internal.files import claim_folder, replace_file
from pfm._internal.smollm2 import has_bfloat16

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "TrainingSettings",
    "UpdateSettings",
    "fit",
    "measure",
    "rows_of",
    "token_vectors",
    "train",
]

PART = 25  # updates between two saved states
BUCKET = 32  # batches that are sorted by length together
CONTEXT = 3  # tokens on either side that count as neighbours
PLAN = "plan.json"


@dataclass(frozen=True)
class UpdateSettings:
    """Sets what every training has.

    shortest: fewest tokens of a sentence that is used; the network's window is the most. batch: sentences an update.
    """

    shortest: int = 8
    batch: int = 128
    learning_rate: float = 1e-3
    warm_up: int = 50
    seed: int = 0


@dataclass(frozen=True)
class TrainingSettings(UpdateSettings):
    """Sets the training.

    noise: standard deviation on each of the latent's values, which are of size one. replaced: share of the tokens that
    the encoder sees replaced by others. attribute: weight of the loss that organises latents by the attribute.
    """

    noise: float = 0.3
    replaced: float = 0.1
    attribute: float = 0.2


@dataclass(frozen=True)
class Corpus:
    """Holds sentences, those that are held out, and what is known of the attribute: 1, 0, or -1 for unknown."""

    texts: Sequence[str]
    attributes: Sequence[int]
    held_out: Sequence[str]
    held_out_attributes: Sequence[int]


def train(
    folder: Path,
    corpus: Corpus,
    sizes: NetworkSettings | None = None,
    settings: TrainingSettings | None = None,
    *,
    updates: int = 7000,
    progress: bool = True,
) -> SentenceAutoencoder:
    """Train and save an autoencoder, or load the one that is there; an interrupted training is resumed.

    Args:
        folder: gets the state every 25 updates, and in the end the model in place of it.
        corpus: sentences; those of other lengths than the settings' are left out.
        sizes, settings: None for the defaults. A started folder keeps its own and refuses others.
        updates: until the learning rate has fallen to 5%; may differ when a training goes on.
        progress: show a bar.

    Raises:
        ValueError: the folder is of another training, or no sentence has the right length.
    """
    sizes, settings = sizes or NetworkSettings(), settings or TrainingSettings()
    if (folder / CONFIG).is_file():
        return SentenceAutoencoder.from_pretrained(folder)
    claim_folder(folder, PLAN, {"network": asdict(sizes), "training": asdict(settings), "sentences": len(corpus.texts)},
                 "autoencoder")  # fmt: skip
    tokenizer = _tokenizer(folder, corpus.texts, sizes.vocabulary)
    rows, attributes = rows_of(tokenizer, corpus.texts, corpus.attributes, settings.shortest, sizes.window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(sizes)
        if not (folder / STATE).is_file():
            network.start_from(*token_vectors(rows, sizes.vocabulary, sizes.width))

    def loss(update: int, chosen: list[int]) -> Tensor:
        return _loss(network, [rows[n] for n in chosen], attributes[chosen], settings, update)

    seconds = fit(folder, network, list(network.parameters()), loss, [len(row) for row in rows], settings, updates,
                  "autoencoder", progress)  # fmt: skip
    model = SentenceAutoencoder(network, tokenizer)
    model.training = {
        "settings": asdict(settings),
        "updates": updates,
        "sentences": len(rows),
        "epochs": round(updates * settings.batch / len(rows), 2),
        "parameters": sum(part.numel() for part in network.parameters()),
        "cpu_seconds": seconds,
        **measure(model, corpus, settings.shortest),
    }
    model.save_pretrained(folder, model_card(model))
    for name in (STATE, PLAN):
        (folder / name).unlink(missing_ok=True)
    return model


def fit(
    folder: Path,
    network: Network,
    trained: list[nn.Parameter],
    loss: Callable[[int, list[int]], Tensor],
    lengths: Sequence[int],
    settings: UpdateSettings,
    updates: int,
    label: str,
    progress: bool,
) -> int:
    """Make the updates that are left, with the state kept in a folder, and return the CPU-seconds of all.

    Args:
        folder: gets the state every 25 updates.
        network: whose state is kept. trained: its parameters that change.
        loss: of an update's number and the rows of its batch.
        lengths: of the rows, by which they are dealt into batches.
        settings: of the updates; the learning rate falls to 5% until the last of ``updates``.
        label: of the bar. progress: show one.
    """
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    clock = nn.ParameterDict({"seconds": nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)})
    training = Training(folder, {"network": network, "optimizer": optimizer, "clock": clock})
    batches = _Batches(lengths, settings.batch, settings.seed)
    began = time.process_time()
    for part in training.remaining(-(-updates // PART), f"{label}, {PART} updates each", progress):
        for update in range(part * PART, min((part + 1) * PART, updates)):
            warm = min(1.0, (update + 1) / settings.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm * max(0.05, 1 - update / updates)
            found = loss(update, batches(update))
            optimizer.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        clock["seconds"] += time.process_time() - began
        began = time.process_time()
        training.save()
    return round(float(clock["seconds"]))


@torch.no_grad()
def measure(model: SentenceAutoencoder, corpus: Corpus, shortest: int, count: int = 1000) -> dict[str, float]:
    """Return figures on held-out sentences.

    token_accuracy: of tokens whose predecessors are given. written_accuracy: of tokens at their places when the
    decoder writes by itself. exact: share of sentences written without a fault. attribute_accuracy: of the attribute
    that is read from the latent.
    """
    network, window = model.network, model.network.settings.window
    rows, attributes = rows_of(model.tokenizer, corpus.held_out, corpus.held_out_attributes, shortest, window)
    rows, attributes = rows[:count], attributes[:count]
    ids, mask = padded(rows)
    latents = network.encode(ids, mask)
    right = (network.logits(network.states(latents, ids)).argmax(2) == ids)[mask]
    written = draw(network, latents)
    own = torch.full_like(written, END)
    width = min(window, ids.shape[1])
    own[:, :width] = ids[:, :width]
    tokens = mask[:, :width] & (ids[:, :width] != END)
    known = attributes >= 0
    told = (network.attribute_logits(latents) > 0) == (attributes > 0)
    return {
        "token_accuracy": round(float(right.float().mean()), 4),
        "written_accuracy": round(float((written == own)[:, :width][tokens].float().mean()), 4),
        "exact": round(float((written == own).all(1).float().mean()), 4),
        "attribute_accuracy": round(float(told[known].float().mean()), 4) if bool(known.any()) else 0.5,
    }


def token_vectors(rows: Sequence[Sequence[int]], vocabulary: int, width: int) -> tuple[Tensor, Tensor]:
    """Return unit vectors (V, D) of tokens by singular values of their positive pointwise mutual information.

    Neighbours count within three tokens, contexts with their frequency to the power .75 (Levy, Goldberg & Dagan 2015).

    Returns:
        the vectors, and how often each token occurs (V,), END once in every row.
    """
    gap = [-1] * CONTEXT
    line = torch.tensor([token for row in rows for token in (*row, *gap)])
    joint = torch.zeros(vocabulary * vocabulary)
    for distance in range(1, CONTEXT + 1):
        left, right = line[:-distance], line[distance:]
        both = (left >= 0) & (right >= 0)
        joint += torch.bincount(left[both] * vocabulary + right[both], minlength=vocabulary**2)
    joint = joint.view(vocabulary, vocabulary)
    joint = joint + joint.T
    count = joint.sum(1) + 1
    context = count**0.75 / (count**0.75).sum()
    information = (joint / (count[:, None] * context)).clamp_min(1).log()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, _ = torch.svd_lowrank(information, min(width, vocabulary), niter=2)
        vectors = nn.functional.pad(left * values.sqrt(), (0, width - left.shape[1]))
        vectors = vectors - vectors.mean(0)
        rare = vectors.norm(dim=1) < 1e-6
        vectors = torch.where(rare[:, None], torch.randn(vocabulary, width), vectors)
    counts = torch.bincount(line[line >= 0], minlength=vocabulary).float()
    counts[END] = len(rows)
    return normalize(vectors, dim=1), counts


class _Batches:
    """Deals the rows of each epoch into batches of like length, by the update's number alone.

    Args:
        lengths: of the rows. size: rows of a batch. seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed = lengths, size, seed
        self.dealt = lru_cache(maxsize=1)(self._dealt)

    def __call__(self, update: int) -> list[int]:
        count = -(-len(self.lengths) // self.size)
        return self.dealt(update // count)[update % count]

    def _dealt(self, epoch: int) -> list[list[int]]:
        source = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        source.shuffle(order)
        size = self.size
        batches: list[list[int]] = []
        for at in range(0, len(order), size * BUCKET):
            some = sorted(order[at : at + size * BUCKET], key=self.lengths.__getitem__)
            batches += [some[start : start + size] for start in range(0, len(some), size)]
        source.shuffle(batches)
        return batches


def _loss(
    network: Network, rows: list[list[int]], attributes: Tensor, settings: TrainingSettings, update: int
) -> Tensor:
    noise = torch.Generator().manual_seed(1_000_003 * settings.seed + update)
    ids, mask = padded(rows)
    replaced = mask & (torch.rand(ids.shape, generator=noise) < settings.replaced)
    others = torch.randint(1, network.settings.vocabulary, ids.shape, generator=noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
        latents = network.encode(torch.where(replaced, others, ids), mask)
        noisy = latents + settings.noise * torch.randn(latents.shape, generator=noise)
        logits = network.logits(network.states(noisy, ids)[mask])
    loss = cross_entropy(logits.float(), ids[mask])
    known = attributes >= 0
    if bool(known.any()):
        told = network.attribute_logits(noisy.float())[known]
        loss = loss + settings.attribute * binary_cross_entropy_with_logits(told, attributes[known].float())
    return loss


def rows_of(
    tokenizer: Tokenizer, texts: Sequence[str], attributes: Sequence[int], shortest: int, longest: int
) -> tuple[list[list[int]], Tensor]:
    found = [row.ids for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    kept = [number for number, row in enumerate(found) if shortest <= len(row) <= longest]
    if not kept:
        raise ValueError(f"no sentence has {shortest} to {longest} tokens: got {len(found)} sentences")
    return [found[n] for n in kept], torch.tensor([int(attributes[n]) for n in kept])


def _tokenizer(folder: Path, texts: Sequence[str], vocabulary: int) -> Any:
    path = folder / TOKENIZER
    if not path.is_file():
        text = train_tokenizer(texts, vocabulary, fold=True).to_str()
        replace_file(path, lambda place: place.write_text(text, encoding="utf-8"))
    tokenizer = read_tokenizer(path, AGAIN)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the sentences give {tokenizer.get_vocab_size()} tokens, and vocabulary is {vocabulary}: set it to that"
        )
    return tokenizer

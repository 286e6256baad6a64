"""Second training of the text autoencoder: a deeper decoder, which is a language model where a latent says little.

The encoder stays as it is, so that latents, and flows that are fitted on them, stay valid. The decoder reads latents
with noise of several sizes, and some sentences without any latent: with a latent of zeros it gives the probability of
a sentence alone, by which :func:`benchmarks.text_autoencoder.search.search` keeps to sentences that are likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.images.stored import STATE
from benchmarks.text_autoencoder.autoencoder import CONFIG, MODEL_TYPE, SentenceAutoencoder, padded
from benchmarks.text_autoencoder.card import model_card
from benchmarks.text_autoencoder.network import Network
from benchmarks.text_autoencoder.training import PLAN, Corpus, UpdateSettings, fit, measure, rows_of
from pfm._internal.archive import read_description
from pfm._internal.files import claim_folder
from pfm._internal.smollm2 import has_bfloat16

__all__ = ["WriterSettings", "is_trained", "nats_alone", "train_writer"]


@dataclass(frozen=True)
class WriterSettings(UpdateSettings):
    """Sets the second training.

    writers: layers of the decoder then. least_noise, most_noise: range of the standard deviation on each of the
    latent's values, which are of size one; each sentence has its own. without: share of the sentences that are written
    without a latent.
    """

    seed: int = 1
    writers: int = 6
    least_noise: float = 0.2
    most_noise: float = 0.8
    without: float = 0.4


def train_writer(
    folder: Path,
    model: SentenceAutoencoder,
    corpus: Corpus,
    settings: WriterSettings | None = None,
    *,
    updates: int = 3500,
    progress: bool = True,
) -> SentenceAutoencoder:
    """Train the decoder of a trained autoencoder again, and save it in place of what is there; resumable.

    Args:
        folder: where the autoencoder lies; gets the state every 25 updates.
        model: the autoencoder; one whose decoder was trained again is returned as it is.
        corpus: the sentences that it was trained on.
        settings: None for the defaults. A started folder keeps its own and refuses others.
        updates: until the learning rate has fallen to 5%; may differ when a training goes on.
        progress: show a bar.

    Raises:
        ValueError: the folder is of another training, or no sentence has the right length.
    """
    if "writer" in model.training:
        return model
    settings = settings or WriterSettings()
    claim_folder(folder, PLAN, {"writer": asdict(settings), "sentences": len(corpus.texts)}, "a decoder")
    window = model.network.settings.window
    rows, _ = rows_of(model.tokenizer, corpus.texts, corpus.attributes, settings.shortest, window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = model.network.deepened(settings.writers)
    network.requires_grad_(False)
    trained = network.writing_parameters()
    for part in trained:
        part.requires_grad_(True)

    def loss(update: int, chosen: list[int]) -> Tensor:
        return _loss(network, [rows[n] for n in chosen], settings, update)

    seconds = fit(folder, network, trained, loss, [len(row) for row in rows], settings, updates, "decoder", progress)
    found = SentenceAutoencoder(network, model.tokenizer)
    shortest = int(model.training.get("settings", {}).get("shortest", settings.shortest))
    found.training = {
        **model.training,
        **measure(found, corpus, shortest),
        "parameters": sum(part.numel() for part in network.parameters()),
        "writer": {
            "settings": asdict(settings),
            "updates": updates,
            "cpu_seconds": seconds,
            "nats": nats_alone(found, corpus.held_out),
        },
    }
    found.save_pretrained(folder, model_card(found))
    for name in (STATE, PLAN):
        (folder / name).unlink(missing_ok=True)
    return found


@torch.no_grad()
def nats_alone(model: SentenceAutoencoder, texts: Sequence[str], count: int = 1000) -> float:
    """Return what the decoder needs for a token of texts without a latent, on average, in nats.

    Texts of more tokens than the window are left out, and all but the first ``count``.
    """
    rows = [row for row in model.tokenize(texts) if len(row) <= model.network.settings.window]
    ids, mask = padded(rows[:count])
    states = model.network.states(torch.zeros(len(ids), model.dimension), ids)
    return round(float(cross_entropy(model.network.logits(states[mask]), ids[mask])), 4)


def is_trained(folder: Path) -> bool:
    """Return whether a folder holds an autoencoder whose decoder was trained again, or a model of another kind."""
    if not (folder / CONFIG).is_file():
        return False
    described = read_description(folder / CONFIG)
    return described.get("model_type") != MODEL_TYPE or "writer" in (described.get("training") or {})


def _loss(network: Network, rows: list[list[int]], settings: WriterSettings, update: int) -> Tensor:
    random = torch.Generator().manual_seed(1_000_003 * settings.seed + update)
    ids, mask = padded(rows)
    between = torch.rand(len(rows), 1, generator=random)
    size = settings.least_noise + (settings.most_noise - settings.least_noise) * between
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
        with torch.no_grad():
            latents = network.encode(ids, mask)
            noisy = network.on_sphere(latents + size * torch.randn(latents.shape, generator=random))
            noisy[torch.rand(len(rows), generator=random) < settings.without] = 0
        logits = network.logits(network.states(noisy, ids)[mask])
    return cross_entropy(logits.float(), ids[mask])

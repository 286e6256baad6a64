"""A small world of sentences with a mood, and an autoencoder for them that is trained in seconds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pfm.data import PreferencePairs

NOUNS = ["film", "meal", "room", "trip", "book", "game", "song", "walk"]
GOOD = ["lovely", "superb", "warm", "clever", "joyful", "bright"]
BAD = ["dreadful", "dull", "bleak", "clumsy", "sour", "cold"]
PLAIN = ["long", "short", "early", "late", "wide", "square"]
WORDS = ["<none>", "the", "was", "and", *NOUNS, *GOOD, *BAD, *PLAIN]
LENGTH = 8


def sentence(source: random.Random) -> str:
    """Draw a sentence: two things, each with a word that says how it was."""
    one, two = source.sample(NOUNS, 2)
    moods = [source.choice(source.choice([GOOD, BAD, PLAIN])) for _ in range(2)]
    return f"the {one} was {moods[0]} and the {two} {moods[1]}"


def mood(prompt: object, text: str) -> float:
    """Judge a text by its words: +1 for each good one, -1 for each bad one."""
    words = text.split()
    return float(sum(word in GOOD for word in words) - sum(word in BAD for word in words))


def things(text: str) -> set[str]:
    """Say what a sentence is about."""
    return {word for word in text.split() if word in NOUNS}


def mood_pairs(count: int = 1500, seed: int = 0) -> PreferencePairs:
    """Draw pairs in which the better mood was preferred with probability 0.9; pairs of like mood are left out."""
    source = random.Random(seed)
    rows = []
    while len(rows) < count:
        one, two = sentence(source), sentence(source)
        gap = mood("", one) - mood("", two)
        if gap == 0:
            continue
        first = (gap > 0) == (source.random() < 0.9)
        rows.append({"prompt": "", "chosen": one if first else two, "rejected": two if first else one})
    return PreferencePairs.from_rows([{**row, "group": number} for number, row in enumerate(rows)])


class Sentences(nn.Module):
    """Autoencodes sentences of up to eight words through a vector of 24 numbers."""

    name = "sentences"

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 24)
        self.inward = nn.Sequential(nn.Flatten(), nn.Linear(24 * LENGTH, 96), nn.SiLU(), nn.Linear(96, size))
        self.outward = nn.Sequential(nn.Linear(size, 96), nn.SiLU(), nn.Linear(96, LENGTH * len(WORDS)))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Number the words of texts; words that are not known are none."""
        places = {word: place for place, word in enumerate(WORDS)}
        rows = [[places.get(word, 0) for word in text.split()][:LENGTH] for text in texts]
        return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as (B, 24)."""
        return self.inward(self.words(self.tokens(texts)))

    def logits(self, vectors: Tensor) -> Tensor:
        """Give (B, LENGTH, words) of vectors (B, 24)."""
        return self.outward(vectors).unflatten(1, (LENGTH, len(WORDS)))

    def decode(self, vectors: Tensor) -> list[str]:
        """Decode vectors (B, 24): the likeliest word of each place."""
        best = self.logits(vectors).argmax(2).tolist()
        return [" ".join(WORDS[word] for word in row if word) for row in best]


def trained(steps: int = 500, seed: int = 0) -> Sentences:
    """Train an autoencoder on sentences, with noise on the vector so that nearby vectors mean alike."""
    source = random.Random(f"autoencoder {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sentences()
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3, fused=True)
        for _ in range(steps):
            texts = [sentence(source) for _ in range(128)]
            vectors = model.encode(texts)
            scale = vectors.detach().std()
            noisy = vectors + 0.3 * scale * torch.randn_like(vectors)
            targets = model.tokens(texts)
            loss = nn.functional.cross_entropy(model.logits(noisy).flatten(0, 1), targets.flatten())
            loss = loss + 1e-3 * vectors.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def fresh(count: int, seed: int) -> list[str]:
    """Draw sentences that training has hardly seen."""
    source = random.Random(f"fresh {seed}")
    return list(itertools.islice(iter(lambda: sentence(source), None), count))

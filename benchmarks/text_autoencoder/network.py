"""A small text autoencoder whose bottleneck is one vector: positions are bound to tokens and added up.

The encoder adds up its states, each multiplied by a code of its position; the decoder multiplies the sum by the same
codes to read a position, as in holographic representations (Plate 1995; Gayler 2003). Started from orthogonal maps and
codes of plus and minus one, the untrained network already reads 39% of the tokens from the sum; transformer layers,
which start as the identity, learn the rest. It reads 74% after 30 CPU-seconds, where a recurrent network of about the
same size reads 16% after 61.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize, pad, scaled_dot_product_attention, silu

from pfm._internal.checks import check_whole

__all__ = ["END", "Network", "NetworkSettings"]

END = 0  # id of the tokenizer's one special token; padding as well
MOST = 4096  # of any size, so that a stranger's description cannot ask for a huge network
WRITING = ("writing_places", "writing_codes", "before_reading", "after_reading", "previous", "writers", "sharpness",
           "frequency")  # fmt: skip


@dataclass(frozen=True)
class NetworkSettings:
    """Sets the size of the network.

    vocabulary: tokens. width: D, of the latent and of all states. hidden: of the layers' perceptrons. readers, writers:
    layers of the encoder and the decoder. heads: of attention. window: most tokens of a text.
    """

    vocabulary: int = 4096
    width: int = 256
    hidden: int = 512
    readers: int = 1
    writers: int = 2
    heads: int = 4
    window: int = 24

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_whole(name, value, 1, 65_536 if name == "vocabulary" else 64 if name.endswith("ers") else MOST)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads: got {self.width} and {self.heads}")


class _Layer(nn.Module):
    """Adds attention and a perceptron to states (B, T, D); starts as the identity."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.enter, self.leave = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for last in (self.merge, self.leave):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, states: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the new states, and keys and values (B, heads, T, D / heads) for a later step.

        Args:
            states: (B, T, D).
            mask: (B, T) True at the positions that are attended to; None: each to itself and those before it.
            past: keys and values of earlier positions, with T = 1 and no mask.
        """
        parts = self.projections(self.before_attention(states)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        allowed = None if mask is None else mask[:, None, None, :]
        causal = mask is None and past is None
        read = scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal)
        states = states + self.merge(read.transpose(1, 2).flatten(2))
        return states + self.leave(silu(self.enter(self.before_perceptron(states)))), (key, value)


class Network(nn.Module):
    """Encodes token ids to latents on the sphere of radius sqrt(D), and gives the tokens' logits from latents.

    Args:
        settings: the sizes.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        width, places = settings.width, settings.window + 1
        self.tokens = nn.Parameter(normalize(torch.randn(settings.vocabulary, width), dim=1))
        self.frequency = nn.Parameter(torch.zeros(settings.vocabulary))
        rotation = torch.linalg.qr(torch.randn(width, width))[0]
        codes = torch.randint(0, 2, (places, width)).float() * 2 - 1
        self.reading_places = nn.Parameter(0.002 * torch.randn(places, width))
        self.reading_codes = nn.Parameter(codes.clone())
        self.writing_places = nn.Parameter(0.02 * torch.randn(places, width))
        self.writing_codes = nn.Parameter(codes.clone())
        self.before_code, self.after_code = _linear(torch.eye(width)), _linear(rotation)
        self.before_reading, self.after_reading = _linear(rotation.T), _linear(torch.eye(width))
        self.previous = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.previous.weight *= 0.1
        self.readers, self.writers = (
            nn.ModuleList([_Layer(width, settings.hidden, settings.heads) for _ in range(count)])
            for count in (settings.readers, settings.writers)
        )
        self.sharpness = nn.Parameter(torch.tensor(2.0))
        self.attribute = nn.Linear(width, 1)

    def start_from(self, vectors: Tensor, counts: Tensor) -> None:
        """Start from the tokens' vectors (V, D) and from how often each occurs, (V,)."""
        with torch.no_grad():
            mixed = normalize(vectors, dim=1) + self.tokens
            self.tokens.copy_(normalize(mixed, dim=1))
            logs = (counts.float() + 1).log()
            self.frequency.copy_(logs - logs.mean())

    def deepened(self, writers: int) -> Network:
        """Return a copy whose decoder has so many layers; those that are added start as the identity."""
        found = Network(replace(self.settings, writers=writers))
        found.load_state_dict(self.state_dict(), strict=False)
        return found

    def writing_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the decoder alone, on which no latent depends."""
        return [part for name, part in self.named_parameters() if name.partition(".")[0] in WRITING]

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return latents (B, D) of token ids (B, T), each text's END among them; mask (B, T) is True at its tokens."""
        count = ids.shape[1]
        states = embedding(ids, self.tokens) + self.reading_places[:count]
        for layer in self.readers:
            states, _ = layer(states, mask)
        bound = self.before_code(states) * self.reading_codes[:count] * mask[..., None]
        return self.on_sphere(self.after_code(bound.sum(1)))

    def on_sphere(self, latents: Tensor) -> Tensor:
        """Return latents (B, D) scaled to the length sqrt(D), in single precision."""
        return normalize(latents.float(), dim=1) * math.sqrt(self.settings.width)

    def states(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Return the decoder's states (B, T, D) at each of the token ids (B, T), which it sees up to the one before."""
        given = pad(ids[:, :-1], (1, 0), value=END)
        states, _ = self.write(self.unbound(latents, 0, ids.shape[1]), given, 0, None)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return the tokens' logits (..., V) of states (..., D)."""
        return (self.sharpness * states) @ self.tokens.T + self.frequency

    def attribute_logits(self, latents: Tensor) -> Tensor:
        """Return the log-odds (B,) of the attribute that the latents are organised by."""
        return self.attribute(latents).squeeze(-1)

    def unbound(self, latents: Tensor, start: int, stop: int) -> Tensor:
        """Return what latents (B, D) hold at each position, (B, stop - start, D)."""
        return self.after_reading(self.before_reading(latents)[:, None] * self.writing_codes[start:stop])

    def write(self, unbound: Tensor, given: Tensor, start: int, past: list[Any] | None) -> tuple[Tensor, list[Any]]:
        """Return the decoder's states (B, T, D), and keys and values for a later step.

        Args:
            unbound: (B, T, D) what the latents hold at positions from ``start`` on.
            given: (B, T) the token before each position.
            start: the first position.
            past: keys and values of earlier positions, with T = 1.
        """
        places = self.writing_places[start : start + given.shape[1]]
        states = unbound + places + self.previous(embedding(given, self.tokens))
        kept = []
        for number, layer in enumerate(self.writers):
            states, own = layer(states, None, None if past is None else past[number])
            kept.append(own)
        return states, kept


def _linear(weight: Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    # In rows, as a saved optimizer's state is: its fused step pairs weights and moments by their places in memory.
    found.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    return found

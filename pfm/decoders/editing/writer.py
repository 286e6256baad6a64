"""The interface of networks that write p(text | draft, e(draft), z*), and sampling from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Edits", "Writer", "condition", "draw_tokens", "sample_edits"]

TokenRow = np.ndarray  # (T,) int64 token ids without special tokens
_PLAUSIBLE = math.log(0.05)  # guidance draws no token that is less likely than this share of the likeliest


@dataclass(frozen=True)
class Edits:
    """Holds what a writer is given: B drafts as token ids, their vectors (B, D), and the points (B, D) to aim at."""

    drafts: Sequence[TokenRow]
    vectors: Tensor
    points: Tensor

    def __len__(self) -> int:
        return len(self.drafts)

    def rows(self, places: Sequence[int]) -> Edits:
        """Return the edits at these places."""
        chosen = torch.as_tensor(list(places), dtype=torch.long)
        return Edits([self.drafts[place] for place in places], self.vectors[chosen], self.points[chosen])


def condition(vectors: Tensor, points: Tensor) -> Tensor:
    """Return the network's view (B, 2D) of a move: where to, and by how much, in units of one per dimension."""
    scale = math.sqrt(vectors.shape[1])
    return torch.cat([points, points - vectors], dim=1).float() * scale


class Writer(nn.Module, ABC):
    """The base of networks that write p(text | draft, e(draft), z*), token by token.

    Attributes:
        kind: names the class in saved folders.
        dimension: D of vectors and points.
        window: most tokens of a draft, and of a text that is written.
        end: id of the token that ends a text.
        autocast: whether training on CUDA computes in bfloat16 by autocast; a network that casts by itself saves the
            dispatch of every operation.
    """

    kind: ClassVar[str]
    autocast: ClassVar[bool] = True
    dimension: int
    window: int
    end: int

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> list[TokenRow]:
        """Return the token ids of each text, without special tokens."""

    @abstractmethod
    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids."""

    @abstractmethod
    def log_probabilities(self, edits: Edits, targets: Sequence[TokenRow]) -> Tensor:
        """Return the log-probability of every target token, the end of each text included, row after row.

        Returns:
            (N,) float32, N the number of all target tokens plus one a row.
        """

    @abstractmethod
    def begin(self, edits: Edits, copies: int) -> tuple[Any, Tensor]:
        """Read the drafts; return a state for ``copies`` texts a draft and log-probabilities (B·copies, V)."""

    @abstractmethod
    def step(self, state: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """Append one token (B·copies,) to each text; return the state and log-probabilities of the next one."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return JSON values from which a folder's network is built again."""

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.parameters()).device

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


@torch.no_grad()
def sample_edits(
    writer: Writer,
    edits: Edits,
    k: int,
    *,
    uniforms: Sequence[np.ndarray],
    temperature: float = 0.7,
    guidance: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.95,
    growth: int = 12,
    batch_size: int = 256,
) -> tuple[list[list[str]], int]:
    """Sample k texts for each draft; the first one takes the likeliest token each time.

    A text is a function of its draft, vector, point and ``uniforms`` alone, up to the rounding of the network's sums,
    so that it does not depend on the rest of the batch.

    Args:
        writer: the network, in evaluation mode.
        edits: B drafts.
        k: texts a draft.
        uniforms: for each draft (k, writer.window) numbers in [0, 1): token t of text j is drawn with number (j, t).
        temperature: divides the logits.
        guidance: w in log p(· | z) + w (log p(· | z*) - log p(· | z)), the network's own text at z* = z being the copy:
            1 is the network itself, above 1 makes more of the move (Ho and Salimans 2207.12598) at twice the cost.
            Tokens below a twentieth of the likeliest one's probability at z* are left out (Li et al. 2210.15097).
        top_k, top_p: draw among the likeliest tokens only: at most so many, and the fewest that hold ``top_p``.
        growth: a text may be longer than its draft by so many tokens.
        batch_size: texts that are written at once.

    Returns:
        The texts, and how many tokens were written for them.
    """
    order = sorted(range(len(edits)), key=lambda place: len(edits.drafts[place]))
    texts: list[list[str]] = [[] for _ in order]
    written = 0
    guided = guidance != 1
    size = max(1, batch_size // (2 * k if guided else k))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        some = edits.rows(places)
        numbers = np.concatenate([uniforms[place][:k] for place in places])  # (B·k, window)
        numbers[::k] = 0.0  # the smallest number draws the likeliest token
        draws = torch.from_numpy(numbers).to(writer.device, torch.float32)
        limits = np.minimum([len(draft) + growth for draft in some.drafts], writer.window).repeat(k)
        limit = torch.from_numpy(limits).to(writer.device)
        read = some
        if guided:
            points = torch.cat([some.points, some.vectors.to(some.points)])
            read = Edits([*some.drafts, *some.drafts], some.vectors.repeat(2, 1), points)
        state, logp = writer.begin(read, k)
        tokens: list[Tensor] = []
        done = torch.zeros(len(limits), dtype=torch.bool, device=writer.device)
        for position in range(int(limits.max())):
            logp = _guided(logp, guidance) if guided else logp
            token = draw_tokens(logp, draws[:, position], temperature, top_k, top_p)
            token = torch.where(done | (limit <= position), writer.end, token)
            done |= token == writer.end
            tokens.append(token)
            if bool(done.all()):
                break
            state, logp = writer.step(state, token.repeat(2) if guided else token)
        rows = torch.stack(tokens, dim=1).tolist()
        cut = [row[: row.index(writer.end)] if writer.end in row else row for row in rows]
        written += sum(min(len(row) + 1, len(tokens)) for row in cut)
        said = writer.detokenize(cut)
        for row, place in enumerate(places):
            texts[place] = said[row * k : (row + 1) * k]
    return texts, written


def _guided(logp: Tensor, guidance: float) -> Tensor:
    """Return logits (B, V) of log-probabilities (2B, V), first those at the points and then those at the drafts."""
    moved, kept = logp.float().chunk(2)
    implausible = moved < moved.amax(1, keepdim=True) + _PLAUSIBLE
    return (kept + guidance * (moved - kept)).masked_fill(implausible, -torch.inf)


def draw_tokens(logp: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw token ids (B,) by inversion of the cumulative probabilities, likeliest tokens first.

    Args:
        logp: (B, V) log-probabilities, up to a constant a row.
        uniform: (B,) in [0, 1); 0 draws the likeliest token.
        temperature, top_k, top_p: as for :func:`sample_edits`.
    """
    values, ids = logp.float().topk(min(top_k, logp.shape[1]), dim=1)
    p = torch.softmax(values / temperature, dim=1)
    before = p.cumsum(1) - p
    p = p.masked_fill(before >= top_p, 0.0)
    cumulative = (p / p.sum(1, keepdim=True)).cumsum(1)
    place = (cumulative <= uniform[:, None]).sum(1).clamp(max=ids.shape[1] - 1)
    place = torch.minimum(place, (p > 0).sum(1) - 1)
    return ids.gather(1, place[:, None])[:, 0]

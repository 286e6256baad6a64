"""A small writer from scratch: recurrent, with attention over the draft from which it can copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pfm._internal.byte_pairs import train_tokenizer
from pfm._internal.checks import check_whole
from pfm.decoders.editing.writer import Edits, TokenRow, Writer, condition

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PointerWriter"]

END = 0  # of the tokenizer's one special token
MOST_VOCABULARY, MOST_WIDTH = 65_536, 4096


class _State(NamedTuple):
    hidden: Tensor  # (1, B, H)
    memory: Tensor  # (B, S, H) the read draft
    keys: Tensor  # (B, S, H)
    mask: Tensor  # (B, S) True at the draft's tokens
    drafts: Tensor  # (B, S) token ids
    aim: Tensor  # (B, H)


class PointerWriter(Writer):
    """Writes with a gated recurrent network that attends to the draft and can copy its tokens.

    p(token) = g · softmax over the vocabulary + (1 - g) · attention over the draft's tokens (See et al. 2017,
    arXiv 1704.04368). The draft is read in both directions; the move (z*, z* - z) sets the first state and goes into
    every step.

    Args:
        tokenizer: of the ``tokenizers`` library, with the end of text at id 0; :meth:`train_tokenizer` makes one.
        dimension: D of vectors and points.
        width: of the token embeddings.
        hidden: of the recurrent states; even.
        window: most tokens of a text.

    Raises:
        ValueError: a size is out of range.
    """

    kind = "pointer"
    end = END

    def __init__(
        self, tokenizer: Tokenizer, dimension: int, *, width: int = 192, hidden: int = 384, window: int = 64
    ) -> None:
        super().__init__()
        vocabulary = tokenizer.get_vocab_size()
        for name, value, most in (
            ("dimension", dimension, MOST_WIDTH * 4),
            ("width", width, MOST_WIDTH),
            ("hidden", hidden, MOST_WIDTH),
            ("window", window, 1024),
            ("vocabulary", vocabulary, MOST_VOCABULARY),
        ):
            check_whole(name, value, 1, most)
        if hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction: got {hidden}")
        self.tokenizer, self.dimension, self.width, self.hidden, self.window = (
            tokenizer,
            dimension,
            width,
            hidden,
            window,
        )
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.reader = nn.GRU(width, hidden // 2, batch_first=True, bidirectional=True)
        self.aim = nn.Sequential(nn.Linear(2 * dimension, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.first = nn.Linear(2 * hidden, hidden)
        self.writer = nn.GRU(width + hidden, hidden, batch_first=True)
        self.key = nn.Linear(hidden + width, hidden, bias=False)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(3 * hidden, hidden)
        self.out = nn.Linear(hidden, width)
        self.gate = nn.Linear(hidden, 1)

    @staticmethod
    def train_tokenizer(texts: Iterable[str], vocabulary: int = 8000) -> Tokenizer:
        """Train byte-level byte-pair encoding on texts, with the end of text at id 0."""
        return train_tokenizer(texts, vocabulary)

    def settings(self) -> dict[str, Any]:
        """Return the sizes; the tokenizer is saved beside them."""
        return {"dimension": self.dimension, "width": self.width, "hidden": self.hidden, "window": self.window}

    def tokenize(self, texts: Sequence[str]) -> list[TokenRow]:
        """Return the token ids of each text."""
        return [
            np.asarray(found.ids, np.int64)
            for found in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids."""
        return [text.strip() for text in self.tokenizer.decode_batch([list(row) for row in rows])]

    def log_probabilities(self, edits: Edits, targets: Sequence[TokenRow]) -> Tensor:
        """Return the log-probabilities of the targets' tokens; see :meth:`Writer.log_probabilities`."""
        state = self._read(edits)
        wanted, mask = _padded([np.append(row, END) for row in targets], self.device)
        given = torch.cat([wanted.new_full((len(wanted), 1), END), wanted[:, :-1]], dim=1)
        hidden, _ = self._run(state, given)
        mixed, attention = self._attend(state, hidden)
        gate = self.gate(mixed)[..., 0]
        # The copy share of a target token is the attention to all places of the draft that hold it.
        same = state.drafts[:, None, :] == wanted[:, :, None]
        copied = (attention * same).sum(2)[mask]
        log_vocabulary = -nn.functional.cross_entropy(self._logits(mixed[mask]).float(), wanted[mask], reduction="none")
        log_copied = copied.float().clamp_min(1e-12).log()
        chosen = gate[mask].float()
        log_gate, log_other = nn.functional.logsigmoid(chosen), nn.functional.logsigmoid(-chosen)
        return torch.logaddexp(log_gate + log_vocabulary, log_other + log_copied)

    def begin(self, edits: Edits, copies: int) -> tuple[_State, Tensor]:
        """Read the drafts; see :meth:`Writer.begin`."""
        read = self._read(edits)
        hidden = read.hidden.repeat_interleave(copies, dim=1)
        state = _State(hidden, *(part.repeat_interleave(copies, dim=0) for part in read[1:]))
        return self.step(state, state.drafts.new_full((len(state.drafts),), END))

    def step(self, state: _State, tokens: Tensor) -> tuple[_State, Tensor]:
        """Append one token to each text; see :meth:`Writer.step`."""
        hidden, last = self._run(state, tokens[:, None])
        mixed, attention = self._attend(state, hidden)
        gate = torch.sigmoid(self.gate(mixed)[:, 0].float())
        p = gate * torch.softmax(self._logits(mixed[:, 0]).float(), dim=1)
        p = p.scatter_add(1, state.drafts, (1 - gate) * attention[:, 0].float())
        return state._replace(hidden=last), p.clamp_min(1e-30).log()

    def _read(self, edits: Edits) -> _State:
        drafts, mask = _padded(edits.drafts, self.device)
        lengths = torch.tensor([max(1, len(row)) for row in edits.drafts])
        embedded = self.embedding(drafts)
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, last = self.reader(packed)
        memory, _ = pad_packed_sequence(states, batch_first=True, total_length=drafts.shape[1])
        aim = self.aim(condition(edits.vectors.to(self.device), edits.points.to(self.device)))
        summary = last.transpose(0, 1).flatten(1)
        hidden = torch.tanh(self.first(torch.cat([aim, summary], dim=1)))[None]
        # A place is found by what stands before it (the forward state there holds it) and by its own token.
        before = torch.cat([torch.zeros_like(memory[:, :1]), memory[:, :-1]], dim=1)
        keys = self.key(torch.cat([before, embedded], dim=2))
        return _State(hidden, memory, keys, mask, drafts, aim)

    def _run(self, state: _State, given: Tensor) -> tuple[Tensor, Tensor]:
        aim = state.aim[:, None].expand(-1, given.shape[1], -1)
        return self.writer(torch.cat([self.embedding(given), aim], dim=2), state.hidden.contiguous())

    def _attend(self, state: _State, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bth,bsh->bts", self.query(hidden), state.keys) / math.sqrt(self.hidden)
        attention = torch.softmax(scores.float().masked_fill(~state.mask[:, None], -1e9), dim=2)
        context = attention.to(state.memory.dtype) @ state.memory
        aim = state.aim[:, None].expand(-1, hidden.shape[1], -1)
        return torch.tanh(self.mix(torch.cat([hidden, context, aim], dim=2))), attention

    def _logits(self, mixed: Tensor) -> Tensor:
        return nn.functional.linear(self.out(mixed), self.embedding.weight) * math.sqrt(self.width)


def _padded(rows: Sequence[TokenRow], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (B, T), filled up with 0, and where they are tokens (B, T)."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), max(1, int(lengths.max(initial=1)))), np.int64)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = np.concatenate(list(rows)) if len(rows) else []
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

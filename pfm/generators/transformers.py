"""Generators that run a Transformers model in this process."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_whole
from pfm._internal.hub import check_folder, loading_problem, location
from pfm._internal.special_tokens import SpecialTokens
from pfm.devices import best_device
from pfm.errors import ContextTooLongError, EmptyAnswerError, GenerationError
from pfm.generators.base import (
    Draw,
    GeneratesTexts,
    Prompt,
    as_messages,
    canonical,
    count,
    first_samples,
    is_usable_text,
)
from pfm.reasoning import closes_reasoning, is_marker, opening_at_end

__all__ = ["TransformersGenerator"]

MAX_NEW_TOKENS = 256
_REFUSED = {
    "n": "it is the n of draws(prompts, n) and of pfm.wrap(..., n=)",
    "num_return_sequences": "it is the n of draws(prompts, n) and of pfm.wrap(..., n=)",
    "num_beams": "candidates are sampled; a beam gives texts that are not",
    "generator": "the seed decides",
}
# Settings of the distribution that tokens are drawn from, and the value at which each has no effect.
_NEUTRAL = {
    "temperature": 1.0,
    "top_k": 50,  # what Transformers takes for unset where nothing is sampled
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# Parameters under which the samples of a prompt read it once: none of them changes what the model computes of it.
_READ_ONCE = {*_NEUTRAL, "do_sample", "max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id",
              "stop_strings", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"}  # fmt: skip


class TransformersGenerator(GeneratesTexts):
    """Samples texts from a causal or a sequence-to-sequence language model.

    Sample k of a prompt depends on seed, prompt and k alone, not on the batch it is drawn in: each has random
    numbers of its own. Only rounding, which differs with the size and padding of a batch, may rarely turn a token.

    Tokens are drawn at temperature 1 from the whole vocabulary but for what the model's own generation settings
    and ``parameters`` say; Transformers' habit of keeping the likeliest 50 is not followed. A text is put to a
    model with a chat template as the turn of a user, and continued by a model without one.

    Args:
        model: a loaded model, a folder, or a name at the hub.
        tokenizer: a loaded tokenizer, a folder or a name. None: the model's own.
        device: where to run, such as "cuda:1", 1 or a ``torch.device``; "auto" takes an accelerator if there is one. A
            loaded model stays where it is.
        dtype: number type of the weights, such as "bfloat16"; "auto" takes that in which they were saved.
        device_map: how to spread the model over devices, as ``from_pretrained`` takes it; needs accelerate.
        revision: of the model at the hub.
        trust_remote_code: run code that comes with the model.
        chat_template: in place of the tokenizer's; "" treats texts as texts, whatever the tokenizer has. In what the
            template frames, spellings of special tokens are broken by a space: they are data.
        batch_size: samples drawn at once.
        seed: seed of the samples.
        parameters: what ``model.generate`` takes, such as ``max_new_tokens=100`` (256 unless the model says
            otherwise or holds less), ``temperature=0.7``, ``top_p=0.9``. Temperature 0 takes the likeliest token
            each time.

    Raises:
        ValueError, TypeError: an argument is out of range, the model cannot generate, or a loaded model comes
            without a tokenizer.
        OSError: there is no such model.
        ImportError: device_map needs accelerate, which is not installed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | int | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_new_tokens", parameters.get("max_new_tokens", 1))):
            check_whole(name, value, 1)
        for name, why in _REFUSED.items():
            if name in parameters:
                raise ValueError(f"{name} cannot be set as a parameter: {why}")
        temperature = parameters.get("temperature")
        if temperature is not None and not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature!r}")
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        _check_names(parameters, None)  # what is misspelt need not wait for the model
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            self.model = _loaded(str(model), device, dtype, device_map, options)
            tokenizer = str(model) if tokenizer is None else tokenizer
        else:
            if not callable(getattr(model, "generate", None)) or isinstance(model, type):
                raise TypeError(f"model must be a model with .generate, a folder or a name, got {type(model).__name__}")
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer: pass tokenizer=")
            self.model = model
        _check_names(parameters, self.model)
        if isinstance(tokenizer, str) or hasattr(tokenizer, "__fspath__"):
            from transformers import AutoTokenizer

            name = str(tokenizer)
            try:
                tokenizer = AutoTokenizer.from_pretrained(location(name), **options)
            except (OSError, ValueError) as error:
                raise _named(name, error, trust_remote_code) from error
        self.tokenizer: Any = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self.chat_template = (own if chat_template is None else chat_template) or None
        self._special = SpecialTokens(tokenizer)
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False)
        self._markers = {number for number, token in special if is_marker(token)}
        self.batch_size = batch_size
        self.seed = seed
        self.parameters = dict(parameters)
        self._lock = threading.Lock()
        self._weights: str | None = None

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that a text may have: as set, else 256 or half of what the model can hold."""
        own = getattr(self.model.generation_config, "max_new_tokens", None)
        return self.parameters.get("max_new_tokens") or own or min(MAX_NEW_TOKENS, (self._limit or 2**20) // 2)

    @property
    def _limit(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        """Describe what the texts depend on in JSON values; ``weights`` is a checksum over a sample of them."""
        config = self.model.config
        if self._weights is None:
            self._weights = _weights_digest(self.model)
        return {
            "type": type(self).__name__,
            "name": getattr(config, "_name_or_path", "") or type(self.model).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "weights": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "chat_template": None if self.chat_template is None else _digest(str(self.chat_template)),
            "seed": self.seed,
            "parameters": {
                **{name: str(value) for name, value in self.parameters.items()},
                "max_new_tokens": self.max_new_tokens,
            },
        }

    def __repr__(self) -> str:
        name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        return f"TransformersGenerator({name!r}, seed={self.seed})"

    def draws(self, prompts: Sequence[Prompt], n: int, *, start: Sequence[int] | None = None) -> Iterator[Draw]:
        """Yield the draw of each prompt, batch by batch; a prompt that fails leaves the others alone."""
        first = first_samples(prompts, n, start)
        wanted = 1 if self._greedy else n
        rolls = [_Roll(prompt, at, wanted, 1 if self._greedy else 2) for prompt, at in zip(prompts, first, strict=True)]
        waiting: deque[_Row] = deque()
        for roll in rolls:
            try:
                roll.ids = self._encoded(roll.prompt)
                if self.chat_template is not None:
                    roll.opening = opening_at_end(self.tokenizer.decode(roll.ids[-16:]))
            except Exception as error:
                roll.draw.fail(error)
                roll.open = 0
                continue
            waiting.extend(_Row(roll, place) for place in range(wanted))
        for roll in rolls:
            while roll.open and roll.draw.error is None:
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                self._sample([row for row in batch if row.roll.draw.error is None])
                # An unusable text is drawn once more, with other random numbers.
                again = [row for row in batch if row.blank and row.attempt + 1 < row.roll.attempts]
                waiting.extendleft(_Row(row.roll, row.place, row.attempt + 1) for row in reversed(again))
            yield roll.finished(n)

    @property
    def _greedy(self) -> bool:
        return self.parameters.get("temperature") == 0 or self.parameters.get("do_sample") is False

    def _encoded(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            ValueError: a conversation, and there is no template for it.
            ContextTooLongError: it leaves no room for the text.
        """
        if isinstance(prompt, str) and self.chat_template is None:
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template, so a conversation cannot be written as a text; "
                "pass chat_template=, or prompts that are texts"
            )
        else:
            turns = self._special.broken_turns(as_messages(prompt))
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:  # a model cannot begin from nothing
            begin = self.tokenizer.bos_token_id
            begin = self.tokenizer.eos_token_id if begin is None else begin
            if begin is None:
                raise ValueError("the prompt is empty, and the tokenizer has no token to begin with")
            ids = [begin]
        limit = self._limit
        taken = len(ids) + (0 if self.model.config.is_encoder_decoder else self.max_new_tokens)
        if limit and taken > limit:
            raise ContextTooLongError(
                f"{len(ids):,} tokens of the prompt and max_new_tokens={self.max_new_tokens:,} are more than the "
                f"{limit:,} that the model can hold"
            )
        return list(ids)

    def _sample(self, rows: list[_Row]) -> None:
        """Draw one text for each row; rows that fail together are tried in halves, which also mends lack of memory."""
        if not rows:
            return
        started = time.perf_counter()
        try:
            found = self._generated(rows)
        except Exception as error:
            if len(rows) > 1:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                half = len(rows) // 2
                self._sample(rows[:half])
                self._sample([row for row in rows[half:] if row.roll.draw.error is None])
                return
            rows[0].roll.draw.fail(error)
            return
        share = (time.perf_counter() - started) / len(rows)
        for roll in {id(row.roll): row.roll for row in rows}.values():
            roll.draw.calls += 1
        for row, (text, reason, tokens) in zip(rows, found, strict=True):
            row.take(text, reason, tokens, share)

    def _generated(self, rows: list[_Row]) -> list[tuple[str, str, int]]:
        """Return text, finish reason and number of tokens for each row."""
        from transformers import LogitsProcessorList

        seq2seq = self.model.config.is_encoder_decoder
        pad = _first(self.tokenizer.pad_token_id, self.model.generation_config.pad_token_id)
        ends = _as_list(_first(self.parameters.get("eos_token_id"), self.model.generation_config.eos_token_id))
        ends = ends or _as_list(self.tokenizer.eos_token_id)
        pad = _first(pad, *ends, 0)
        width = max(len(row.roll.ids) for row in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            # Left of the prompt, so that a causal model continues the prompt and not the padding.
            at = slice(0, len(row.roll.ids)) if seq2seq else slice(width - len(row.roll.ids), width)
            ids[place, at] = torch.tensor(row.roll.ids)
            mask[place, at] = 1
        options = {name: value for name, value in self.parameters.items() if name not in (*_NEUTRAL, "do_sample")}
        options |= {"max_new_tokens": self.max_new_tokens, "pad_token_id": pad, "do_sample": False, **_NEUTRAL}
        if ends:
            options["eos_token_id"] = ends
        if "stop_strings" in options:
            options["tokenizer"] = self.tokenizer
        processors = LogitsProcessorList()
        if not self._greedy:
            uniforms = [_uniforms(self.seed, row, self.max_new_tokens) for row in rows]
            processors.append(_OwnNumbers(np.stack(uniforms), self._warpers()))
        with self._lock, torch.inference_mode():
            training = self.model.training
            self.model.eval()
            try:
                device = self.model.device
                ids, mask = ids.to(device), mask.to(device)
                options |= self._read_once(rows, ids, mask, pad)
                out = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **options)
            finally:
                self.model.train(training)
        new = out[:, 1:] if seq2seq else out[:, width:]
        return [self._text(row, ends, pad) for row in new.tolist()]

    def _read_once(self, rows: list[_Row], ids: Tensor, mask: Tensor, pad: int) -> dict[str, Any]:
        """Return the cached keys and values of all tokens but the last, each prompt read once for all of its samples.

        Nothing is returned, and every sample reads its prompt itself, where no prompt has two samples, or where the
        model or a parameter needs a cache of another kind.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        places: dict[int, int] = {}  # of each prompt's first sample
        for place, row in enumerate(rows):
            places.setdefault(id(row.roll), place)
        if (
            len(places) == len(rows)
            or self.model.config.is_encoder_decoder
            or min(len(row.roll.ids) for row in rows) < 2
            or not _READ_ONCE.issuperset(self.parameters)
            or getattr(self.model.generation_config, "cache_implementation", None) is not None
        ):
            return {}
        first = torch.tensor(list(places.values()), device=ids.device)
        read = self.model.generate(
            input_ids=ids[first, :-1], attention_mask=mask[first, :-1], max_new_tokens=1, do_sample=False,
            pad_token_id=pad, return_dict_in_generate=True, **_NEUTRAL,
        )  # fmt: skip
        cache = getattr(read, "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if type(cache) is not DynamicCache or not layers or any(type(layer) is not DynamicLayer for layer in layers):
            return {}  # such as of a sliding window, or a state in place of a cache
        order = {roll: place for place, roll in enumerate(places)}
        cache.batch_select_indices(torch.tensor([order[id(row.roll)] for row in rows], device=ids.device))
        return {"past_key_values": cache}

    def _text(self, tokens: list[int], ends: list[int], pad: int) -> tuple[str, str, int]:
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[:end]
        while kept and kept[-1] == pad and end is None:  # after a stop string
            kept = kept[:-1]
        ended = end is not None or len(kept) < self.max_new_tokens
        special: set[int] = set()
        if not self._markers.isdisjoint(kept):  # without its markers reasoning could not be separated from the answer
            special = set(self.tokenizer.all_special_ids) - self._markers
        text = self.tokenizer.decode(
            [token for token in kept if token not in special],
            skip_special_tokens=not special,
            clean_up_tokenization_spaces=False,
        )
        return text, "stop" if ended else "length", len(kept) + (end is not None)

    def _warpers(self) -> list[Any]:
        """Make the processors of the next token's distribution, in the order of Transformers."""
        from transformers.generation import logits_process as made

        def setting(name: str) -> Any:
            given = self.parameters.get(name)
            return getattr(self.model.generation_config, name, None) if given is None else given

        found: list[Any] = []
        temperature, top_k, top_p = setting("temperature"), setting("top_k"), setting("top_p")
        if temperature not in (None, 0, 1):
            found.append(made.TemperatureLogitsWarper(float(temperature)))
        if top_k:
            found.append(made.TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            found.append(made.TopPLogitsWarper(top_p))
        if setting("min_p") is not None:
            found.append(made.MinPLogitsWarper(setting("min_p")))
        if 0 < (setting("typical_p") or 0) < 1:
            found.append(made.TypicalLogitsWarper(setting("typical_p")))
        if 0 < (setting("epsilon_cutoff") or 0) < 1:
            found.append(made.EpsilonLogitsWarper(setting("epsilon_cutoff")))
        if 0 < (setting("eta_cutoff") or 0) < 1:
            found.append(made.EtaLogitsWarper(setting("eta_cutoff"), device=str(self.model.device)))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class _Roll:
    """One prompt and what has been drawn for it."""

    def __init__(self, prompt: Prompt, first: int, n: int, attempts: int) -> None:
        self.prompt = prompt
        self.first = first
        self.attempts = attempts
        self.open = n
        self.ids: list[int] = []
        self.opening = ""  # of reasoning, by the chat template
        self.texts: dict[int, tuple[str, str]] = {}
        self.draw = Draw()
        self.tokens = 0

    def finished(self, n: int) -> Draw:
        draw = self.draw
        found = [self.texts[place] for place in sorted(self.texts)]
        if len(found) == 1 < n and self.open == 0 and draw.error is None and not draw.dropped:
            found = found * n  # the likeliest text, which every further sample would be too
        draw.texts = [text for text, _ in found]
        draw.finish_reasons = [reason for _, reason in found]
        if draw.calls:
            prompt_tokens = len(self.ids)
            draw.usage = {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": self.tokens,
                "total_tokens": prompt_tokens + self.tokens,
            }
        if not draw.texts and draw.dropped and draw.error is None:
            draw.fail(EmptyAnswerError(f"the model wrote nothing but white space, {count(draw.dropped, 'time')}"))
        return draw


@dataclass
class _Row:
    """One sample to draw."""

    roll: _Roll
    place: int
    attempt: int = 0
    blank: bool = False

    def take(self, text: str, reason: str, tokens: int, seconds: float) -> None:
        self.roll.draw.seconds += seconds
        self.roll.tokens += tokens
        if is_usable_text(text):
            if reason == "length" or closes_reasoning(text):
                text = self.roll.opening + text
            self.roll.texts[self.place] = text, reason
            self.roll.open -= 1
            return
        self.blank = True
        self.roll.draw.dropped += 1
        if self.attempt + 1 == self.roll.attempts:
            self.roll.open -= 1  # it stays a gap


class _OwnNumbers:
    """Draws each row's next token with numbers of its own, by leaving no other token possible.

    Args:
        uniforms: (B, T) in [0, 1), one for each row and step.
        warpers: processors of the distribution before a token is drawn from it.
    """

    def __init__(self, uniforms: np.ndarray, warpers: Sequence[Any]) -> None:
        self.uniforms = uniforms
        self.warpers = warpers
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) of minus infinity but for one token a row."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # which has no doubles
        shape, number, tokens = scores, max(int((scores > -torch.inf).sum(-1).max()), 1), None
        if number <= scores.shape[-1] // 8:  # few tokens are possible: leave out the others, in the same order
            tokens = scores.topk(number, sorted=False).indices.sort(-1).values
            scores = scores.gather(-1, tokens)
        sums = scores.to(exact).softmax(-1).cumsum(-1)
        if not sums.isfinite().all():
            raise GenerationError("the model gave NaN or infinity for the next token")
        uniform = torch.from_numpy(self.uniforms[:, self.step]).to(sums)
        self.step += 1
        drawn = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
        # The product may round up to the whole sum; the last token that has any probability is meant then.
        last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
        drawn = torch.minimum(drawn, last)
        drawn = drawn if tokens is None else tokens.gather(-1, drawn)
        return torch.full_like(shape, -torch.inf).scatter_(1, drawn, 0.0)


def _uniforms(seed: int, row: _Row, number: int) -> np.ndarray:
    described = canonical([seed, as_messages(row.roll.prompt), row.roll.first + row.place, row.attempt])
    digest = hashlib.sha256(described.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big")).random(number)


def _check_names(parameters: Mapping[str, Any], model: Any) -> None:
    """Refuse a parameter that neither this class nor generation nor the model knows.

    Args:
        parameters: by name.
        model: None before it is loaded: only what is near a known name is refused then.

    Raises:
        TypeError: by the name that is meant, if it is near one.
    """
    from transformers import GenerationConfig, GenerationMixin

    own = inspect.signature(TransformersGenerator.__init__).parameters
    generate = getattr(GenerationMixin, "generate")  # noqa: B009 - it is one of those that are found at run time
    known = {*vars(GenerationConfig()), *inspect.signature(generate).parameters}
    unknown = [name for name in parameters if name not in known or name in ("self", "kwargs")]
    forward = inspect.signature(model.forward).parameters if hasattr(model, "forward") else {}
    names = sorted({*own, *known} - {"self", "kwargs", "parameters"})
    for name in unknown:
        near = difflib.get_close_matches(name, names, 1)
        if name not in forward and (near or model is not None):
            meant = (
                f": did you mean {near[0]}?" if near else "; generate takes what GenerationConfig of transformers has"
            )
            raise TypeError(f"{name}: no setting of TransformersGenerator or of generation{meant}")


def _named(name: str, error: Exception, trusted: bool) -> Exception:
    """Return the error of loading a model that says in one sentence what is wrong."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"cannot load {name!r}: {loading_problem(name, error, trusted=trusted)}")


def _loaded(name: str, device: str | int | torch.device, dtype: Any, device_map: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    where = None if device_map is not None else best_device(device)
    try:
        check_folder(name, "model")
    except ValueError as error:
        raise FileNotFoundError(str(error)) from None
    given, name = name, location(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _named(given, error, options["trust_remote_code"]) from error
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    spread = {}
    if device_map is not None:
        try:
            import accelerate  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("device_map needs accelerate: pip install accelerate") from error
        spread = {"device_map": device_map}
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    try:
        model = kind.from_pretrained(name, dtype=dtype, **spread, **options)
    except (OSError, ValueError) as error:
        raise _named(given, error, options["trust_remote_code"]) from error
    return model if where is None else model.to(where)  # pyright: ignore[reportArgumentType]


def _weights_digest(model: Any) -> str:
    """Return a checksum over a few numbers of each weight: another fit of the same model has another."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].double().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list | tuple) else [int(value)]

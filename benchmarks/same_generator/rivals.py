"""Baselines that call the model again: python -m benchmarks.same_generator.rivals few_shot|ratings|rewrites.

``few_shot`` draws anew with preferred answers of the nearest training prompts before the request. ``ratings`` asks the
model itself, by the logits of Yes and No, whether an answer does what was asked. ``rewrites`` has the model revise the
best of three draws, by the flow's b (``decoder="rewrite"`` of ``pfm.wrap``). Each prompt is in the test fold of one
of seeds 0, 1 and 2; examples and flow are of the two other folds. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import pfm
from benchmarks.core.data import MissingDataError
from benchmarks.same_generator.models import FLOWS, kept_fit, split
from benchmarks.same_generator.sample import answered, generators, recipe
from benchmarks.same_generator.samples import Sample, SamplesError, complete, read_samples, recipe_of
from benchmarks.same_generator.scored import PARTS, SENTIMENT, Scored, fold_of, load_scored
from pfm._internal.files import FileInUseError
from pfm._internal.special_tokens import SpecialTokens
from pfm.decoders import ExemplarBank
from pfm.encoders import encoder_from_name
from pfm.generators import TransformersGenerator

__all__ = ["STAGES", "few_shot_prompt", "main", "rate"]

SHOTS = 2
DRAWS = 8  # with examples
RATED = 8  # of the plain samples
DRAFTS, REWRITES = 3, 2
ENCODER = "minilm+surface"
QUESTIONS = {
    True: "Here is the beginning of a film review, and how it goes on.\n\nBeginning: {prompt}\n\nGoes on: {text}\n\n"
    "Does the writer like the film? Reply with Yes or No.",
    False: "Here is a request, and an answer to it.\n\nRequest: {prompt}\n\nAnswer: {text}\n\n"
    "Does the answer do everything that the request asks for? Reply with Yes or No.",
}  # fmt: skip

Makes = Callable[[Sequence[str]], Iterator[Sample]]


class Rows:
    """Knows all plain samples, and which of them a prompt's baselines may learn from.

    Args:
        folder: of the samples.
    """

    def __init__(self, folder: Path) -> None:
        self.of_part = {part: load_scored(folder, part) for part in PARTS}
        rows = {row.name: row for part in PARTS for row in self.of_part[part]}
        self.rows = {one.name: rows[one.name] for one in read_samples(folder / "plain")}

    def train(self, name: str) -> list[Scored]:
        """Return the training prompts of the seed that tests a prompt."""
        part = PARTS[self.rows[name].sample.kind == SENTIMENT]
        return split(self.of_part[part], fold_of(name, 0))[0]


def few_shot_prompt(row: Scored, examples: Sequence[Scored]) -> Any:
    """Put the preferred answers of some prompts before a request: as turns, or before an opening as paragraphs."""
    best = [(one.sample.prompt, one.texts[int(one.labels.argmax())]) for one in examples]
    if row.sample.kind == SENTIMENT:
        return "".join(f"{prompt} {text}\n\n" for prompt, text in best) + row.sample.prompt
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for pair in best for role, text in zip(roles, pair, strict=True)]
    return [*turns, {"role": "user", "content": row.sample.prompt}]


def _few_shot(rows: Rows, models: dict[bool, TransformersGenerator]) -> Makes:
    encoder = encoder_from_name("minilm")

    def make(names: Sequence[str]) -> Iterator[Sample]:
        for sentiment, model in models.items():
            some = [name for name in names if (rows.rows[name].sample.kind == SENTIMENT) == sentiment]
            shown = [_nearest(rows.rows[name], rows.train(name), encoder) for name in some]
            prompts = [few_shot_prompt(rows.rows[name], examples) for name, examples in zip(some, shown, strict=True)]
            for name, examples, draw in zip(some, shown, model.draws(prompts, DRAWS), strict=True):
                if draw.error is None and draw.texts:
                    found = answered(rows.rows[name].sample, draw)
                    yield replace(found, extra={"examples": [one.name for one in examples]})

    return make


def _nearest(row: Scored, train: Sequence[Scored], encoder: Any) -> list[Scored]:
    """Return the training prompts nearest to a prompt by their embeddings, the nearest last."""
    vectors = encoder.encode_prompts([row.sample.prompt, *(one.sample.prompt for one in train)])
    cosine = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
    return [train[place] for place in cosine.topk(min(SHOTS, len(train))).indices.flip(0).tolist()]


@torch.inference_mode()
def rate(model: TransformersGenerator, kind: str, prompt: str, texts: Sequence[str]) -> tuple[list[float], int]:
    """Return the log-odds (n,) of Yes by the model itself, and the tokens that it read."""
    tokenizer = model.tokenizer
    answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
    asked = [
        [{"role": "user", "content": QUESTIONS[kind == SENTIMENT].format(prompt=prompt, text=text)}] for text in texts
    ]
    broken = [SpecialTokens(tokenizer).broken_turns(turns) for turns in asked]
    told = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in broken]
    tokenizer.padding_side = "left"
    batch = tokenizer(told, add_special_tokens=False, padding=True, return_tensors="pt")
    # Half precision would round logits to eighths: the two that are wanted are computed from the last state.
    states = model.model.base_model(**batch).last_hidden_state[:, -1].float()
    heads = model.model.get_output_embeddings().weight[answers].float()
    return (states @ (heads[0] - heads[1])).tolist(), int(batch["attention_mask"].sum())


def _ratings(rows: Rows, models: dict[bool, TransformersGenerator]) -> Makes:
    def make(names: Sequence[str]) -> Iterator[Sample]:
        for name in names:
            row = rows.rows[name]
            texts = row.texts[:RATED]
            odds, read = rate(models[False], row.sample.kind, row.sample.prompt, texts)
            yield Sample(
                name, row.sample.kind, row.sample.prompt, texts, read // len(texts), len(texts), row.sample.params,
                {"log_odds": odds},
            )  # fmt: skip

    return make


def _rewrites(rows: Rows, models: dict[bool, TransformersGenerator]) -> Makes:
    encoder = encoder_from_name(ENCODER)

    @cache
    def refiner(part: str, seed: int) -> pfm.Refiner:
        fitted = kept_fit(split(rows.of_part[part], seed)[0], ENCODER, seed, "given", FLOWS)
        bank = ExemplarBank.from_pairs(fitted.pairs, encoder, progress=False)
        return pfm.wrap(
            models[False], fitted.flow, encoder=encoder, decoder="rewrite", n=DRAFTS, exemplars=bank, rounds=1,
            rewrites=REWRITES, shots=SHOTS, margin=0.0,
        )  # fmt: skip

    def make(names: Sequence[str]) -> Iterator[Sample]:
        groups: dict[tuple[str, int], list[str]] = defaultdict(list)
        for name in names:
            groups[PARTS[rows.rows[name].sample.kind == SENTIMENT], fold_of(name, 0)].append(name)
        for (part, seed), members in groups.items():
            some = [rows.rows[name] for name in members]
            results = refiner(part, seed).refine(
                [row.texts[:DRAFTS] for row in some], [row.sample.prompt for row in some]
            )
            for row, found in zip(some, results, strict=True):
                if found.error is None and found.usage:
                    yield Sample(
                        row.name, row.sample.kind, row.sample.prompt, found.candidates[DRAFTS:],
                        found.usage["prompt_tokens"], found.usage["completion_tokens"], row.sample.params,
                    )  # fmt: skip

    return make


STAGES: dict[str, tuple[Callable[..., Makes], dict[str, Any]]] = {
    "few_shot": (_few_shot, {"shots": SHOTS, "n": DRAWS}),
    "ratings": (_ratings, {"rated": RATED}),
    "rewrites": (_rewrites, {"drafts": DRAFTS, "rewrites": REWRITES, "shots": SHOTS, "encoder": ENCODER}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the missing rows of one baseline."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_generator.rivals", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("rival", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/same_generator/samples"), help="folder of the samples")
    parser.add_argument("--batch", type=int, default=16, help="prompts at once")
    parser.add_argument("--limit", type=int, help="the first so many prompts only")
    options = parser.parse_args(arguments)
    for name in ("batch", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    try:
        rows = Rows(options.out)
        plain = recipe_of(options.out / "plain")
        models = generators(seed=plain["seed"], max_tokens=plain["max_tokens"], batch_size=options.batch * DRAWS)
    except (ImportError, ValueError, MissingDataError) as error:
        parser.error(str(error))
    stage, settings = STAGES[options.rival]
    names, made = list(rows.rows)[: options.limit], stage(rows, models)
    try:
        complete(options.out / options.rival, recipe(models[False], **settings), names, made, batch=options.batch)
    except (SamplesError, FileInUseError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

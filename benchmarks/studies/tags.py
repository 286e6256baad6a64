"""Does it help b to know who made an answer: python -m benchmarks.studies.tags (needs PFM_DATA).

Answers of ten weak generators to real prompts; a linear Bradley-Terry reward chooses among eight answers to prompts
that it has not seen, once by the text alone and once with the generator's one-hot code beside it. GPT-4 judges. The
third rule goes by the generators' win rates alone and does not read the texts.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.core.config import AlpacaConfig
from benchmarks.core.data import data_folder, read_jsonl
from benchmarks.tasks.alpaca import load
from pfm.encoders import encoder_from_name
from pfm.preferences import BradleyTerry
from pfm.references import TaggedPairs
from pfm.statistics import Bootstrap

__all__ = ["main", "measure"]


def measure(seed: int) -> dict[str, NDArray[np.float64]]:
    """Return GPT-4's score of what each rule chooses, one a test prompt."""
    task = load(AlpacaConfig("alpaca"), seed)
    encoder = encoder_from_name("minilm+surface", long_texts="truncate")
    makers: dict[tuple[str, str], str] = {}
    for row in read_jsonl(data_folder("alpaca_eval") / "outputs.jsonl.xz"):
        for model, text in row["outputs"].items():
            makers.setdefault((row["instruction"], text), model)
    pairs = task.train.encode(encoder, progress=False)
    chosen, rejected = (
        [makers[str(prompt), str(text)] for prompt, text in zip(task.train.prompts, side, strict=True)]
        for side in (task.train.chosen, task.train.rejected)
    )
    tagged = TaggedPairs.of(pairs, chosen, rejected)
    unit = float((pairs.chosen - pairs.chosen.mean(0)).square().sum(1).mean().sqrt())
    by_text, by_both = BradleyTerry().fit(pairs), BradleyTerry().fit(tagged.with_codes(unit))
    by_maker = tagged.win_rates(prior=10).rates @ tagged.shares
    found: dict[str, list[float]] = {name: [] for name in ("text", "text and tag", "tag", "random", "oracle")}
    for item in task.items:
        names = [makers[str(item.prompt), text] for text in item.candidates]
        if not set(names) <= set(tagged.names):
            continue
        numbers = [tagged.number(name) for name in names]
        y = encoder.encode(item.candidates, progress=False).float()
        code = unit * torch.eye(len(tagged.names))[numbers]
        for name, score in (
            ("text", by_text.reward(y)),
            ("text and tag", by_both.reward(torch.cat([y, code], dim=1))),
            ("tag", by_maker[numbers]),
        ):
            found[name].append(float(item.scores[int(score.argmax())]))
        found["random"].append(float(item.scores.mean()))
        found["oracle"].append(float(item.scores.max()))
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    """Print what every rule reaches, and what the tag adds, by seed and over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    gains = []
    for seed in range(parser.parse_args().seeds):
        found = measure(seed)
        gains.append(found["text and tag"] - found["text"])
        means = ", ".join(f"{name} {100 * values.mean():.1f}" for name, values in found.items())
        added = Bootstrap(len(gains[-1])).mean(gains[-1])
        print(f"seed {seed}: {means}; the tag adds {added.text(percent=True, signed=True)}", flush=True)
    # Prompts of different seeds overlap: each seed's mean is one figure, their spread says what a new split changes.
    means = 100 * np.array([gain.mean() for gain in gains])
    print(f"over seeds: the tag adds {means.mean():+.1f} points, from {means.min():+.1f} to {means.max():+.1f}")


if __name__ == "__main__":
    main()

"""Refine answers of weak frozen generators; GPT-4 has compared each with a reference answer (AlpacaEval)."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.core.config import AlpacaConfig
from benchmarks.core.data import data_folder, read_csv, read_jsonl
from benchmarks.selection.selection import Selection, draw_candidates, limited, split_prompts
from pfm import PreferencePairs

__all__ = ["load"]


def load(config: AlpacaConfig, seed: int) -> Selection:
    """Split the prompts; train on all answers of the one part, draw candidates from those of the other.

    The generators are those that the judge likes least on average, so that there is something to refine. Each is
    one draw of a generator that answers like one of them at random.
    """
    folder = data_folder("alpaca_eval")
    preferences: dict[str, dict[str, float]] = defaultdict(dict)
    for row in read_csv(folder / "preferences.csv.gz"):
        preferences[row["model"]][row["prompt_id"]] = float(row["p_model_preferred"])
    means = {model: sum(found.values()) / len(found) for model, found in preferences.items()}
    generators = sorted(means, key=lambda model: means[model])[: config.generators]

    answers: dict[str, list[tuple[str, float]]] = defaultdict(list)
    numbers: dict[str, int] = {}
    for row in read_jsonl(folder / "outputs.jsonl.xz"):
        # An instruction that stands there twice is one prompt.
        numbers.setdefault(row["instruction"], int(row["id"]))
        for model in generators:
            text, preference = row["outputs"].get(model, ""), preferences[model].get(str(row["id"]))
            if text.strip() and preference is not None:
                answers[row["instruction"]].append((text, preference))

    train, test = split_prompts(limited(answers, config.limit), config.test_share, seed)
    train = [prompt for prompt in train if len({preference for _, preference in answers[prompt]}) > 1]
    texts = {prompt: [text for text, _ in found] for prompt, found in answers.items()}
    scores = {prompt: [preference for _, preference in found] for prompt, found in answers.items()}
    pairs = PreferencePairs.from_scores(
        train, [texts[prompt] for prompt in train], [scores[prompt] for prompt in train]
    )
    items = [
        item
        for prompt in test
        for item in draw_candidates(
            str(numbers[prompt]), prompt, texts[prompt], scores[prompt],
            candidates=config.candidates, draws=config.draws, seed=(seed, numbers[prompt]),
        )
    ]  # fmt: skip
    return Selection(
        pairs, items, judge="GPT-4 against text-davinci-003", unit="answers preferred by GPT-4", percent=True
    )

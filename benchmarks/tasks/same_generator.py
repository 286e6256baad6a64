"""Refine samples of one frozen model; checks and a classifier score them, and no model's opinion."""

from __future__ import annotations

from pathlib import Path

from benchmarks.same_generator.config import SameGeneratorConfig
from benchmarks.same_generator.scored import FOLDS, fold_of, pairs_of, plain_samples
from benchmarks.selection.selection import Selection, draw_candidates, limited

__all__ = ["load"]


def load(config: SameGeneratorConfig, seed: int) -> Selection:
    """Test on a third of the prompts of each kind, another for each of three seeds, and train on the others.

    Raises:
        MissingDataError: the samples are absent. ValueError: a prompt has too few of them.
    """
    rows = plain_samples(Path(config.samples), config.part)
    kept = set(limited([row.name for row in rows], config.limit))
    rows = [row for row in rows if row.name in kept]
    few = [row for row in rows if len(row.texts) <= config.candidates]
    if few:
        raise ValueError(
            f"{len(few)} prompts have {len(few[0].texts)} samples, and task.candidates={config.candidates} needs one "
            "more than that: lower it, or draw more with --n"
        )
    tested = {row.name for row in rows if fold_of(row.name, seed // FOLDS) == seed % FOLDS}
    items = [
        item
        for number, row in enumerate(rows)
        if row.name in tested
        for item in draw_candidates(
            row.name, row.sample.prompt, row.texts, row.scores.tolist(),
            candidates=config.candidates, draws=config.draws, seed=(seed, number),
        )
    ]  # fmt: skip
    instructions = config.part == "instructions"
    return Selection(
        pairs_of([row for row in rows if row.name not in tested]),
        items,
        judge="checks of the instruction" if instructions else "a classifier of viewers' reviews (IMDB)",
        unit="instruction followed" if instructions else "probability of a liking review",
        percent=True,
    )

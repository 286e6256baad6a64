"""The main job in one go on data that ships with the package: fit, wrap a frozen generator, refine, evaluate."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pfm.data.pairs import PreferencePairs
from pfm.encoders import Encoder, encoder_from_name
from pfm.evaluation.report import Report
from pfm.evaluation.results import Scored
from pfm.flow.config import FlowConfig
from pfm.flow.preference_flow import PreferenceFlow
from pfm.preferences import BradleyTerry, MeanShift
from pfm.refiner import Refinement, wrap

if TYPE_CHECKING:
    from rich.console import Console

    from pfm.data.encoded import EncodedPairs

__all__ = ["ExampleData", "WrittenDrafts", "cross_fit", "fit_example", "folds", "load_example", "run"]

ENCODER = "minilm+surface"
FOLDS = 4
CANDIDATES = 5  # of a prompt's six drafts; the sixth is the draw that no method can pick
EXAMPLES = 5
NEXT = (
    ("pfm fit pairs.jsonl --out flow/", "fit your own pairs: prompt, chosen, rejected"),
    ("pfm refine outputs.jsonl --flow flow/ --out refined.jsonl", "rows: prompt, candidates"),
    ("pfm evaluate scored.jsonl --flow flow/ --pairs pairs.jsonl", "rows: prompt, candidates, scores"),
)


@dataclass(frozen=True)
class ExampleData:
    """Holds the shipped preferences.

    ``grades`` gives for each prompt its six drafts with their grades, 1 (worst) to 6; ``topics`` each prompt's topic.
    """

    pairs: PreferencePairs
    grades: dict[str, dict[str, float]]
    topics: dict[str, str]

    @property
    def prompts(self) -> list[str]:
        """List the prompts in the order of the file."""
        return list(self.grades)


def load_example() -> ExampleData:
    """Load the preferences that ship with the package."""
    with as_file(files("pfm") / "assets" / "preferences.jsonl") as path:
        pairs = PreferencePairs.from_jsonl(path)
    grades: dict[str, dict[str, float]] = {}
    topics: dict[str, str] = {}
    for row in pairs:
        of_prompt = grades.setdefault(row["prompt"], {})
        of_prompt[row["chosen"]] = float(row["score_chosen"])
        of_prompt[row["rejected"]] = float(row["score_rejected"])
        topics[row["prompt"]] = row["group"]
    return ExampleData(pairs, grades, topics)


class WrittenDrafts:
    """A small frozen generator: it hands out the written drafts of a prompt in a random order, blind to grades.

    The order depends on the seed and the prompt alone. The last draft of the order is handed out only when all are
    asked for.

    Args:
        drafts: for each prompt its texts.
        seed: another seed, another order.
    """

    def __init__(self, drafts: Mapping[str, Iterable[str]], seed: int = 0) -> None:
        self.drafts: dict[str, list[str]] = {prompt: sorted(texts) for prompt, texts in drafts.items()}
        self.seed = seed

    def __call__(self, prompt: str, n: int = 1) -> list[str]:
        """Return n drafts of a prompt.

        Raises:
            KeyError: there are no drafts of this prompt.
        """
        return self._order(prompt)[:n]

    def withheld(self, prompt: str) -> str:
        """Return the draft that is last in the order."""
        return self._order(prompt)[-1]

    def _order(self, prompt: str) -> list[str]:
        digest = sha256(f"{self.seed}\n{prompt}".encode()).digest()
        texts = self.drafts[prompt]
        order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(texts))
        return [texts[place] for place in order]


def folds(prompts: Sequence[str], seed: int, count: int) -> list[list[str]]:
    """Deal prompts at random into ``count`` parts of about equal size."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [[prompts[int(place)] for place in order[part::count]] for part in range(count)]


def cross_fit(
    data: ExampleData,
    encoded: EncodedPairs,
    encoder: Encoder,
    seed: int,
    *,
    shuffle: bool = False,
    progress: bool = False,
) -> list[Scored]:
    """Refine every prompt once, by a flow and baselines that were fitted on the prompts of the other folds.

    Args:
        data: prompts and grades.
        encoded: all pairs, in the order of ``data.pairs``.
        encoder: the encoder of ``encoded``.
        seed: of folds, fits and drafts.
        shuffle: exchange chosen and rejected at random before fitting: the control in which nothing can be learned.
        progress: show a progress bar.

    Returns:
        One row a prompt, in the order of the prompts.
    """
    generator = WrittenDrafts(data.grades, seed)
    texts = [text for drafts in data.grades.values() for text in drafts]
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    rows: dict[str, Scored] = {}
    parts = folds(data.prompts, seed, FOLDS)
    make_bar = tqdm if progress else functools.partial(tqdm, disable=True)
    for held_out in make_bar(parts, desc="control" if shuffle else "fit", unit="fold", leave=False):
        train = encoded.select(torch.tensor([prompt not in set(held_out) for prompt in data.pairs.prompts]))
        if shuffle:
            train = train.shuffle_labels(seed)
        flow = fit_example(train, seed)
        refiner = wrap(generator, flow, encoder=encoder, n=CANDIDATES)
        rewards = {
            "mean_shift": MeanShift().fit(train).reward,
            "bradley_terry": BradleyTerry().fit(train).reward,
        }
        for result in refiner.batch(held_out, progress=False):
            candidates = torch.stack([vectors[text] for text in result.candidates])
            picks = {name: int(reward(candidates).argmax()) for name, reward in rewards.items()}
            rows[str(result.prompt)] = _scored(result, picks, data, generator)
    return [rows[prompt] for prompt in data.prompts]


def fit_example(pairs: EncodedPairs, seed: int = 0) -> PreferenceFlow:
    """Fit a flow for choosing among candidates on pairs of the shipped preferences, on one thread."""
    # A choice among candidates by win probability does not use the residual, which takes longest to fit; what is left
    # gives a second thread little to do.
    with _threads(1):
        return PreferenceFlow.fit(pairs, FlowConfig(residual=False, seed=seed), progress=False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads: on a busy machine, threads that wait for each other are several times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scored(result: Refinement, picks: dict[str, int], data: ExampleData, generator: WrittenDrafts) -> Scored:
    prompt = str(result.prompt)
    grades = data.grades[prompt]
    return Scored(
        prompt=prompt,
        candidates=result.candidates,
        scores=[grades[text] for text in result.candidates],
        picks={**picks, "pfm": result.index},
        probabilities=result.probabilities,
        independent=grades[generator.withheld(prompt)],
        group=data.topics[prompt],
    )


def run(out: str | Path, seed: int = 0, console: Console | None = None, progress: bool = True) -> Report:
    """Fit, refine and evaluate on the shipped data, and say on ``console`` what is done and what came of it.

    Writes ``report.html``, ``report.json`` and the folder ``flow`` into ``out``. Every figure is on prompts that the
    flow in question has not seen; the flow that is saved is fitted on all of them.

    Args:
        out: folder to write to; made if it is not there.
        seed: of folds, fits, drafts and resamples.
        console: where to print; None for standard output.
        progress: show progress bars.

    Raises:
        ImportError: the bundled encoder is neither installed nor reachable.
        OSError: ``out`` cannot be written.
    """
    from rich.console import Console

    console = console or Console()
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    data = load_example()
    _say(
        console,
        "data",
        f"{len(data.pairs):,} preferences on {len(data.prompts)} prompts of {len(set(data.topics.values()))} topics; "
        "every prompt has six written drafts, graded 1 to 6",
    )
    with _timed(console, "encode") as done, _threads(max(1, torch.get_num_threads() // 2)):
        encoder = encoder_from_name(ENCODER)
        encoded = data.pairs.encode(encoder, progress=progress)
        done(f"{len(data.prompts) * 7:,} texts with {ENCODER}, {encoder.dimension} numbers each; nothing was fetched")
    with _timed(console, "fit") as done:
        rows = cross_fit(data, encoded, encoder, seed, progress=progress)
        done(
            f"{FOLDS} flows, each on {FOLDS - 1} of {FOLDS} parts of the prompts, to refine the part that it has not "
            f"seen: a frozen generator gives {CANDIDATES} of a prompt's drafts in random order, the flow picks one"
        )
    with _timed(console, "control") as done:
        control = Report.from_scored(cross_fit(data, encoded, encoder, seed, shuffle=True, progress=progress))
        told = _control(control)
        done(told)
    with _timed(console, "save") as done:
        fit_example(encoded, seed).save_pretrained(out / "flow")
        report = Report.from_scored(rows, settings=_settings(data, told), seed=seed)
        report.save_json(out / "report.json")
        report.save_html(out / "report.html", examples=EXAMPLES)
        done(f"{out / 'report.html'}, {out / 'report.json'}, and {out / 'flow'}, fitted on all prompts")

    console.print()
    # Eight prompts a topic make a long table with wide intervals: it is in the page.
    console.print(replace(report, groups=[]))
    _show_examples(console, report)
    _show_next(console)
    return report


def _control(control: Report) -> str:
    gain = control.row("identity").difference
    changed = control.verdict.wins + control.verdict.losses
    meaning = "nothing learned, nothing gained" if gain.low <= 0 <= gain.high else "which chance hardly explains"
    return (
        f"the same fits on shuffled labels change {changed} of {control.settings['prompts']} outputs and the mean "
        f"grade by {gain.text(signed=True)}: {meaning}"
    )


def _settings(data: ExampleData, control: str) -> dict[str, Any]:
    return {
        "judge": "the drafts' own grades, 1 to 6",
        "left_out": [],
        "generator": f"{CANDIDATES} of the six written drafts of a prompt in random order, blind to grades; "
        "the fresh draw is the sixth",
        "training": f"{FOLDS} folds by prompt: each prompt is refined by a flow, and by baselines, fitted on the "
        f"rest; {len(data.pairs):,} pairs in all; without the residual network, which choosing by win probability "
        "does not use",
        "control": control,
    }


# ------------------------------------------------------------------------------------------------- on the console


def _say(console: Console, head: str, text: str) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=7, style="bold cyan")
    grid.add_column()
    grid.add_row(head, Text(text))
    console.print(grid)


@contextmanager
def _timed(console: Console, head: str) -> Iterator[Any]:
    """Yield a function that tells what was done, with the seconds that it took."""
    started = time.perf_counter()
    yield lambda text: _say(console, head, f"{text} ({time.perf_counter() - started:.1f} s)")


def _show_examples(console: Console, report: Report) -> None:
    """Print the same before/after pairs as the page: drawn at random, and the largest loss if there is one."""
    from rich.table import Table
    from rich.text import Text

    losses = [example for example in report.examples if example.kind != "random"]
    drawn = [example for example in report.examples if example.kind == "random"]
    shown = drawn[: EXAMPLES - len(losses)] + losses
    if not shown:
        return
    console.print()
    console.print(
        f"[bold]Before and after[/bold], {len(shown)} of the changed outputs: drawn at random"
        + (", and last the largest loss." if losses else ".")
    )
    for example in shown:
        console.print()
        console.print(Text(example.prompt, style="bold"))
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="")
        for name, score, b in (
            ("original", example.original_score, example.original_probability),
            ("refined", example.refined_score, example.refined_probability),
        ):
            figures = f"grade {score:g}" + (f", b {b:.2f}" if b is not None else "")
            table.add_column(Text.assemble((name, "cyan"), (f"  {figures}", "dim")), ratio=1)
        table.add_row(Text(example.original), Text(example.refined))
        console.print(table)


def _show_next(console: Console) -> None:
    from rich.text import Text

    console.print()
    console.print("[bold]What to do next[/bold]")
    for command, meaning in NEXT:
        console.print(Text.assemble("  ", (command, "cyan"), (f"   # {meaning}", "dim")), soft_wrap=True)

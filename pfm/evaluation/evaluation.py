"""Say how much better refined outputs are, and against what.

Two floors: ``Report.from_scored`` turns judged candidates (``Scored`` rows, numbers only) into a report;
``evaluate`` makes such rows from a refiner or its records with a judge. Every method chooses among the
*same* candidates, so the comparison is at equal generation cost. ``pfm.evaluation.render`` draws the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from math import isnan
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pfm.data.rows import conversation_text
from pfm.devices import standard_defaults
from pfm.protocols import Judge
from pfm.reasoning import checked_reasoning, judged_text
from pfm.statistics import (
    Array,
    Bin,
    Bootstrap,
    Estimate,
    Reliability,
    binned,
    length_controlled,
    pairwise_agreement,
    reliability,
    sign_test,
    win_share,
    win_share_among,
)

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs

Prompt = str | list[dict[str, Any]]

LABELS = {
    "identity": "Original, unchanged",
    "random": "Random candidate",
    "longest": "Longest candidate",
    "mean_shift": "Mean shift",
    "bradley_terry": "Bradley–Terry best-of-n",
    "pfm": "Preference flow",
    "oracle": "Oracle best-of-n",
}
COMPUTED = ("random", "longest", "oracle")  # baselines that need the scores and the texts alone
VECTOR_BASELINES = ("mean_shift", "bradley_terry")  # those that need training pairs and their encoder
RECORD = ("prompt", "candidates", "index", "original", "probabilities", "error")  # read of a Refinement
FEW_PROMPTS = 30
FORMAT = 1


@dataclass
class Scored:
    """The judged candidates of one prompt, and which of them each method picks.

    Attributes:
        prompt: text or chat messages.
        candidates: n >= 1 texts.
        scores: (n,) the judge's score of each candidate, finite, higher is better.
        picks: method -> index into candidates.
        original: index of the output that an unrefined generator would have given.
        probabilities: (n,) win probability b of each candidate, 0 to 1, or None.
        independent: the judge's score of a further draw of the same generator that no method could pick, or
            None.
        group: name of the prompt's group, or None.
    """

    prompt: Prompt
    candidates: list[str]
    scores: NDArray[np.float64] | Sequence[float]
    picks: dict[str, int]
    original: int = 0
    probabilities: NDArray[np.float64] | Sequence[float] | None = None
    independent: float | None = None
    group: str | None = None

    def changed(self, method: str) -> bool:
        """Tell whether a method's pick reads differently from the original."""
        return self.candidates[self.picks[method]] != self.candidates[self.original]


@dataclass(frozen=True)
class MethodRow:
    """What one method reached; every interval resamples the same prompts.

    Attributes:
        score: mean judge score.
        difference: mean judge score of the method under test minus this method's.
        win: share of prompts won against the original, ties half.
        win_controlled: the same at equal length; None when length and method cannot be told apart.
        win_independent: share won against an independent draw; None without independent draws.
        changed: share of prompts whose text differs from the original.
        length_ratio: mean of (length of the pick / length of the original), in characters.
        oracle_share: share of the oracle's gain in mean score over the original; None when the oracle gains
            nothing.
    """

    name: str
    label: str
    score: Estimate
    difference: Estimate
    win: Estimate
    win_controlled: Estimate | None
    win_independent: Estimate | None
    changed: Estimate
    length_ratio: Estimate
    oracle_share: Estimate | None


@dataclass(frozen=True)
class Calibration:
    """How far the win probabilities b can be believed.

    The outcome of a candidate is the share of the other candidates of its prompt that it beats, ties half:
    what b predicts.

    Attributes:
        reliability: ECE, its noise floor, slope, and the bins of the reliability plot.
        accuracy: share of candidate pairs with different judge scores that b orders as the judge does; None
            without any.
        gaps: share of candidates that beat the original, by how much higher their b is.
        prompts: prompts with probabilities and at least two candidates.
    """

    reliability: Reliability
    accuracy: Estimate | None
    gaps: list[Bin]
    prompts: int

    @property
    def sentence(self) -> str:
        """Say in one sentence whether b is calibrated."""
        r = self.reliability
        plain = "" if r.measured_ece is None else f" without noise; measured {r.measured_ece:.3f}"
        measured = (
            f"ECE {r.ece.text()}{plain}, where a perfectly calibrated predictor would show {r.noise_floor:.3f} "
            f"(95% of the time below {r.noise_ceiling:.3f})"
        )
        if r.within_noise:
            return f"The win probabilities are calibrated as far as these data can tell: {measured}."
        if r.slope and r.slope.high < 0:
            return f"The win probabilities point the wrong way: {measured}; slope {r.slope.text()}."
        if r.slope and r.slope.high < 1:
            return f"The win probabilities are overconfident: {measured}; slope {r.slope.text()}."
        if r.slope and r.slope.low > 1:
            return f"The win probabilities are too timid: {measured}; slope {r.slope.text()}."
        return f"The win probabilities are off: {measured}."


@dataclass(frozen=True)
class GroupRow:
    """What the method under test reached on one group; ``gain`` is its mean score minus the original's."""

    name: str
    prompts: int
    win: Estimate
    gain: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True)
class Verdict:
    """The answer in words.

    ``outcome`` is "helps", "hurts", "mixed" or "no evidence"; ``headline`` says it in a few words and
    ``sentences`` give the figures: against the original, beside the strongest baseline, at equal length. Wins,
    losses and ties count prompts against the original; ``p_value`` is the exact two-sided sign test on them.
    """

    outcome: str
    headline: str
    sentences: list[str]
    warnings: list[str]
    wins: int
    losses: int
    ties: int
    p_value: float

    @property
    def text(self) -> str:
        """Join headline and sentences."""
        return f"{self.headline}. {' '.join(self.sentences)}"


@dataclass(frozen=True)
class Failure:
    """A prompt whose refinement reported an error; ``evaluated`` when it still left candidates to judge."""

    prompt: int
    error: str
    evaluated: bool


@dataclass(frozen=True)
class Example:
    """A prompt before and after; ``kind`` says how it was chosen: "random" or "largest loss"."""

    prompt: str
    original: str
    refined: str
    original_score: float
    refined_score: float
    original_probability: float | None
    refined_probability: float | None
    kind: str


@dataclass
class Report:
    """The report card: print it, save it as JSON, or as one self-contained HTML page."""

    rows: list[MethodRow]
    verdict: Verdict
    calibration: Calibration | None
    groups: list[GroupRow]
    failures: list[Failure]
    settings: dict[str, Any]
    examples: list[Example] = field(default_factory=list)

    @classmethod
    def from_scored(
        cls,
        rows: Sequence[Scored],
        *,
        method: str = "pfm",
        baselines: Sequence[str] = COMPUTED,
        failures: Sequence[Failure] = (),
        settings: Mapping[str, Any] | None = None,
        examples: int = 20,
        resamples: int = 2000,
        seed: int = 0,
    ) -> Report:
        """Compare the picks of all methods on judged candidates.

        Args:
            rows: one ``Scored`` a prompt, all with picks of the same methods.
            method: the method under test, one of the picks.
            baselines: which of "random", "longest", "oracle" to show; the original ("identity") is always
                shown.
            failures: prompts that could not be evaluated, or only in part; listed in the report.
            settings: further JSON values to state in the report, such as the judge's name.
            examples: how many before/after examples to keep, drawn at random from the changed prompts.
            resamples: bootstrap resamples of the prompts.
            seed: seed of resamples and examples.

        Raises:
            ValueError: no rows, a row with inconsistent shapes or values out of range, or an unknown
                method.
        """
        rows = [_checked(row, number) for number, row in enumerate(rows)]
        methods = _method_order(rows, method, baselines)
        bootstrap = Bootstrap(len(rows), resamples, seed)
        table = _Candidates(rows)
        measured = [_measure(name, table, method, bootstrap) for name in methods]
        sizes = [len(row.candidates) for row in rows]
        return cls(
            rows=measured,
            verdict=_verdict(measured, table, method, _warnings(rows, failures)),
            calibration=_calibrate(rows, bootstrap),
            groups=_by_group(rows, method, resamples, seed),
            failures=list(failures),
            settings={
                "method": method,
                "prompts": len(rows),
                "candidates": {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)},
                "independent_draws": sum(row.independent is not None for row in rows),
                "resamples": resamples,
                "seed": seed,
                **(settings or {}),
            },
            examples=_examples(rows, method, examples, seed),
        )

    def row(self, name: str) -> MethodRow:
        """Return the row of a method by name.

        Raises:
            KeyError: the report has no such method.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no method {name!r}: this report has {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save_json(self, path: str | Path) -> Path:
        """Write the report as strict JSON, and return the path."""
        path = Path(path).expanduser()
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load_json(cls, path: str | Path) -> Report:
        """Read a report written by ``save_json``.

        Raises:
            ValueError: the file is not such a report.
        """
        try:
            values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r} where {FORMAT} is expected")
            return _decode(cls, values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report written by Report.save_json: {error}") from error

    def save_html(self, path: str | Path, examples: int = 5) -> Path:
        """Write the report as one HTML page that needs no network and no scripts, and return the path."""
        from pfm.evaluation.render import page

        path = Path(path).expanduser()
        # texts may hold lone surrogates, which no UTF-8 file can
        path.write_text(page(self, examples), encoding="utf-8", errors="replace")
        return path

    def print(self, console: Any = None) -> None:
        """Print the report on a rich console; default: standard output."""
        from rich.console import Console

        (console or Console()).print(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from pfm.evaluation.render import terminal

        yield from terminal(self, options.max_width)


@standard_defaults
def evaluate(
    refiner_or_records: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    judge: Judge | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    training: EncodedPairs | None = None,
    encoder: Any = None,
    groups: Sequence[Any] | None = None,
    methods: Sequence[str] | None = None,
    reasoning: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Measure refined outputs against the original, a fresh draw, and baselines on the same candidates.

    Give a refiner and prompts, or the records of an earlier ``refiner.batch`` (better when generating is
    expensive: they outlive a failing judge). With a refiner, one further draw a prompt is made that no
    method can pick.

    Args:
        refiner_or_records: a ``Refiner``, or a sequence of ``Refinement``.
        prompts: what to refine; only with a refiner.
        judge: ``judge(prompt, responses)`` -> one finite number a response, higher is better. It sees all
            candidates of a prompt at once, and should not be what the flow was fitted on.
        scores: instead of a judge, one array of scores a record, in the order of its candidates.
        training: encoded pairs that the flow was fitted on, for the baselines "mean_shift" and
            "bradley_terry".
        encoder: the encoder of ``training``.
        groups: one name a prompt, for the table by group.
        methods: which baselines to show, of "random", "longest", "mean_shift", "bradley_terry", "oracle";
            default all that can be computed. The original is always shown.
        reasoning: "strip" judges and measures of an output with hidden reasoning the answer after it, see
            :mod:`pfm.reasoning`; "keep" the whole text. None: as the refiner does, else "strip".
        resamples: bootstrap resamples of the prompts.
        seed: seed of the resamples.
        progress: show progress bars.

    Raises:
        ValueError: arguments that exclude each other or disagree in length, a judge whose answer is not one
            finite number a response (naming the prompt), or no prompt that could be evaluated.
    """
    if (judge is None) == (scores is None):
        raise ValueError("give either judge or scores, one of the two")
    refiner = refiner_or_records if hasattr(refiner_or_records, "batch") else None
    asked = _checked_source(refiner_or_records, refiner, prompts)
    if scores is not None and refiner is not None:
        raise ValueError("scores needs records whose candidates are known; with a refiner give judge")
    for name, column in (("scores", scores), ("groups", groups)):
        if column is not None and len(column) != len(asked):
            raise ValueError(f"{name} must have one entry a prompt: got {len(column)} for {len(asked)} prompts")
    vector, computed, left_out = _wanted_baselines(methods, training, encoder)
    reasoning = checked_reasoning(getattr(refiner, "reasoning", "strip") if reasoning is None else reasoning)

    records = asked if refiner is None else list(refiner.batch(asked, progress=progress))
    kept = [number for number, record in enumerate(records) if record.candidates]
    failures = [
        Failure(number, str(record.error or "no candidates"), bool(record.candidates))
        for number, record in enumerate(records)
        if record.error is not None or not record.candidates
    ]
    if not kept:
        raise ValueError(
            f"no prompt could be evaluated: all {len(records)} failed, the first with: {failures[0].error}"
        )
    further = _independent_draws(refiner, [records[k] for k in kept], left_out)

    rows = []
    # disable=False would overrule TQDM_DISABLE, so it is only ever set to True
    make_bar = tqdm if progress else partial(tqdm, disable=True)
    for number, draw in make_bar(list(zip(kept, further, strict=True)), desc="Judging", unit="prompt"):
        record = records[number]
        candidates = [judged_text(text, reasoning) for text in record.candidates]
        if judge is None:
            given = scores[number] if scores is not None else ()
            judged = _checked_scores("scores", given, len(candidates), number)
        else:
            further_answer = [judged_text(text, reasoning) for text in draw]
            judged = _judged(judge, record.prompt, [*candidates, *further_answer], number)
        rows.append(
            Scored(
                prompt=record.prompt,
                candidates=candidates,
                scores=judged[: len(candidates)],
                picks={"pfm": int(record.index)},
                original=_original_index(record, number),
                probabilities=_known(record.probabilities),
                independent=float(judged[-1]) if draw else None,
                group=None if groups is None else str(groups[number]),
            )
        )
    if vector and training is not None:
        for name, picks in _vector_picks(vector, training, encoder, rows, progress).items():
            for row, pick in zip(rows, picks, strict=True):
                row.picks[name] = pick
    return Report.from_scored(
        rows,
        baselines=computed,
        failures=failures,
        settings={"judge": _name_of(judge) if judge else "scores given by the caller", "left_out": left_out},
        resamples=resamples,
        seed=seed,
    )


# ------------------------------------------------------------------------------------ from a refiner to rows


def _checked_source(source: Any, refiner: Any, prompts: Sequence[Prompt] | None) -> list[Any]:
    """Return the prompts for a refiner, or the records."""
    if refiner is not None:
        if prompts is None:
            raise ValueError("a refiner needs prompts: evaluate(refiner, prompts, judge=...)")
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a sequence of one prompt or more, got {prompts!r:.80}")
        return list(prompts)
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise TypeError(
            f"refiner_or_records must be a Refiner or a sequence of Refinement, got {type(source).__name__}"
        )
    if prompts is not None:
        raise ValueError("prompts goes with a refiner; records carry their own")
    if not source:
        raise ValueError("records is empty: nothing to evaluate")
    for number, record in enumerate(source):
        missing = [name for name in RECORD if not hasattr(record, name)]
        if missing:
            raise TypeError(
                f"record {number} must be a Refinement, got {type(record).__name__} without {', '.join(missing)}"
            )
    return list(source)


def _wanted_baselines(
    methods: Sequence[str] | None, training: Any, encoder: Any
) -> tuple[list[str], list[str], list[str]]:
    """Split the wanted baselines into (by vectors, computed from scores), with reasons for those left out."""
    if (training is None) != (encoder is None):
        raise ValueError("training and encoder go together: give both, or neither")
    known = [*COMPUTED, *VECTOR_BASELINES]
    unknown = sorted(set(methods or ()) - set(known))
    if unknown:
        raise ValueError(f"methods holds unknown names {', '.join(unknown)}: choose from {', '.join(known)}")
    wanted = known if methods is None else list(methods)
    computed = [name for name in COMPUTED if name in wanted]
    vector = [name for name in VECTOR_BASELINES if name in wanted]
    if not vector or training is not None:
        return vector, computed, []
    names = " and ".join(LABELS[name] for name in vector)
    if methods is not None:
        raise ValueError(f"methods asks for {names}: give training and encoder as well")
    return [], computed, [f"{names}: not compared, since training pairs and their encoder were not given"]


def _independent_draws(refiner: Any, records: Sequence[Any], left_out: list[str]) -> list[list[str]]:
    """Draw one further output a prompt: a list of one text, or of none where there is none."""
    none, what = [[] for _ in records], "Win rate against an independent draw"
    if refiner is None:
        left_out.append(f"{what}: records hold no draw that no method could pick")
        return none
    draws = [list(texts)[:1] for texts in refiner.candidates([record.prompt for record in records], 1)]
    if len(draws) != len(records):
        raise ValueError(f"refiner.candidates gave {len(draws)} lists for {len(records)} prompts")
    # a cache or a fixed seed can hand out the first draw again, which is the original and not independent
    # of it
    repeated = all(draw in ([], [record.original]) for draw, record in zip(draws, records, strict=True))
    if repeated and any(len(set(record.candidates)) > 1 for record in records):
        left_out.append(f"{what}: the generator repeats its first draw when asked again")
        return none
    return draws


def _judged(judge: Judge, prompt: Prompt, responses: list[str], number: int) -> Array:
    try:
        answer = judge(prompt, responses)
    except Exception as error:
        error.add_note(f"raised by the judge on prompt {number}")
        raise
    return _checked_scores("judge", answer, len(responses), number)


def _checked_scores(source: str, answer: Any, count: int, number: int) -> Array:
    try:
        values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} must give numbers: at prompt {number} got {answer!r:.200}") from error
    if values.shape != (count,):
        raise ValueError(
            f"{source} must give one number a response: at prompt {number} there are {count} responses, "
            f"got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{source} must give finite numbers: at prompt {number}, response {bad} got {values[bad]}")
    return values


def _known(probabilities: Any) -> list[float] | None:
    """Return the probabilities of a record, or None when some candidate could not be judged by the flow."""
    values = [float(value) for value in probabilities] if probabilities is not None else []
    return values if values and not any(map(isnan, values)) else None


def _original_index(record: Any, number: int) -> int:
    try:
        return list(record.candidates).index(record.original)
    except ValueError:
        raise ValueError(
            f"record {number}: its original is not among its candidates, so no method could have kept it; "
            "put it first among them"
        ) from None


def _vector_picks(
    names: Sequence[str], training: EncodedPairs, encoder: Any, rows: Sequence[Scored], progress: bool
) -> dict[str, list[int]]:
    """Pick by baselines that read the same embeddings as the flow."""
    import torch

    from pfm.encoders.base import EMPTY_TEXT
    from pfm.encoders.sentence import as_encoder
    from pfm.preferences import BradleyTerry, MeanShift

    encoder = as_encoder(encoder)
    # An output that was cut off within its reasoning has an empty answer, which encoders refuse.
    outputs = encoder.encode([text or EMPTY_TEXT for row in rows for text in row.candidates], progress=progress)
    if outputs.shape[1] != training.dimension:
        raise ValueError(
            f"encoder gives {outputs.shape[1]} values an output, but training pairs have "
            f"{training.dimension}: give the encoder that made them"
        )
    context = None
    if training.context_dimension:
        encode_prompts = getattr(encoder, "encode_prompts", encoder.encode)
        owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row.candidates) for row in rows]))
        context = encode_prompts([conversation_text(row.prompt) for row in rows], progress=progress)[owner]

    rewards = {
        "mean_shift": lambda: MeanShift().fit(training).reward(outputs),
        "bradley_terry": lambda: BradleyTerry().fit(training).reward(outputs, context),
    }
    ends = np.cumsum([len(row.candidates) for row in rows])[:-1]
    return {
        name: [int(part.argmax()) for part in np.split(rewards[name]().detach().cpu().numpy(), ends)] for name in names
    }


def _name_of(judge: Any) -> str:
    return str(getattr(judge, "name", None) or getattr(judge, "__qualname__", None) or type(judge).__name__)


# -------------------------------------------------------------------------------------- from rows to figures


def _checked(row: Scored, number: int) -> Scored:
    """Return the row with arrays in place, or say what is wrong with it."""
    n = len(row.candidates)
    scores = np.asarray(row.scores, dtype=np.float64)
    if n == 0:
        raise ValueError(f"row {number} has no candidates")
    if scores.shape != (n,):
        raise ValueError(f"row {number}: scores must be ({n},), one a candidate, got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"row {number}: scores must be finite, got {scores[~np.isfinite(scores)][0]}")
    for name, index in {"original": row.original, **row.picks}.items():
        if not 0 <= index < n:
            raise ValueError(f"row {number}: {name} must index its {n} candidates, got {index}")
    probabilities = row.probabilities
    if probabilities is not None:
        probabilities = np.asarray(probabilities, dtype=np.float64)
        if probabilities.shape != (n,):
            raise ValueError(f"row {number}: probabilities must be ({n},), got {probabilities.shape}")
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(f"row {number}: probabilities must lie between 0 and 1")
    if row.independent is not None and not np.isfinite(row.independent):
        raise ValueError(f"row {number}: independent must be finite or None, got {row.independent}")
    return Scored(
        row.prompt,
        row.candidates,
        scores,
        row.picks,
        row.original,
        probabilities,
        row.independent,
        row.group,
    )


def _method_order(rows: Sequence[Scored], method: str, baselines: Sequence[str]) -> list[str]:
    if not rows:
        raise ValueError("rows is empty: nothing to evaluate")
    picked = list(rows[0].picks)
    for number, row in enumerate(rows):
        if set(row.picks) != set(picked):
            raise ValueError(f"row {number} has picks of {sorted(row.picks)}, row 0 of {sorted(picked)}: give all")
    taken = sorted(set(picked) & {"identity", *COMPUTED})
    if taken:
        raise ValueError(f"picks holds {', '.join(taken)}: the report computes these itself, leave them out")
    if method not in picked:
        raise ValueError(f"method {method!r} has no picks: rows pick by {', '.join(sorted(picked)) or 'nothing'}")
    unknown = sorted(set(baselines) - set(COMPUTED))
    if unknown:
        raise ValueError(f"baselines holds unknown names {', '.join(unknown)}: choose from {', '.join(COMPUTED)}")
    before, after = ([name for name in group if name in baselines] for group in (("random", "longest"), ("oracle",)))
    return ["identity", *before, *(name for name in picked if name != method), method, *after]


class _Candidates:
    """All candidates of all prompts as flat arrays (M,); a method is a weight on each, 1 in all a prompt."""

    def __init__(self, rows: Sequence[Scored]):
        self.rows = rows
        sizes = np.array([len(row.candidates) for row in rows])
        self.size = sizes
        self.owner = np.repeat(np.arange(len(rows)), sizes)
        self.start = np.cumsum(sizes) - sizes
        self.original = self.start + np.array([row.original for row in rows])
        self.score = np.concatenate([row.scores for row in rows])
        self.length = np.array([len(text) for row in rows for text in row.candidates], dtype=np.float64)
        self.changed = np.array(
            [float(text != row.candidates[row.original]) for row in rows for text in row.candidates]
        )
        # a text cannot win against itself, whatever a noisy judge says
        self.win = np.where(self.changed, win_share(self.score, self.score[self.original][self.owner]), 0.5)
        self.gap = self.length - self.length[self.original][self.owner]
        self.length_ratio = self.length / np.maximum(self.length[self.original], 1.0)[self.owner]
        self.has_independent = np.array([row.independent is not None for row in rows])
        draws = np.array([0.0 if row.independent is None else row.independent for row in rows])
        self.win_independent = win_share(self.score, draws[self.owner])

    def weights(self, method: str) -> Array:
        """Return the probability (M,) with which a method picks each candidate."""
        if method == "random":
            return (1.0 / self.size)[self.owner]
        if method == "identity":
            index = self.original
        elif method == "longest":
            index = self._best(self.length)
        elif method == "oracle":
            index = self._best(self.score)
        else:
            index = self.start + np.array([row.picks[method] for row in self.rows])
        weights = np.zeros(self.owner.size)
        weights[index] = 1.0
        return weights

    def mean(self, weights: Array, values: Array) -> Array:
        """Return a method's expected value for each prompt: (M,), (M,) -> (n,)."""
        return np.add.reduceat(weights * values, self.start)

    def _best(self, values: Array) -> NDArray[np.int64]:
        """Index the highest value of each prompt: the original among equals, else the first."""
        best = np.maximum.reduceat(values, self.start)
        is_best = values == best[self.owner]
        first = np.array([s + np.argmax(is_best[s : s + n]) for s, n in zip(self.start, self.size, strict=True)])
        return np.where(is_best[self.original], self.original, first)


def _measure(name: str, table: _Candidates, method: str, bootstrap: Bootstrap) -> MethodRow:
    weights = table.weights(name)
    score = table.mean(weights, table.score)
    base, best, tested = (table.mean(table.weights(other), table.score) for other in ("identity", "oracle", method))
    against = table.has_independent.astype(np.float64)
    gain = best - base
    return MethodRow(
        name=name,
        label=LABELS.get(name, name),
        score=bootstrap.mean(score),
        difference=bootstrap.mean(tested - score),
        win=bootstrap.mean(table.mean(weights, table.win), (0.0, 1.0)),
        win_controlled=length_controlled(
            table.win, table.gap, bootstrap, owner=table.owner, weight=weights, changed=table.changed
        ),
        win_independent=bootstrap.ratio(against * table.mean(weights, table.win_independent), against, (0.0, 1.0)),
        changed=bootstrap.mean(table.mean(weights, table.changed), (0.0, 1.0)),
        length_ratio=bootstrap.mean(table.mean(weights, table.length_ratio)),
        oracle_share=bootstrap.ratio(score - base, gain) if gain.any() else None,
    )


def _agreement(rows: Sequence[Scored], bootstrap: Bootstrap) -> Estimate | None:
    counts = [
        (0.0, 0) if row.probabilities is None else pairwise_agreement(row.probabilities, row.scores) for row in rows
    ]
    right, pairs = np.array(counts, dtype=np.float64).T
    return bootstrap.ratio(right, pairs, (0.0, 1.0))


def _calibrate(rows: Sequence[Scored], bootstrap: Bootstrap) -> Calibration | None:
    used = [
        (number, row.probabilities, row)
        for number, row in enumerate(rows)
        if row.probabilities is not None and len(row.candidates) > 1
    ]
    if not used:
        return None
    probability = np.concatenate([b for _, b, _ in used])
    outcome = np.concatenate([win_share_among(row.scores) for _, _, row in used])
    owner = np.repeat([number for number, _, _ in used], [len(row.candidates) for _, _, row in used])
    rises, wins, owners = [], [], []
    for number, b, row in used:
        others = np.array([text != row.candidates[row.original] for text in row.candidates])
        b, scores = np.asarray(b), np.asarray(row.scores)
        rises.append((b - b[row.original])[others])
        wins.append(win_share(scores, scores[row.original])[others])
        owners.append(np.full(int(others.sum()), number))
    gaps = []
    if sum(map(len, rises)):
        gaps = binned(np.concatenate(rises), np.concatenate(wins), np.concatenate(owners), bootstrap, bins=8)
    return Calibration(
        reliability=reliability(probability, outcome, owner, bootstrap),
        accuracy=_agreement(rows, bootstrap),
        gaps=gaps,
        prompts=len(used),
    )


def _by_group(rows: Sequence[Scored], method: str, resamples: int, seed: int) -> list[GroupRow]:
    members: dict[str, list[Scored]] = {}
    for row in rows:
        if row.group is not None:
            members.setdefault(row.group, []).append(row)
    result = []
    for name in sorted(members):
        part = members[name]
        bootstrap, table = Bootstrap(len(part), resamples, seed), _Candidates(part)
        weights = table.weights(method)
        gain = table.mean(weights, table.score) - table.score[table.original]
        result.append(
            GroupRow(
                name=name,
                prompts=len(part),
                win=bootstrap.mean(table.mean(weights, table.win), (0.0, 1.0)),
                gain=bootstrap.mean(gain),
                accuracy=_agreement(part, bootstrap),
            )
        )
    return result


def _examples(rows: Sequence[Scored], method: str, count: int, seed: int) -> list[Example]:
    """Draw examples at random among the changed prompts, and add the largest loss if there is one."""
    changed = [row for row in rows if row.changed(method)]
    order = np.random.default_rng(seed).permutation(len(changed))
    gains = [float(row.scores[row.picks[method]] - row.scores[row.original]) for row in changed]
    worst = int(np.argmin(gains)) if gains and min(gains) < 0 else None
    chosen = [(int(i), "random") for i in order if i != worst][: max(0, count - (worst is not None))]
    if worst is not None and count > 0:
        chosen.append((worst, "largest loss"))
    return [_example(changed[i], method, kind) for i, kind in chosen]


def _example(row: Scored, method: str, kind: str) -> Example:
    old, new, b = row.original, row.picks[method], row.probabilities
    return Example(
        prompt=conversation_text(row.prompt),
        original=row.candidates[old],
        refined=row.candidates[new],
        original_score=float(row.scores[old]),
        refined_score=float(row.scores[new]),
        original_probability=None if b is None else float(b[old]),
        refined_probability=None if b is None else float(b[new]),
        kind=kind,
    )


# ------------------------------------------------------------------------------------- from figures to words


def _warnings(rows: Sequence[Scored], failures: Sequence[Failure]) -> list[str]:
    n = len(rows)
    warnings = []
    if n < FEW_PROMPTS:
        warnings.append(
            f"Only {n} prompt{'s' * (n > 1)}: the intervals are rough, and nothing but a large effect can "
            f"show. Use {FEW_PROMPTS} or more, better several hundred."
        )
    lost = sum(not failure.evaluated for failure in failures)
    if lost:
        warnings.append(f"{lost} of {n + lost} prompts failed and are not in the figures.")
    same = sum(len(set(row.candidates)) == 1 for row in rows)
    if same:
        warnings.append(
            f"At {same} of {n} prompts all candidates are the same text, so that no method could change "
            "anything: raise the generator's temperature or the number of candidates."
        )
    flat = sum(len(set(row.candidates)) > 1 and np.ptp(row.scores) == 0 for row in rows)
    if flat > n / 4:
        warnings.append(f"At {flat} of {n} prompts the judge gives all candidates the same score.")
    return warnings


def _verdict(measured: Sequence[MethodRow], table: _Candidates, method: str, warnings: list[str]) -> Verdict:
    """Judge by the win rate against the original, then by the strongest baseline, then by length.

    "helps" and "hurts" ask for both a bootstrap interval that excludes one half and an exact sign test below
    0.05: with few prompts the bootstrap alone is too sure (of five wins of five it makes an interval of width 0).
    """
    by_name = {row.name: row for row in measured}
    tested, gain = by_name[method], by_name["identity"].difference
    weights = table.weights(method)
    shares = table.mean(weights, table.win)
    wins, losses, count = int((shares == 1).sum()), int((shares == 0).sum()), shares.size
    p_value = sign_test(wins, losses)
    ahead = p_value < 0.05 and tested.win.low > 0.5
    behind = p_value < 0.05 and tested.win.high < 0.5

    name, change = "the flow" if method == "pfm" else tested.label, gain.text(signed=True)
    first = f"it wins {tested.win.text(percent=True)} against the original "
    first += f"({count} prompts: {wins} better, {losses} worse, {count - wins - losses} equal)"
    if not (weights * table.changed).any():
        outcome, headline = "no evidence", f"{name} changed nothing"
        first = f"it kept the original at all {count} prompts"
    elif (ahead and gain.high < 0) or (behind and gain.low > 0):
        outcome, headline = "mixed", f"the evidence on {name} is mixed"
        first += f", yet it changes the mean judge score by {change}"
    elif ahead:
        outcome, headline = "helps", f"{name} helps"
    elif behind:
        outcome, headline = "hurts", f"{name} hurts"
    else:
        outcome, headline = "no evidence", f"no evidence that {name} helps"
        if gain.low > 0 or gain.high < 0:
            first += f", though it changes the mean judge score by {change}"

    best = max((row for row in measured if row.name not in (method, "oracle")), key=lambda row: row.score.value)
    reservations = []
    if outcome == "helps" and _by_length(tested):
        reservations.append("only by length")
    if outcome == "helps" and best.difference.high < 0:
        reservations.append(f"{_phrase(best)} does better")
    headline += f", but {' and '.join(reservations)}" if reservations else ""
    sentences = [first, *_beside_baselines(best, by_name.get("random")), *_at_equal_length(outcome, tested)]
    return Verdict(
        outcome=outcome,
        headline=_capitalised(headline),
        sentences=[f"{_capitalised(sentence)}." for sentence in sentences],
        warnings=warnings,
        wins=wins,
        losses=losses,
        ties=count - wins - losses,
        p_value=p_value,
    )


def _beside_baselines(best: MethodRow, chance: MethodRow | None) -> list[str]:
    """Compare with the strongest baseline, and with chance where the flow is not clearly above it."""
    phrase, ahead = _phrase(best), best.difference
    measured = f"difference in mean judge score {ahead.text(signed=True)}"
    if ahead.low > 0:
        sentences = [f"it is ahead of the strongest baseline, {phrase}: {measured}"]
    elif ahead.high < 0:
        sentences = [f"{phrase} does better: {measured}"]
    else:
        sentences = [f"{phrase} does as well, as far as these prompts can tell: {measured}"]
    if chance is not None and chance is not best and chance.difference.low <= 0:
        below = (
            "even a random candidate does better"
            if chance.difference.high < 0
            else "it is not above a random candidate"
        )
        sentences.append(f"{below}: difference {chance.difference.text(signed=True)}")
    return sentences


def _by_length(tested: MethodRow) -> bool:
    """Tell whether equal length takes away the certainty of the gain and more than half of its size."""
    controlled = tested.win_controlled
    if controlled is None:
        return False
    return controlled.low <= 0.5 and controlled.value - 0.5 < (tested.win.value - 0.5) / 2


def _phrase(row: MethodRow) -> str:
    phrases = {
        "identity": "leaving the original alone",
        "random": "a random candidate",
        "longest": "the longest candidate",
    }
    return phrases.get(row.name, row.label)


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _at_equal_length(outcome: str, tested: MethodRow) -> list[str]:
    controlled = tested.win_controlled
    if controlled is None:
        return []
    figure = controlled.text(percent=True)
    if outcome != "helps":
        if controlled.low > 0.5:
            return [f"at equal length it would win {figure}"]
        return []
    if controlled.low > 0.5:
        return [f"at equal length it still wins {figure}"]
    longer = f"its picks are {tested.length_ratio.value:.2f} times as long"
    if _by_length(tested):
        return [f"at equal length the gain vanishes: {figure}, and {longer}"]
    return [f"at equal length the gain is no longer certain: {figure}, and {longer}"]


def _decode(kind: Any, value: Any) -> Any:
    """Rebuild a dataclass, or a list or option of such, from plain JSON values."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        # A field that an earlier version did not write keeps its default.
        return kind(
            **{item.name: _decode(hints[item.name], value[item.name]) for item in fields(kind) if item.name in value}
        )
    if get_origin(kind) is list:
        return [_decode(get_args(kind)[0], item) for item in value]
    if isinstance(kind, UnionType):
        inner = next(option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _decode(inner, value)
    return value

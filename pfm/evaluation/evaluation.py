"""Measure how much better refined outputs are than originals and baselines.

Two floors: ``Report.from_scored`` turns judged candidates (``Scored`` rows, numbers only) into a report;
``evaluate`` makes such rows from a refiner or its records with a judge. Every method chooses among the
*same* candidates, so the comparison is at equal generation cost. ``pfm.evaluation.render`` draws the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from pfm._internal.checks import check_length, check_seed
from pfm.devices import standard_defaults
from pfm.evaluation.candidates import COMPUTED, LABELS
from pfm.evaluation.report import Report
from pfm.evaluation.results import Failure, Prompt, Scored
from pfm.protocols import Judge
from pfm.reasoning import checked_reasoning, judged_text
from pfm.statistics import Array

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs

__all__ = ["evaluate"]


VECTOR_BASELINES = ("mean_shift", "bradley_terry")  # those that need training pairs and their encoder
RECORD = ("prompt", "candidates", "index", "original", "probabilities", "error")  # read of a Refinement


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
        groups: one name a prompt, for the table by group; None for a prompt of no group.
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

    >>> from pfm import Refinement
    >>> texts = ["no", "Yes, please!"]
    >>> chosen = {"text": texts[1], "original": texts[0], "candidates": texts, "index": 1, "changed": True}
    >>> judged = {"win_probability": 0.7, "probabilities": [0.3, 0.7], "reason": "", "seconds": 0.0, "calls": 2}
    >>> records = [Refinement(prompt=f"Ask {n}", **chosen, **judged) for n in range(20)]
    >>> report = evaluate(records, judge=lambda prompt, responses: [len(text) for text in responses], progress=False)
    >>> {row.name: row.win.value for row in report.rows}
    {'identity': 0.5, 'random': 0.75, 'longest': 1.0, 'pfm': 1.0, 'oracle': 1.0}
    """
    seed = check_seed(seed)
    if (judge is None) == (scores is None):
        raise ValueError("give either judge or scores, one of the two")
    refiner = refiner_or_records if hasattr(refiner_or_records, "batch") else None
    prompts_or_records = _checked_source(refiner_or_records, refiner, prompts)
    if scores is not None and refiner is not None:
        raise ValueError("scores needs records whose candidates are known; with a refiner give judge")
    for name, column in (("scores", scores), ("groups", groups)):
        if column is not None:
            check_length(name, column, len(prompts_or_records), "prompt")
    vector, computed, left_out = _wanted_baselines(methods, training, encoder)
    reasoning = checked_reasoning(getattr(refiner, "reasoning", "strip") if reasoning is None else reasoning)

    records = prompts_or_records if refiner is None else list(refiner.batch(prompts_or_records, progress=progress))
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
                group=None if groups is None or groups[number] is None else str(groups[number]),
            )
        )
    if vector and training is not None:
        for name, picks in _vector_picks(vector, training, encoder, rows, progress).items():
            for row, pick in zip(rows, picks, strict=True):
                row.picks[name] = pick
    report = Report.from_scored(
        rows,
        baselines=computed,
        failures=failures,
        settings={"judge": _name_of(judge) if judge else "scores given by the caller", "left_out": left_out},
        resamples=resamples,
        seed=seed,
    )
    if getattr(judge, "sure", 1.0) < 1:
        report.verdict.warnings.append(
            "The judge leaves pairs to a preference model where that is sure: figures flatter any flow that shares it. "
            "Use sure=1."
        )
    return report


def _checked_source(source: Any, refiner: Any, prompts: Sequence[Prompt] | None) -> list[Any]:
    """Return the prompts for a refiner, or the records."""
    if refiner is not None:
        if prompts is None:
            raise ValueError("a refiner needs prompts: evaluate(refiner, prompts, judge=...)")
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a sequence of one prompt or more: got {prompts!r:.80}")
        return list(prompts)
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise TypeError(
            f"refiner_or_records must be a Refiner or a sequence of Refinement: got {type(source).__name__}"
        )
    if prompts is not None:
        raise ValueError("prompts goes with a refiner; records carry their own")
    if not source:
        raise ValueError("records is empty: nothing to evaluate")
    for number, record in enumerate(source):
        missing = [name for name in RECORD if not hasattr(record, name)]
        if missing:
            raise TypeError(
                f"record {number} must be a Refinement: got {type(record).__name__} without {', '.join(missing)}"
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
        raise ValueError(f"methods holds {names}: give training and encoder as well")
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
        left_out.append(f"{what}: the generator repeats its first draw when called again")
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
    except (TypeError, ValueError, OverflowError) as error:
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
    # Both are linear in an output: within a prompt its context cancels, and is not encoded.
    models = {"mean_shift": MeanShift, "bradley_terry": BradleyTerry}
    ends = np.cumsum([len(row.candidates) for row in rows])[:-1]
    picks = {}
    for name in names:
        rewards = models[name]().fit(training).reward(outputs).detach().cpu().numpy()
        picks[name] = [int(part.argmax()) for part in np.split(rewards, ends)]
    return picks


def _name_of(judge: Any) -> str:
    return str(getattr(judge, "name", None) or getattr(judge, "__qualname__", None) or type(judge).__name__)

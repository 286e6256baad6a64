"""``pfm evaluate``: how much better the flow's picks are, by scores that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pfm.cli.rows import PromptKey, checked_row, find_reader, numbered_rows
from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import (
    BadRowsOption,
    EncoderOfFlow,
    FlowFolder,
    NoProgress,
    OnBadRows,
    Reasoning,
    ReasoningOption,
    TrustEncoder,
    app,
    examples,
    load_flow,
)

__all__ = ["ScoredRow", "evaluate", "read_scored"]

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs
    from pfm.encoders import Encoder
    from pfm.evaluation.report import Report
    from pfm.refiner import Refinement


@app.command(
    epilog=examples(
        "pfm evaluate scored.jsonl --flow flow/ --pairs pairs.jsonl --html report.html",
        "pfm evaluate scored.jsonl --flow flow/ --json-file report.json",
        "pfm evaluate scored.jsonl --flow flow/ --json | jq .verdict.outcome",
    )
)
def evaluate(
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt, candidates (the original first) and scores, one per candidate, higher is better; "
            "optional: group, and independent_score, that of a further draw. Results of [cyan]pfm refine[/cyan] "
            "carry such columns along.",
            show_default=False,
        ),
    ],
    flow: FlowFolder,
    pairs: Annotated[
        Path | None,
        typer.Option(help="The pairs that the flow was fitted on: for the baselines mean shift and Bradley–Terry."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report as a file of JSON.")] = None,
    reasoning: ReasoningOption = Reasoning.aside,
    prompt_key: PromptKey = "prompt",
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Evaluate the flow's picks by scores that it has not seen, against baselines."""
    with guarded(traceback, as_json) as session:
        fitted, with_encoder = load_flow(flow, encoder, trust_encoder)
        from pfm.data.pairs import PreferencePairs
        from pfm.refiner import wrap

        context = bool(fitted.metadata.get("context_dimension"))
        scored = read_scored(rows, on_bad_rows.value, prompted=context, prompt_key=prompt_key)
        training = None
        if pairs is not None:
            training = PreferencePairs.from_file(pairs, prompt_key=prompt_key or None, on_bad_rows=on_bad_rows.value)
        for path in (html, json_file):
            if path is not None:
                session.make_folder(path.parent)
        refiner = wrap(None, fitted, encoder=with_encoder, reasoning=reasoning.value)
        records = refiner.refine(
            [row.candidates for row in scored], [row.prompt for row in scored], progress=not no_progress
        )
        encoded = None
        if training is not None:
            encoded = training.encode(with_encoder, context=context, progress=not no_progress)
        report = _report(scored, records, encoded, with_encoder, reasoning.value, seed, not no_progress)
        report.settings["judge"] = f"column scores of {rows.name}"
        if training is not None:
            _warn_of_leaks(report, scored, training)
        session.show(report, html=html, json_file=json_file)


@dataclass(frozen=True)
class ScoredRow:
    """Holds one row: candidates with a score each; ``independent`` is that of a further draw."""

    prompt: Any
    candidates: list[str]
    scores: list[float]
    group: Any
    independent: float | None


def read_scored(path: Path, on_bad_rows: str, *, prompted: bool, prompt_key: str) -> list[ScoredRow]:
    """Read rows with candidates and scores.

    Raises:
        PreferenceDataError: a row is bad, unless ``on_bad_rows`` is "drop".
    """
    from pfm.data.errors import BadRows, PreferenceDataError

    unit = find_reader(path)[1]
    bad = BadRows(str(path), on_bad_rows)
    found: list[ScoredRow] = []
    for number, value in numbered_rows(path, bad, prompt_key):
        try:
            found.append(_scored_row(value, prompted))
        except PreferenceDataError as error:
            bad.meet(error, f"{unit} {number}")
    bad.finish(len(found))
    return found


def _scored_row(value: Any, prompted: bool) -> ScoredRow:
    from pfm.data.checks import checked_response, read_number, require
    from pfm.data.conversations import conversation_text
    from pfm.data.errors import PreferenceDataError
    from pfm.data.identity import given_group

    prompt, candidates = checked_row(value, False, prompted)
    texts = [conversation_text(checked_response(text, "candidates")) for text in candidates]
    scores = require(value, "scores")
    if not isinstance(scores, list | tuple) or len(scores) != len(texts) or not texts:
        found = f"{len(scores)} scores" if isinstance(scores, list | tuple) else repr(scores)
        raise PreferenceDataError(f"got {found} for {len(texts)} candidates; expected one a candidate", column="scores")
    further = value.get("independent_score")
    return ScoredRow(
        prompt,
        texts,
        [read_number(score, "scores") for score in scores],
        given_group(value.get("group")),
        None if further is None else read_number(further, "independent_score"),
    )


class _Recorded:
    """Stands for a refiner and a judge whose outputs, further draws and scores are already there."""

    def __init__(self, rows: Sequence[ScoredRow], records: Sequence[Refinement]) -> None:
        self.rows = rows
        self.records = records
        self._next = iter(rows)

    def batch(self, prompts: Sequence[Any], *, progress: bool) -> list[Refinement]:
        return list(self.records)

    def candidates(self, prompts: Sequence[Any], n: int) -> list[list[str]]:
        return [[] if row.independent is None else ["(a further draw)"] for row in self.rows]

    def judge(self, prompt: Any, responses: list[str]) -> list[float]:
        """Return the scores of the next row: rows are judged in order."""
        row = next(self._next)
        return row.scores if row.independent is None else [*row.scores, row.independent]


def _report(
    rows: Sequence[ScoredRow],
    records: Sequence[Refinement],
    training: EncodedPairs | None,
    encoder: Encoder,
    reasoning: str,
    seed: int,
    progress: bool,
) -> Report:
    from pfm.evaluation.evaluation import evaluate

    groups = [row.group for row in rows]
    options: dict[str, Any] = {
        "training": training,
        "encoder": None if training is None else encoder,
        "groups": groups,
        "reasoning": reasoning,
        "seed": seed,
        "progress": progress,
    }
    if all(row.independent is None for row in rows):
        return evaluate(list(records), scores=[row.scores for row in rows], **options)
    recorded = _Recorded(rows, records)
    return evaluate(recorded, [row.prompt for row in rows], judge=recorded.judge, **options)


def _warn_of_leaks(report: Report, rows: Sequence[ScoredRow], training: PreferencePairs) -> None:
    from pfm.data.conversations import conversation_text
    from pfm.data.identity import normal_form

    seen = set(map(normal_form, training.prompts))
    leaked = sum(normal_form(conversation_text(row.prompt)) in seen for row in rows)
    if leaked:
        report.verdict.warnings.append(
            f"{leaked} of {len(rows)} prompts are among the training pairs too: figures on prompts that were trained "
            "on flatter the flow and the fitted baselines."
        )

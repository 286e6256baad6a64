"""``pfm audit``: what any selector's picks are worth, and whether a simpler rule does as well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import BadRowsOption, NoProgress, OnBadRows, app, examples


@app.command(
    epilog=examples(
        "pfm audit runs.jsonl --selector verifier --html audit.html",
        "pfm audit picks.csv --selector pick --selector reward --scores judge --group task_id --cost dollars",
        "pfm audit candidates.parquet --selector b --encoder minilm+surface --json-file audit.json",
    )
)
def audit(
    rows: Annotated[
        Path,
        typer.Argument(
            help="JSONL, JSON, CSV or Parquet. A row is a prompt with lists (candidates, scores, and a list or a pick "
            "a selector), or one candidate with its score and the group that it belongs to.",
            show_default=False,
        ),
    ],
    selector: Annotated[
        list[str] | None,
        typer.Option(
            "--selector",
            "-s",
            help="Column of a selector's picks (an index from 0, the text, true and false) or of its scores, higher is "
            "better; may be repeated.",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(help="Column of the judge's scores, higher is better.", show_default="scores or score"),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(help="Column of the texts, for lengths and for --encoder.", show_default="the usual ones"),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Column that identifies the prompt.", show_default="group, else the prompt"),
    ] = None,
    prompt_key: Annotated[str, typer.Option(help="Column of the prompt.")] = "prompt",
    cost: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of which less is better: choosing the least is a rule to beat; may be repeated.",
            show_default="seconds, cost and tokens, where there are any",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder of the texts, for the baselines mean shift and Bradley–Terry, fitted on other "
            "prompts: surface, minilm+surface, ...",
            show_default="none: nothing is fitted",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the audit as one HTML page.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the audit as a file of JSON.")] = None,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap, the folds and the control.")] = 0,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Compare a selector's picks with simpler choices: random, first, longest, fastest, cheapest.

    Shows the share of the gap from a random candidate to the oracle that each closes, with 95% intervals over prompts,
    and whether the selector can be told apart from the strongest simple rule.
    """
    with guarded(traceback, as_json) as session:
        from pfm.evaluation.auditing.audit import audit as run

        for path in (html, json_file):
            if path is not None:
                session.make_folder(path.parent)
        try:
            found = run(
                rows,
                selector or [],
                scores=scores,
                prompt=prompt_key,
                group=group,
                candidates=candidates,
                costs=cost or None,
                encoder=encoder,
                on_bad_rows=on_bad_rows.value,
                seed=seed,
                progress=not no_progress,
            )
        except ValueError as error:
            if "no selector is named" in str(error):
                raise ValueError(str(error).replace("name the column", "name by --selector the column")) from None
            raise
        session.show(found, html=html, json_file=json_file)

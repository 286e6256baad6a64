"""``pfm calibrate``: learn from scored candidates when ``-n auto`` may stop drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pfm.cli.evaluate import read_scored
from pfm.cli.rows import PromptKey
from pfm.cli.session import Json, Session, Traceback, guarded
from pfm.cli.shell import (
    BadRowsOption,
    EncoderOfFlow,
    FlowFolder,
    OnBadRows,
    Reasoning,
    ReasoningOption,
    TrustEncoder,
    app,
    examples,
    fingerprint,
    load_flow,
)


@app.command(
    epilog=examples(
        "pfm calibrate scored.jsonl --flow flow/",
        "pfm calibrate scored.jsonl --flow flow/ -n 4 --max-n 12 --waves 1,1,2,4",
        "pfm refine prompts.jsonl --flow flow/ --out refined.jsonl --model qwen3 -n auto",
    )
)
def calibrate(
    rows: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt, candidates (independent draws, about 16 or more) and scores, one per candidate, "
            "higher is better; of prompts that the flow was not fitted on.",
            show_default=False,
        ),
    ],
    flow: FlowFolder,
    n: Annotated[int, typer.Option("-n", min=1, help="Fixed number of draws that the rule replaces.")] = 8,
    max_n: Annotated[int, typer.Option(min=1, help="Maximum number of draws.")] = 16,
    waves: Annotated[
        str, typer.Option(help="Draws per wave: one number, or the first waves, as 1,1,2,4, of which the last repeats.")
    ] = "2",
    loss: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the fixed number's gain to give up for fewer draws.")
    ] = 0.0,
    prompt_key: PromptKey = "prompt",
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    reasoning: ReasoningOption = Reasoning.aside,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the replays.")] = 0,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Learn from scored candidates of held-out prompts when drawing may stop, and write it beside the flow.

    Afterwards [cyan]pfm refine -n auto[/cyan] and [cyan]pfm serve -n auto[/cyan] draw in waves until the best candidate
    is good enough. Where held-out scores do not confirm that this is as good as the fixed number, that number is kept.
    """
    with guarded(traceback, as_json) as session:
        try:
            sizes = [int(size) for size in waves.split(",")]
        except ValueError:
            raise ValueError(f"--waves must be whole numbers, as 2 or 1,1,2,4; got {waves!r}") from None
        fitted, with_encoder = load_flow(flow, encoder, trust_encoder)
        from pfm.refiner import wrap

        context = bool(fitted.metadata.get("context_dimension"))
        scored = read_scored(rows, on_bad_rows.value, prompted=context, prompt_key=prompt_key)
        refiner = wrap(None, fitted, encoder=with_encoder, reasoning=reasoning.value)
        rule = refiner.calibrate(
            [row.candidates for row in scored], [row.prompt for row in scored], [row.scores for row in scored],
            n=n, max_n=max_n, waves=sizes, loss=loss, seed=seed,
        )  # fmt: skip
        path = rule.save(flow, flow=fingerprint(flow))
        _show(session, rule, path)


def _show(session: Session, rule: object, path: Path) -> None:
    from pfm.refiner import Stopping

    assert isinstance(rule, Stopping)
    evidence = rule.evidence
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    lines = [("held-out prompts", f"{evidence['prompts']:,}")]
    if "draws" in evidence:
        for name, key in ((f"gain of {rule.n} draws over one", "gain"), (f"auto minus {rule.n} draws", "difference")):
            value, low, high = evidence[key]
            lines.append((name, f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"))
        lines.append(("draws of auto", f"{evidence['draws']:.2f} on average, in {evidence['rounds']:.1f} waves"))
        lines.append(("price of a draw", f"{rule.price:.4f} in win probability"))
    for name, value in lines:
        table.add_row(name, Text(value, "bold"))
    session.out.print(table)
    session.wrote(path)
    if evidence["prompts_with_too_few_candidates"]:
        session.note(
            f"{evidence['prompts_with_too_few_candidates']:,} prompts with fewer than {rule.n} candidates left out"
        )
    if rule.refusal is not None:
        session.note(f"-n auto takes {rule.n} draws: {rule.refusal}")
    session.result({"rule": rule.to_dict(), "file": path})

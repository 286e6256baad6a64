"""``pfm fit``: fit a flow on preference pairs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.panel import Panel
from rich.text import Text

from pfm.cli.rows import PromptKey
from pfm.cli.session import Json, Session, Traceback, guarded
from pfm.cli.shell import (
    BadRowsOption,
    NoProgress,
    OnBadRows,
    Reasoning,
    ReasoningOption,
    app,
    examples,
    setting,
)

if TYPE_CHECKING:
    from pfm.data.encoded import EncodedPairs
    from pfm.data.pairs import PreferencePairs
    from pfm.flow.config import FlowConfig
    from pfm.flow.preference_flow import PreferenceFlow
    from pfm.statistics import Estimate


@app.command(
    epilog=examples(
        "pfm fit pairs.jsonl --out flow/",
        "pfm fit votes.csv --out flow/ --prompt-key question --on-bad-rows drop",
        "pfm fit pairs.parquet --out flow/ --encoder BAAI/bge-small-en-v1.5 --set sigma=0.1 --set epochs=50",
    )
)
def fit(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Rows with prompt, chosen, rejected: .jsonl, .json, .csv, .tsv or .parquet.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to save the flow to.", show_default=False)],
    encoder: Annotated[
        str,
        typer.Option(help="minilm, surface, a sentence-transformers name or folder, or several joined by +."),
    ] = "minilm+surface",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of pfm.FlowConfig; may be repeated."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts to measure the flow on, not to fit it; 0 for none.")
    ] = 0.1,
    prompt_key: PromptKey = "prompt",
    chosen_key: Annotated[str, typer.Option(help="Column of the better response.")] = "chosen",
    rejected_key: Annotated[str, typer.Option(help="Column of the other response.")] = "rejected",
    weight_key: Annotated[
        str | None, typer.Option(help="Column of the pair's weight.", show_default="weight, if there is one")
    ] = None,
    group_key: Annotated[str, typer.Option(help="Column of what belongs together beyond the prompt.")] = "group",
    max_pairs: Annotated[
        int | None, typer.Option(help="Draw at most so many pairs of the labelled completions of one prompt.")
    ] = None,
    reasoning: ReasoningOption = Reasoning.aside,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the fit.")] = 0,
    track: Annotated[
        Path | None, typer.Option(help="Append the losses of the fit to this file, as JSON lines.", show_default=False)
    ] = None,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Fit a flow on preference pairs, and measure it on prompts that it has not seen.

    Ctrl-C keeps what is done: run the same command again and it goes on from there.
    """
    with guarded(traceback, as_json) as session:
        config = _config(settings or [], seed)
        from pfm.data.pairs import PreferencePairs
        from pfm.encoders import encoder_from_name
        from pfm.flow.preference_flow import PreferenceFlow

        loaded = PreferencePairs.from_file(
            pairs,
            prompt_key=prompt_key or None,
            chosen_key=chosen_key,
            rejected_key=rejected_key,
            weight_key=weight_key,
            group_key=group_key,
            max_pairs_per_prompt=max_pairs,
            seed=seed,
            on_bad_rows=on_bad_rows.value,
        )
        summary = loaded.summary()
        session.out.print(summary)
        train, measured = _split(loaded, held_out, seed)
        with_name = encoder_from_name(encoder)
        checkpoint = session.make_folder(out) / ".checkpoint"
        session.kept = lambda: (
            f"The state of the training is in {checkpoint}; run the same command again to go on from there."
            if any(checkpoint.glob("*.safetensors"))
            else "What was encoded is in the embedding cache; run the same command again to go on."
        )
        how = {"reasoning": reasoning.value, "progress": not no_progress}
        encoded = train.encode(with_name, **how)
        held = None if measured is None else measured.encode(with_name, **how)
        flow = PreferenceFlow.fit(encoded, config, progress=not no_progress, checkpoint=checkpoint, tracker=track)
        flow.save_pretrained(out)
        shutil.rmtree(checkpoint, ignore_errors=True)
        right = _show_fit(session, flow, held, out)
        session.result(
            {
                "flow": out,
                "pairs": summary,
                "fit": flow.metadata,
                "guard_margin": flow.guard_margin,
                "held_out": held and {"accuracy": right, "pairs": len(held), "prompts": len(held.group.unique())},
            }
        )


def _config(settings: Sequence[str], seed: int) -> FlowConfig:
    from pfm.flow.config import FlowConfig

    switches = {item.name for item in fields(FlowConfig) if isinstance(item.default, bool)}
    return FlowConfig.from_dict({"seed": seed} | dict(setting(text, switches) for text in settings))


def _split(pairs: PreferencePairs, held_out: float, seed: int) -> tuple[PreferencePairs, PreferencePairs | None]:
    if held_out == 0:
        return pairs, None
    try:
        return pairs.split(held_out, seed)
    except ValueError as error:
        raise ValueError(f"{error}; --held-out 0 fits on all rows and measures nothing") from None


def _show_fit(session: Session, flow: PreferenceFlow, held: EncodedPairs | None, out: Path) -> Estimate | None:
    first, *rest = flow.summary().splitlines()
    session.out.print(Panel(Text("\n".join(line.strip() for line in rest)), title=Text(first), title_align="left"))
    right = None
    if held is not None:
        right = _held_out_accuracy(flow, held)
        session.out.print(
            Text.assemble(
                "Prompts held out: ",
                (right.text(percent=True), "bold"),
                f" of {len(held):,} pairs ordered rightly, 95% interval over {len(held.group.unique()):,} prompts "
                "(chance: 50%).",
            )
        )
        if right.low <= 0.5:
            session.note("on held-out prompts this flow does not differ from chance: more pairs, or cleaner ones, help")
    if flow.guard_margin == float("inf"):
        session.note("no gain in win probability was confirmed, so refining with this flow keeps every original")
    session.out.print(Text(f"saved to {out}", "dim"), soft_wrap=True)
    return right


def _held_out_accuracy(flow: PreferenceFlow, held: EncodedPairs) -> Estimate:
    """Return the weighted share of pairs whose order by b agrees with the label, ties half."""
    import torch

    from pfm.statistics import Bootstrap

    rows = held.gather(torch.arange(len(held)))
    gap = flow.win_probability(held.chosen, rows.context) - flow.win_probability(held.rejected, rows.context)
    right = 0.5 + 0.5 * (2 * rows.probability - 1) * gap.sign()
    names, member = held.group.unique(return_inverse=True)
    totals = [torch.zeros(len(names)).index_add_(0, member, part) for part in (right * rows.weight, rows.weight)]
    estimate = Bootstrap(len(names)).ratio(totals[0], totals[1])
    if estimate is None:
        raise ValueError("the held-out pairs have weight 0 in all: choose another --seed or --held-out")
    return estimate

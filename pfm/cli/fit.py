"""``pfm fit``: fit a flow on preference pairs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfm.cli.fitted import Origin, preference_line, replacement_note, show_fit
from pfm.cli.rows import PromptKey
from pfm.cli.session import Json, Traceback, guarded, several_processes
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
    from pfm.data.pairs import PreferencePairs
    from pfm.flow.config import FlowConfig


@app.command(
    epilog=examples(
        "pfm fit pairs.jsonl --out flow/",
        "pfm fit votes.csv --out flow/ --prompt-key question --on-bad-rows drop",
        "pfm fit pairs.parquet --out flow/ --encoder BAAI/bge-small-en-v1.5 --set sigma=0.1 --set epochs=50",
        "torchrun --nproc-per-node 2 -m pfm fit pairs.jsonl --out flow/",
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
        typer.Option(help="minilm, static, surface, a sentence-transformers name or folder, or several joined by +."),
    ] = "minilm+surface",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of pfm.FlowConfig; may be repeated."),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts that are held out to evaluate the flow; 0 for none.")
    ] = 0.1,
    prompt_key: PromptKey = "prompt",
    chosen_key: Annotated[str, typer.Option(help="Column of the chosen response.")] = "chosen",
    rejected_key: Annotated[str, typer.Option(help="Column of the rejected response.")] = "rejected",
    weight_key: Annotated[
        str | None, typer.Option(help="Column of the pair's weight.", show_default="weight, if there is one")
    ] = None,
    group_key: Annotated[str, typer.Option(help="Column of the group; a group is never split.")] = "group",
    max_pairs: Annotated[
        int | None, typer.Option(help="Maximum number of pairs from the labelled completions of one prompt.")
    ] = None,
    reasoning: ReasoningOption = Reasoning.aside,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of the fit.")] = 0,
    track: Annotated[
        Path | None, typer.Option(help="Append the losses of the fit to this file, as JSON lines.", show_default=False)
    ] = None,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Fit a flow on preference pairs, and measure it on prompts that it has not seen.

    Ctrl-C keeps what is done: run the same command again and it goes on from there.
    Under [cyan]torchrun[/cyan] several processes share the encoding and the training, and the first one writes.
    """
    with guarded(traceback, as_json) as session, several_processes(session) as processes:
        config = _config(settings or [], seed)
        from pfm.data.doubts import doubts
        from pfm.data.pairs import PreferencePairs
        from pfm.encoders import SplitEncoder, encoder_from_name
        from pfm.flow.preference_flow import PreferenceFlow
        from pfm.flow.storage import check_vacant

        check_vacant(out)
        with_name = SplitEncoder(encoder_from_name(encoder), processes)
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
        for doubt in doubts(loaded):
            session.note(doubt)
        _check_share(held_out)
        train, measured = _split(loaded, held_out, seed)
        origin = Origin.of(loaded, [config.to_dict(), encoder, held_out, seed, reasoning.value])
        note = replacement_note(out, origin)
        if note is not None:
            session.note(note)
        checkpoint = session.make_folder(out) / ".checkpoint"
        session.kept = lambda: (
            f"The state of the training is in {checkpoint}; run the same command again to go on from there."
            if any(checkpoint.glob("*.safetensors"))
            else "What was encoded is in the embedding cache; run the same command again to go on."
        )
        how = {"reasoning": reasoning.value, "progress": not no_progress}
        encoded = train.encode(with_name, **how)
        held = None if measured is None else measured.encode(with_name, **how)
        flow = PreferenceFlow.fit(
            encoded, config, progress=not no_progress, checkpoint=checkpoint, tracker=track, processes=processes
        )
        if not processes.first:
            return
        flow.metadata["fitted_from"] = origin.to_dict()
        flow.save_pretrained(out)
        shutil.rmtree(checkpoint, ignore_errors=True)
        prefers, warnings = "", []
        if reasoning is Reasoning.aside:  # as pfm explain reads outputs
            prefers, warnings = preference_line(flow, loaded, with_name.encoder, seed)
        right = show_fit(session, flow, held, prefers, out, pairs)
        for warning in warnings:
            session.note(warning)
        session.result(
            {
                "flow": out,
                "pairs": summary,
                "fit": flow.metadata,
                "guard_margin": flow.guard_margin,
                "prefers": prefers or None,
                "held_out": held and {"accuracy": right, "pairs": len(held), "prompts": len(held.group.unique())},
            }
        )


def _config(settings: Sequence[str], seed: int) -> FlowConfig:
    from pfm.flow.config import FlowConfig

    switches = {item.name for item in fields(FlowConfig) if isinstance(item.default, bool)}
    return FlowConfig.from_dict({"seed": seed} | dict(setting(text, switches) for text in settings))


def _check_share(held_out: float) -> None:
    if not 0 <= held_out < 1:
        percent = f", as {held_out / 100:g} for {held_out:g}%" if 1 <= held_out < 100 else ""
        raise ValueError(f"--held-out must be a share of the prompts, from 0 to below 1{percent}: got {held_out:g}")


def _split(pairs: PreferencePairs, held_out: float, seed: int) -> tuple[PreferencePairs, PreferencePairs | None]:
    if held_out == 0:
        return pairs, None
    try:
        return pairs.split(held_out, seed)
    except ValueError as error:
        raise ValueError(f"{error}; --held-out 0 fits on all rows and measures nothing") from None

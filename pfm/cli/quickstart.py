"""``pfm quickstart``: the main job on data that ships with the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pfm.cli.session import Json, Traceback, guarded
from pfm.cli.shell import NoProgress, app, examples


@app.command(epilog=examples("pfm quickstart", "pfm quickstart --out try/ --seed 1"))
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write report and flow to.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    no_progress: NoProgress = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Fit, refine and evaluate on data that ships with the package.

    It needs no network, no key and no data, and takes about two minutes on two cores.
    """
    with guarded(traceback, as_json) as session:
        from huggingface_hub import constants

        # Set for libraries still to be imported, and in the one that is: the run must not depend on the network.
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        from pfm.quickstart import run

        session.kept = lambda: "What was encoded is in the embedding cache: a second run is faster."
        report = run(out, seed, session.out, not no_progress)
        session.result({**report.to_dict(), "files": [out / "report.html", out / "report.json"], "flow": out / "flow"})

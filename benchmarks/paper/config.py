"""The settings of ``task=paper``."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.core.config import TaskConfig

__all__ = ["METHODS", "TASKS", "PaperConfig"]


@dataclass
class PaperConfig(TaskConfig):
    """Run the paper's three experiments, each a sweep of its own, and write one page of what they found.

    experiments: sweeps of ``conf/experiment`` whose figures the page shows; of others it says that they are missing.
    folder: of the runs, one folder below for each sweep. sweep: False only reads the runs that are there.
    overrides: arguments of a sweep by its name, such as {mnist: ["task=digits", "seed=0"]}.
    autoencoder: folder of the text experiment's, which is trained with that many ``updates``, and its decoder again
    with that many of ``writer``, where that was not done.
    page: the file to write; an HTML page and pictures are written beside it.
    """

    experiments: list[str] = field(default_factory=lambda: ["pbrl", "mnist", "imdb"])
    folder: str = "runs"
    sweep: bool = True
    overrides: dict[str, list[str]] = field(default_factory=dict)
    autoencoder: str = "runs/autoencoder"
    updates: int = 7000
    writer: int = 3500
    page: str = "runs/paper/paper.md"


TASKS = {"paper": PaperConfig}
METHODS: dict[str, type] = {}

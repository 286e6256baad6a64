"""The command line, one module a command, as ``pfm fit`` and ``pfm explain``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 a defect (with its
traceback), 2 a mistake of the user or a lack of this machine (one line), 3 some rows could not be refined, 130
interrupted. What is heavy to import is imported by the command that needs it.
"""

from pfm.cli import fit, refine, evaluate, audit, calibrate, explain  # isort: skip  # the order of --help
from pfm.cli import label, serve, train_decoder, quickstart, demo, cache, doctor  # isort: skip
from pfm.cli.shell import app

__all__ = [
    "app",
    "audit",
    "cache",
    "calibrate",
    "demo",
    "doctor",
    "evaluate",
    "explain",
    "fit",
    "label",
    "main",
    "quickstart",
    "refine",
    "serve",
    "train_decoder",
]


def main() -> None:
    """Run the command line."""
    app()

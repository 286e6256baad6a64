"""Write one page of the three experiments of Preference Flow Matching (arXiv 2405.19806) from finished runs.

Puts their figures beside what is known of the paper's, and names what is missing and the command that makes it.
``python -m benchmarks experiment=paper`` runs the experiments as well.

    python -m benchmarks.paper runs/pbrl runs/mnist runs/imdb
    python -m benchmarks.paper runs/mnist --out page.md      # with page.html and pictures; the other two are missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.page import finished, page, save

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; those that do not exist are missing")
    parser.add_argument("--out", type=Path, help="file to write as well, with an HTML page and pictures beside it")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix == ".html":
        parser.error(f"--out is the page in Markdown, beside which the HTML page is written: got {options.out}")
    try:
        runs = finished(options.runs)
        print(page(runs) if options.out is None else save(runs, options.out))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train the text autoencoder that ``task=imdb`` moves sentences with. After Ctrl-C the same command resumes.

First all of it, then the decoder again: deeper, and with a share of the sentences without a latent, so that it is a
language model as well.

python -m benchmarks.text_autoencoder --out runs/autoencoder
python -m benchmarks.text_autoencoder --out runs/autoencoder --updates 2000 --writer 1000   # may change on the way
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.core.data import MissingDataError
from benchmarks.text_autoencoder.sentences import film_corpus
from benchmarks.text_autoencoder.training import train
from benchmarks.text_autoencoder.writer import train_writer

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print what was reached."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text_autoencoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), help="folder; default: runs/autoencoder")
    parser.add_argument(
        "--updates", type=int, default=7000, help="of 128 sentences, 0.5 CPU-seconds each; default: 7000"
    )
    parser.add_argument(
        "--writer", type=int, default=3500, help="updates of the decoder alone, 0.7 CPU-seconds each; default: 3500"
    )
    parser.add_argument("--threads", type=int, default=1, help="cores; default: 1")
    options = parser.parse_args(arguments)
    for name in ("updates", "writer", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1: got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    try:
        corpus = film_corpus()
        model = train(options.out, corpus, updates=options.updates)
        model = train_writer(options.out, model, corpus, updates=options.writer)
    except (MissingDataError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the state in {options.out}", file=sys.stderr)
        return 130
    for name, value in model.training.items():
        if not isinstance(value, dict):
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

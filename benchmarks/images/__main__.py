"""Train what ``task=mnist`` or ``task=digits`` needs, the judges and the generator, into the cache.

Runs do so by themselves; this command does it ahead of them. After Ctrl-C the same command resumes.

    python -m benchmarks.images mnist
    python -m benchmarks.images digits
    PFM_CACHE=/fast/disk python -m benchmarks.images mnist      # another folder than the user's cache
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.core.data import MissingDataError
from benchmarks.core.schemas import composed
from benchmarks.images.task import Images


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print what was reached."""
    from omegaconf import OmegaConf

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=("mnist", "digits"))
    options = parser.parse_args(arguments)
    config = OmegaConf.to_object(composed(f"task={options.task}", "method=images/reference").task)
    try:
        ready = Images(options.task, config, seed=0).prepared(progress=True)  # pyright: ignore[reportArgumentType]
    except (MissingDataError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    judges = ", ".join(f"{name} {share:.2%}" for name, share in ready.judges.accuracies.items())
    print(f"accuracy on real test images: {judges}")
    quality = ready.quality
    print(f"generator: {quality['updates']} updates, mean probability of the right digit {quality['quality']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

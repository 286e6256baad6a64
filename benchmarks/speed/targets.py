"""The targets: what the library's speed is held to, as ratios of processor time wherever a ratio can say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.clock import STEADY

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """A bound on a figure: at least ``low``, or at most ``high``.

    ``name`` is the figure's; ``what`` says in words what it is; ``race`` names the race that it comes from, if it comes
    from one. ``percent`` and ``unit`` tell how to write it.
    """

    name: str
    what: str
    low: float | None = None
    high: float | None = None
    race: str | None = None
    percent: bool = False
    unit: str = ""

    def verdict(self, figures: Mapping[str, Any]) -> str:
        """Judge figures, as metrics.json holds them: "met", "missed", "not steady" or "not measured here"."""
        figure, itself = figures.get(self.name), figures.get(f"{self.race}.itself")
        if figure is None:
            return "not measured here"
        if itself is not None and not STEADY[0] <= itself["value"] <= STEADY[1]:
            return "not steady"
        met = figure["value"] >= self.low if self.low is not None else figure["value"] <= (self.high or 0.0)
        return "met" if met else "missed"


def _training() -> list[Target]:
    found = []
    for batch, ratio, share, reduced in ((64, 1.5, 0.45, 1.8), (256, 1.1, 0.6, 2.0), (1024, 1.05, 0.7, 2.1)):
        of, what = f"training.{batch}", f"training step, batch {batch}"
        found += [
            Target(f"{of}.ratio", f"{what}, times torchcfm's matcher in a plain loop", ratio, race=of),
            Target(f"{of}.share", f"{what}, share of its bare fp32 matrix products", share, race=of),
            Target(
                f"{of}.reduced.ratio", f"{what}, reduced precision, times the same in fp32", reduced,
                race=f"{of}.reduced",
            ),
        ]  # fmt: skip
    return [*found, Target("training.reduced.loss", "validation loss, reduced precision over fp32", high=1.01)]


def _memory() -> list[Target]:
    return [
        Target(f"memory.{stage}.{kind}", f"peak memory {doing} the large set, {counted}", high=1.5, unit=" GB")
        for stage, doing in (("fit", "fitting"), ("refine", "refining"))
        for kind, counted in (("anonymous", "the process's own"), ("resident", "mapped pages included"))
    ]


def _cuda() -> list[Target]:
    found = [
        Target("cuda.training.1024.share", "CUDA: training step, batch 1024, share of its bare products", 0.5,
               race="cuda.training.1024"),
    ]  # fmt: skip
    for name, samples, error in (("tf32", 5e6, 7e-3), ("bfloat16", 10e6, 1e-2)):
        of, what = f"cuda.transport.{name}", f"CUDA: transport, {name}"
        found += [
            Target(f"{of}.samples", f"{what}, samples a second of 262,144 rows", samples, race=of),
            Target(f"{of}.error", f"{what}, error, of the distance moved", high=error),
            Target(f"{of}.pinned_share", f"{what}, rate from pinned CPU tensors over from CUDA tensors", 0.6, race=of),
            Target(f"{of}.milliseconds_64", f"{what}, a call of 64 rows", high=0.5, race=f"{of}.few", unit=" ms"),
        ]
    return [
        *found,
        Target("cuda.fit.20000.seconds", "CUDA: fit of 20,000 pairs", high=2.0, unit=" s"),
        Target("cuda.fit.200000.seconds", "CUDA: fit of 200,000 pairs", high=5.0, unit=" s"),
    ]


TARGETS = (
    *_training(),
    Target("transport.ratio", "transport, fp32, times dopri5(1e-4)", 4.5, race="transport"),
    Target("transport.error", "its error, of the distance moved", high=7e-3),
    Target("transport.reduced.ratio", "transport, reduced precision, times the same", 12.0, race="transport.reduced"),
    Target("transport.reduced.error", "its error, of the distance moved", high=1e-2),
    Target("distilled.ratio", "transport, distilled to one step, times the same", 25.0, race="transport"),
    Target("distilled.error", "its error, of the distance moved", high=3e-2),
    Target("alone.difference", "one row alone against in a batch, largest difference", high=1e-5),
    Target("feeding.small.share", "feeding 10,000 pairs, share of a step", high=0.05, race="feeding", percent=True),
    Target("feeding.large.share", "feeding the large set, share of a step", high=0.05, race="feeding", percent=True),
    *_memory(),
    Target("response.milliseconds", "own cost for a response, batches of 64", high=1.0, race="response", unit=" ms"),
    *_cuda(),
)

"""How often nothing is confirmed as something: python -m benchmarks.studies.confirmation [--parts test guard ...].

Everything here is fitted on coin labels or tested on values of mean zero; at one-sided 5%, one in twenty may be
confirmed. Beside it stands the power: the same with labels that tell something.

- test: :func:`pfm._internal.significance.confirmed` on G group totals, by group sizes and by the law of the values.
- guard: does the win head confirm an order of the held-out pairs?
- residual: is the field's network kept? Outputs are Gaussian and the source is the rejected output, so that with coin
  labels the closed-form part is the exact velocity and nothing is left to learn.
- preference: are the network and the planes of a HybridPreference kept?
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm._internal.significance import confirmed
from pfm.flow.win import WinHead
from pfm.preferences import HybridPreference

__all__ = ["PARTS", "main", "mean_rate", "pairs_of_prompts"]

LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda uniform: torch.special.ndtri(uniform),
    "signs": lambda uniform: (uniform < 0.5).double() * 2 - 1,
    "right-skewed": lambda uniform: -uniform.log() - 1,
    "left-skewed": lambda uniform: 1 + uniform.log(),
}
SIZES: dict[str, Callable[[int], Tensor]] = {
    "equal": lambda groups: torch.full((groups,), 4),
    "1 to G": lambda groups: torch.arange(1, groups + 1),
    "one of half": lambda groups: torch.tensor([groups, *[1] * (groups - 1)]),
}


def mean_rate(groups: int, sizes: str, law: str, *, mean: float = 0.0, repeats: int = 2000, seed: int = 0) -> float:
    """Return how often group means of a law, plus ``mean``, are confirmed to be above zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.repeat_interleave(torch.arange(groups), SIZES[sizes](groups))
    means = LAWS[law](torch.rand(repeats, groups, generator=generator, dtype=torch.float64)) + mean
    return sum(bool(confirmed(each[rows], rows)) for each in means) / repeats


def pairs_of_prompts(
    count: int, prompts: int, dimension: int, seed: int, *, signal: float = 0.0, contexts: bool = False
) -> EncodedPairs:
    """Draw Gaussian pairs, dealt to prompts, with labels of log-odds ``signal`` times the first coordinate's lead."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, dimension, generator=generator)
    group = torch.arange(count) % prompts
    odds = signal * (one - other)[:, 0]
    first = (torch.rand(count, generator=generator) < torch.sigmoid(odds))[:, None]
    context = torch.randn(prompts, 3, generator=generator)[group] if contexts else None
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), context, group=group)


def guard_rate(count: int, prompts: int, dimension: int, *, signal: float = 0.0, repeats: int = 100) -> float:
    """Return how often the win head's guard opens."""
    opened = 0
    for seed in range(repeats):
        head = WinHead(dimension, 0)
        head.fit(pairs_of_prompts(count, prompts, dimension, seed, signal=signal), seed=seed)
        opened += bool(torch.isfinite(head.margin))
    return opened / repeats


def residual_rate(count: int, *, dimension: int = 2, curved: bool = False, repeats: int = 100) -> float:
    """Return how often the residual is kept; ``curved`` gives it something to learn, targets that bend with y."""
    kept = 0
    for seed in range(repeats):
        pairs = pairs_of_prompts(count, count, dimension, seed)
        if curved:
            rejected = pairs.rejected
            pairs = EncodedPairs(rejected + torch.sin(3 * rejected), rejected)
        flow = PreferenceFlow.fit(pairs, FlowConfig(source="rejected", epochs=200, seed=seed), progress=False)
        kept += bool(flow.metadata["residual_kept"])
    return kept / repeats


def preference_rates(count: int, prompts: int, *, dimension: int = 8, repeats: int = 50) -> tuple[float, float]:
    """Return how often a HybridPreference keeps its network, and how often planes."""
    labelled = (pairs_of_prompts(count, prompts, dimension, seed) for seed in range(repeats))
    found = [HybridPreference(seed=seed).fit(pairs).found for seed, pairs in enumerate(labelled)]
    return sum(each["network"] for each in found) / repeats, sum(each["planes"] > 0 for each in found) / repeats


def _tests(repeats: int) -> Iterator[str]:
    yield "groups | sizes | " + " | ".join(LAWS) + " | power at 1 sd, normal"
    for groups in (2, 3, 5, 10, 50):
        for sizes in SIZES:
            rates = [mean_rate(groups, sizes, law, repeats=40 * repeats) for law in LAWS]
            rates.append(mean_rate(groups, sizes, "normal", mean=1.0, repeats=10 * repeats))
            yield f"{groups} | {sizes} | " + " | ".join(f"{rate:.3f}" for rate in rates)


def _guards(repeats: int) -> Iterator[str]:
    yield "pairs | prompts | opened on coins | opened with a signal"
    for count, prompts in ((10, 10), (30, 5), (200, 10), (200, 200)):
        coins = guard_rate(count, prompts, 8, repeats=repeats)
        told = guard_rate(count, prompts, 8, signal=2.0, repeats=repeats // 5)
        yield f"{count} | {prompts} | {coins:.2f} | {told:.2f}"


def _residuals(repeats: int) -> Iterator[str]:
    yield "pairs | kept on coins | kept where the target bends"
    for count in (12, 20, 50, 200):
        coins, bent = residual_rate(count, repeats=repeats), residual_rate(count, curved=True, repeats=repeats // 5)
        yield f"{count} | {coins:.2f} | {bent:.2f}"


def _preferences(repeats: int) -> Iterator[str]:
    yield "pairs | prompts | network kept on coins | planes kept on coins"
    for count, prompts in ((100, 10), (200, 10), (200, 200), (1000, 50)):
        network, planes = preference_rates(count, prompts, repeats=max(1, repeats // 2))
        yield f"{count} | {prompts} | {network:.2f} | {planes:.2f}"


PARTS: dict[str, Callable[[int], Iterator[str]]] = {
    "test": _tests, "guard": _guards, "residual": _residuals, "preference": _preferences,
}  # fmt: skip


def main() -> None:
    """Print one table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=100, help="fits a row; tests take 40 times as many")
    options = parser.parse_args()
    for part in options.parts:
        print(f"\n{part}")
        for line in PARTS[part](options.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()

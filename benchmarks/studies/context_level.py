"""Is b one half on the mean of every context: python -m benchmarks.studies.context_level.

b(y|x) is the chance against an independent draw of the reference under x, so that its mean over the reference is one
half under every context, whatever the preference. Here the reference's mean differs between contexts by more than it
varies within them; a preference model is fitted on pairs of all contexts, and b is measured on fresh draws of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.encoders import SurfaceEncoder
from pfm.preferences import BradleyTerry, GeneralPreference, PreferenceModel

__all__ = ["KINDS", "main", "mean_of_b"]

KINDS = ("one-hot 20", "one-hot 100", "line", "curve", "vector", "text")
FRESH = 200  # draws a context


def contexts_of(kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return contexts (X, C), and the reference's mean under each, (X, 2)."""
    if kind.startswith("one-hot"):
        count = int(kind.split()[1])
        return torch.eye(count), 1.5 * torch.randn(count, 2, generator=generator)
    if kind == "text":  # longer prompts have other answers
        texts = [f"Write {'about rivers, towns and people ' * (n % 7)}number {n}." for n in range(60)]
        contexts = SurfaceEncoder().encode(texts, progress=False).float()
        length = torch.tensor([len(text) for text in texts]).float()
        return contexts, 1.5 * ((length - length.mean()) / length.std())[:, None].repeat(1, 2)
    width = 16 if kind == "vector" else 1
    contexts = torch.randn(400, width, generator=generator)
    shift = contexts[:, :1] if kind != "curve" else contexts[:, :1].square()
    return contexts, 1.5 * torch.cat([shift, -shift], dim=1)


def mean_of_b(kind: str, model: PreferenceModel, *, pairs: int = 2000, seed: int = 0) -> Tensor:
    """Return the mean of b over fresh reference draws under each of (at most 40) contexts."""
    generator = torch.Generator().manual_seed(seed)
    contexts, means = contexts_of(kind, generator)
    which = torch.randint(len(contexts), (pairs,), generator=generator)
    one, other = means[which] + torch.randn(2, pairs, 2, generator=generator)
    first = (torch.rand(pairs, generator=generator) < torch.sigmoid(2 * (one - other)[:, 0]))[:, None]
    encoded = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), contexts[which])
    flow = PreferenceFlow.fit(encoded, FlowConfig(residual=False), preference=model, progress=False)
    shown = torch.arange(len(contexts))[:40]
    rows = shown.repeat_interleave(FRESH)
    fresh = means[rows] + torch.randn(len(rows), 2, generator=generator)
    return flow.win_probability(fresh, contexts[rows]).view(len(shown), FRESH).mean(1)


def main() -> None:
    """Print the lowest and the highest mean and the root mean square departure, by kind of context and of model."""
    print("contexts | model | lowest | highest | root mean square departure from ½")
    for kind in KINDS:
        for name, model in (("BradleyTerry", BradleyTerry(1e-3)), ("GeneralPreference", GeneralPreference(hidden=0))):
            means = mean_of_b(kind, model)
            departure = float((means - 0.5).square().mean().sqrt())
            print(
                f"{kind} | {name} | {float(means.min()):.2f} | {float(means.max()):.2f} | {departure:.3f}", flush=True
            )


if __name__ == "__main__":
    main()

"""Where each method moves the sentences' latents, setting by setting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.text_editing.moves import ascent, preference_pairs, shift
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.preferences import BradleyTerry

__all__ = ["CONTROLS", "FAMILIES", "Moves", "encode_decode", "family_of", "preferred_subspace"]

STRENGTHS = (1.0, 2.0, 3.0, 4.0)
SUBSPACE_STRENGTHS = (2.0, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 16.0)
WIN_GRADIENTS = (32.0, 64.0, 96.0, 128.0, 512.0)
SUBSPACE = 8  # dimensions
SHIFTS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 32.0)
FAMILIES = (
    "flow best of 2",
    "flow best of 8",
    "flow rejected source",
    "flow in a subspace",
    "flow and gradient of b",
    "gradient ascent on b",
    "mean shift",
    "best of draws",
)
CONTROLS = (
    "encode and decode",
    "permuted displacements",
    "shuffled labels",
    "swapped labels",
    "shuffled labels, subspace",
)
encode_decode = CONTROLS[0]


def family_of(setting: str) -> str:
    """Return the family or control of a setting: its name up to the colon."""
    return setting.partition(":")[0]


class Moves:
    """Fits what moves latents on preferences, and moves latents by every setting of every method and control.

    b of all flows, and the scores of the sets of eight, are those of a linear Bradley–Terry reward on the latents.

    Args:
        z: (N, D) unit latents. scores: (N,) of the labelling judge.
        settings: of the flows. seed: of the pairs, the fits and the permutation.
    """

    def __init__(self, z: Tensor, scores: Tensor, settings: FlowConfig, seed: int) -> None:
        self.seed = seed
        self.pairs = preference_pairs(z, scores, seed, sets=False)
        self.flows: dict[str, PreferenceFlow] = {}
        self.bases: dict[str, Tensor] = {}
        shuffled = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(1000 + seed))]
        for labels, own in (("", scores), ("shuffled ", shuffled), ("swapped ", -scores)):
            pairs = preference_pairs(z, own, seed, sets=True)
            reward = BradleyTerry().fit(pairs)

            def fit(name: str, pairs: EncodedPairs, reward: BradleyTerry, **changes: Any) -> None:
                config = settings.replace(seed=seed, **changes)
                self.flows[name] = PreferenceFlow.fit(pairs, config, progress=False, preference=reward)

            fit(f"{labels}best of 8", pairs, reward, best_of=8)
            if labels == "":
                fit("best of 2", pairs, reward)
                fit("rejected source", pairs, reward, source="rejected")
            if labels != "swapped ":
                basis = self.bases[f"{labels}subspace"] = preferred_subspace(pairs)
                inner = preference_pairs(z @ basis, own, seed, sets=True)
                fit(f"{labels}subspace", inner, BradleyTerry().fit(inner), best_of=8)

    def __call__(self, z: Tensor) -> dict[str, Tensor]:
        """Return the unit vectors (N, D) that each setting moves unit latents z (N, D) to."""
        flows, found = self.flows, {encode_decode: z}
        for name in ("best of 2", "best of 8", "rejected source"):
            for strength in STRENGTHS:
                found[f"flow {name}: x{strength:g}"] = flows[name].transport(z, strength=strength)
        for strength in SUBSPACE_STRENGTHS:
            found[f"flow in a subspace: x{strength:g}"] = self._within("subspace", z, strength)
        for slope in WIN_GRADIENTS:
            found[f"flow and gradient of b: {slope:g}"] = flows["best of 2"].transport(z, win_gradient=slope)
        for length, y in ascent(lambda rows: flows["best of 2"].win(rows, None), z).items():
            found[f"gradient ascent on b: {length:g}"] = y
        direction = shift(self.pairs)
        for strength in SHIFTS:
            found[f"mean shift: x{strength:g}"] = z + strength * direction
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(self.seed))
        for strength in (2.0, 4.0):
            displacement = flows["best of 8"].transport(z, strength=strength) - z
            found[f"permuted displacements: x{strength:g}"] = z + displacement[order]
            found[f"shuffled labels: x{strength:g}"] = flows["shuffled best of 8"].transport(z, strength=strength)
            found[f"swapped labels: x{strength:g}"] = flows["swapped best of 8"].transport(z, strength=strength)
        found["shuffled labels, subspace: x16"] = self._within("shuffled subspace", z, 16.0)
        return {name: normalize(y, dim=1) for name, y in found.items()}

    def _within(self, name: str, z: Tensor, strength: float) -> Tensor:
        """Move only the part of z that lies in the subspace."""
        inner = z @ self.bases[name]
        return z + (self.flows[name].transport(inner, strength=strength) - inner) @ self.bases[name].T


def preferred_subspace(pairs: EncodedPairs, size: int = SUBSPACE) -> Tensor:
    """Return an orthonormal basis (D, size) of how winners and losers differ in their first two moments.

    The first direction is E[y+ - y-]; the others are eigenvectors of cov(y+) - cov(y-), largest absolute eigenvalues
    first.
    """
    mean = shift(pairs)
    difference = torch.cov(pairs.chosen.T) - torch.cov(pairs.rejected.T)
    values, vectors = torch.linalg.eigh(difference)
    order = values.abs().argsort(descending=True)[: size - 1]
    return torch.linalg.qr(torch.cat([mean[:, None], vectors[:, order]], 1))[0]

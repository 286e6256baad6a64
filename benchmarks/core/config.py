"""The settings of a run, as plain dataclasses: Hydra checks names and types of everything in ``conf/`` against them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import pfm
from pfm._internal.hub import check_folder

__all__ = [
    "METHODS",
    "TASKS",
    "AlpacaConfig",
    "ArgumentsConfig",
    "AscentConfig",
    "BestOfConfig",
    "BradleyTerryConfig",
    "CaptionsConfig",
    "DPOConfig",
    "FlowMethodConfig",
    "GPOConfig",
    "LawConfig",
    "MRPOConfig",
    "MethodConfig",
    "PolicyConfig",
    "RLHFConfig",
    "RegressionConfig",
    "RobustConfig",
    "RobustFlowConfig",
    "RunConfig",
    "SPPOConfig",
    "ShiftConfig",
    "SpeedConfig",
    "TaskConfig",
    "TransportConfig",
    "at_most_asked",
    "cores",
]


# -- tasks ------------------------------------------------------------------------------------------------------


@dataclass
class TaskConfig:
    """Names a module of :mod:`benchmarks.tasks`.

    ``limit`` keeps so many prompts only, for a quick look; None keeps all.
    """

    name: str = MISSING
    limit: int | None = None


@dataclass
class ChoiceConfig(TaskConfig):
    """Sets how candidates are drawn.

    ``candidates`` a test item, one of which is the original; ``draws`` items a test prompt; ``test_share`` of the
    prompts is tested on.
    """

    candidates: int = 8
    draws: int = 1
    test_share: float = 1 / 3


@dataclass
class AlpacaConfig(ChoiceConfig):
    """Refine the answers of the weakest generators; ``generators`` says how many of them."""

    generators: int = 10


@dataclass
class ArgumentsConfig(ChoiceConfig):
    """Refine arguments of debates that training has not seen."""


@dataclass
class CaptionsConfig(ChoiceConfig):
    """Refine captions of contests that training has not seen.

    ``min_ratings`` a caption must have; ``captions`` so many of a contest, drawn alike for every seed so that the
    embeddings of one serve all; ``pairs`` of a training contest.
    """

    min_ratings: int = 20
    captions: int = 1500
    pairs: int = 1500


@dataclass
class LawConfig(TaskConfig):
    """Move draws of a reference towards distributions that are known exactly.

    ``pairs`` to learn from (``limit`` keeps so many of them). Every figure is a mean over ``draws`` sets of
    ``samples`` outputs each; distances between laws over every one of them with each of ``draws`` sets of exact
    draws. ``directions`` of the sliced Wasserstein distance; ``energy_samples`` of each set for the energy distance,
    whose cost is their square.
    """

    pairs: int = 50_000
    draws: int = 10
    samples: int = 8000
    directions: int = 128
    energy_samples: int = 1000


@dataclass
class SpeedConfig(TaskConfig):
    """Measure what training and transport cost.

    What is measured
        parts: of training, transport, feeding, memory, response, cuda. dimension: of outputs and of contexts.
        batches: rows a training step. hidden, layers: of the network. pairs to train on; ``large`` of the set that
        is fed from disk, and fitted for its memory.

    How well
        A reading is the median of ``rounds`` ratios, each of turns of at least ``block`` seconds; so many ``readings``.
    """

    parts: list[str] = field(default_factory=lambda: ["training", "transport", "feeding", "memory", "response", "cuda"])
    dimension: int = 384
    batches: list[int] = field(default_factory=lambda: [64, 256, 1024])
    hidden: int = 512
    layers: int = 3
    pairs: int = 20_000
    large: int = 1_000_000
    block: float = 0.15
    rounds: int = 5
    readings: int = 8


# -- methods ----------------------------------------------------------------------------------------------------


@dataclass
class MethodConfig:
    """Names a method, the module of :mod:`benchmarks.methods` that makes it, and its label in tables."""

    name: str = MISSING
    family: str = MISSING
    label: str = MISSING


@dataclass
class BradleyTerryConfig(MethodConfig):
    """Choose by a linear Bradley–Terry reward with penalty ``l2``."""

    l2: float = 1e-4


@dataclass
class RobustConfig(MethodConfig):
    """Choose by a model of labels that :func:`pfm.preferences.noise.corrected` has corrected first.

    ``model``: "bradley_terry" with penalty ``l2``, or "memorising", a network that is trained until it knows its pairs.
    ``correction``: "estimated" finds the share of wrong labels, "known" is told it, "unbiased" is told it and takes the
    unbiased loss instead (linear model only), "none" corrects nothing.
    """

    model: str = "bradley_terry"
    correction: str = "estimated"
    l2: float = 1e-4


@dataclass
class FlowMethodConfig(MethodConfig):
    """Choose by a preference flow.

    ``by`` and ``margin`` are those of :func:`pfm.wrap`; ``labels`` is "given", or for the controls "shuffled" or
    "swapped"; ``flow`` holds the settings of :class:`pfm.FlowConfig`.
    """

    by: str = "win_probability"
    margin: float | None = None
    labels: str = "given"
    # A dict, since OmegaConf makes frozen dataclasses read-only; FlowConfig itself checks the values.
    flow: dict[str, Any] = field(default_factory=lambda: pfm.FlowConfig().to_dict())


@dataclass
class RobustFlowConfig(FlowMethodConfig):
    """Choose by a flow fitted on labels that were corrected first: ``correction`` "estimated", "known" or "none"."""

    correction: str = "estimated"


@dataclass
class TransportConfig(MethodConfig):
    """Move draws of a distribution by a preference flow.

    How it is fitted
        labels: "given", or for the controls "shuffled" or "swapped". rounds: with ``mode`` "relabel" that many flows,
        each on fresh labels of what the flows before it make of fresh reference draws. distill: into one evaluation.
        across: the control that joins pairs by minibatch optimal transport which ignores contexts.
        flow: the settings of :class:`pfm.FlowConfig`; ``best_of`` above 2, a power of two, learns from knock-out
        tournaments, for as many votes as there are pairs.

    How it is applied
        mode, strength, guidance, win_gradient, and with ``mode`` "reapply" rounds: of
        :meth:`pfm.PreferenceFlow.transport`.
    """

    labels: str = "given"
    mode: str = "single"
    rounds: int = 1
    strength: float = 1.0
    guidance: float = 1.0
    win_gradient: float = 0.0
    distill: bool = False
    across: bool = False
    flow: dict[str, Any] = field(default_factory=lambda: pfm.FlowConfig().to_dict())


# -- baselines that move draws of a distribution ----------------------------------------------------------------


@dataclass
class ShiftConfig(MethodConfig):
    """Add ``strength`` times a mean displacement.

    ``source`` "rejected": E[y+ - y-], from a rejected output to its chosen one, as the rejected source of a flow.
    "reference": E[y1 - y0], from a member of the pair picked by a fair coin to the winner: half as long.
    """

    source: str = "rejected"
    strength: float = 1.0


@dataclass
class RegressionConfig(MethodConfig):
    """Put the conditional mean E[chosen | rejected, context] in place of the draw; ``model``: "ridge", "network"."""

    model: str = "network"


@dataclass
class AscentConfig(MethodConfig):
    """Climb ``reward``: "win" is log b of the win head, "network" a Bradley–Terry network.

    ``off_support``: the largest share of held-out draws that the chosen steps may carry off the data.
    """

    reward: str = "win"
    off_support: float = 0.05


@dataclass
class BestOfConfig(MethodConfig):
    """Choose among ``candidates`` draws of the reference.

    ``by``: "bradley_terry" (linear), "network" (Bradley–Terry network), "win" (b of the win head), or "oracle" (the
    law's own reward; the candidates' round robin where it has none). ``rule``: "best", or "resample" with
    probability proportional to b, for ``by`` "win" only.
    """

    candidates: int = 2
    by: str = "bradley_terry"
    rule: str = "best"


@dataclass
class PolicyConfig(MethodConfig):
    """Train a policy with a likelihood, over the cells of a grid, on the pairs.

    ``policy``: "network" or "tabular". ``cells`` a side of the law's box, or "auto". ``beta``: the paper's; or None,
    and the policy is as strong as makes KL(pi || pi_ref) equal to ``divergence`` nats, or, with None for both, to
    the exact divergence of best of two, at which one pass of a flow aims.
    """

    policy: str = "network"
    cells: Any = "auto"
    beta: float | None = None
    divergence: float | None = None


@dataclass
class DPOConfig(PolicyConfig):
    """Train by ``loss``: "dpo", "ipo", "robust" or "conservative"; ``flip`` is the last two's share of wrong labels."""

    loss: str = "dpo"
    flip: float = 0.1


@dataclass
class GPOConfig(PolicyConfig):
    """Train by the loss f(beta rho) of a convex ``function``, one of :data:`benchmarks.methods.gpo.CONVEX`."""

    function: str = "logistic"


@dataclass
class RLHFConfig(PolicyConfig):
    """Learn a reward, then take the ``optimum``: "closed", or by policy "gradient"."""

    optimum: str = "closed"


@dataclass
class MRPOConfig(PolicyConfig):
    """Train against two references.

    ``share``: weight of the base reference. ``clip``: of the second one's log-probabilities, relative to the base's.
    ``tilt``: of the second one from the base, in nats a standard deviation.
    """

    share: float = 0.5
    clip: float = 0.1
    tilt: float = 0.5


@dataclass
class SPPOConfig(PolicyConfig):
    """Play against itself for ``rounds``, with as many votes each; the divergence is from the round before."""

    rounds: int = 1


TASKS = {"alpaca": AlpacaConfig, "arguments": ArgumentsConfig, "captions": CaptionsConfig, "law": LawConfig,
         "speed": SpeedConfig}  # fmt: skip
METHODS = {
    "plain": MethodConfig,
    "bradley_terry": BradleyTerryConfig,
    "flow": FlowMethodConfig,
    "robust": RobustConfig,
    "robust_flow": RobustFlowConfig,
    "transport": TransportConfig,
    "shift": ShiftConfig,
    "regression": RegressionConfig,
    "ascent": AscentConfig,
    "best_of": BestOfConfig,
    "dpo": DPOConfig,
    "gpo": GPOConfig,
    "rlhf": RLHFConfig,
    "mrpo": MRPOConfig,
    "sppo": SPPOConfig,
}


# -- a run ------------------------------------------------------------------------------------------------------


@dataclass
class RunConfig:
    """Says what to measure and how.

    What is measured
        task, method: see the classes above. seed: of the split, the draws and the fit.
        encoder: a name for :func:`pfm.encoders.encoder_from_name`, the same for all methods that read vectors.
        long_texts: "truncate" reads the beginning of a text, "chunk" all of it.
        flips: share of the training labels that are flipped at random; tasks of choices only.

    How it is run
        out: folder of the runs. threads: for computation, or "auto" for the cores divided by the number of runs at a
        time, but no more than ``OMP_NUM_THREADS`` if that is set. progress: show bars. force: run although ``out``
        holds the result. sweep: set by sweeps themselves.
    """

    task: TaskConfig = MISSING
    method: MethodConfig = MISSING
    seed: int = 0
    encoder: str = "minilm+surface"
    long_texts: str = "truncate"
    flips: float = 0.0

    out: str = MISSING
    threads: Any = "auto"
    progress: bool = True
    force: bool = False
    sweep: str | None = None

    def check(self) -> None:
        """Check what Hydra cannot.

        Raises:
            ValueError: the seed is negative, or the encoder a folder that is not there.
        """
        if self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0: got {self.seed}")
        for part in () if Path(self.encoder).is_dir() else self.encoder.split("+"):
            check_folder(part.strip(), "encoder")

    def settings(self) -> dict[str, Any]:
        """Return what determines the result, as JSON values."""
        measured = ("task", "method", "seed", "encoder", "long_texts")
        noise = {"flips": self.flips} if self.flips else {}  # a run without is the same as before there were any
        found = {name: value for name, value in asdict(self).items() if name in measured}
        later = (("task", "value"), ("method", "guidances"), ("method", "win_gradients"))
        for part, name in later:  # likewise of what came later and is not used
            if found[part].get(name, ...) is None:
                del found[part][name]
        return found | noise

    def key(self) -> str:
        """Return a short name of the settings: equal settings, equal key."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_most_asked(threads: int) -> int:
    """Bound a number of threads by ``OMP_NUM_THREADS``: who shares a machine with others has said so there."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(threads, int(asked)) if asked.isdigit() and int(asked) else threads

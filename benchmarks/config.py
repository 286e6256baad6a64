"""The settings of a run, as plain dataclasses: Hydra checks names and types of everything in ``conf/`` against them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import pfm

__all__ = [
    "AlpacaConfig",
    "ArgumentsConfig",
    "BradleyTerryConfig",
    "CaptionsConfig",
    "FlowMethodConfig",
    "MethodConfig",
    "RunConfig",
    "TaskConfig",
    "register",
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


# -- a run ------------------------------------------------------------------------------------------------------


@dataclass
class RunConfig:
    """Says what to measure and how.

    What is measured
        task, method: see the classes above. seed: of the split, the draws and the fit.
        encoder: a name for :func:`pfm.encoders.encoder_from_name`, the same for all methods that read vectors.
        long_texts: "truncate" reads the beginning of a text, "chunk" all of it.

    How it is run
        out: folder of the runs. threads: torch threads, or "auto" for the cores divided by ``jobs``, the number of
        runs at a time. progress: show bars. force: run although ``out`` holds the result.
    """

    task: TaskConfig = MISSING
    method: MethodConfig = MISSING
    seed: int = 0
    encoder: str = "minilm+surface"
    long_texts: str = "truncate"

    out: str = MISSING
    threads: Any = "auto"
    jobs: int = 1
    progress: bool = True
    force: bool = False

    def settings(self) -> dict[str, Any]:
        """Give what determines the result, as JSON values."""
        measured = ("task", "method", "seed", "encoder", "long_texts")
        return {name: value for name, value in asdict(self).items() if name in measured}

    def key(self) -> str:
        """Give a short name of the settings: equal settings, equal key."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:16]


def register() -> None:
    """Tell Hydra of the dataclasses; the files in ``conf/`` name them in their defaults."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    for name, node in {"alpaca": AlpacaConfig, "arguments": ArgumentsConfig, "captions": CaptionsConfig}.items():
        store.store(group="schema/task", name=name, node=node)
    for name, node in {"plain": MethodConfig, "bradley_terry": BradleyTerryConfig, "flow": FlowMethodConfig}.items():
        store.store(group="schema/method", name=name, node=node)

"""The training loop of writers: resumable, in bfloat16 on CUDA, with a schedule in steps or minutes."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pfm._internal.checks import check_number, check_whole
from pfm._internal.files import replace_file
from pfm.decoders.editing.drafts import COPY, CORRUPTED, KINDS, NEIGHBOUR, EditData
from pfm.decoders.editing.writer import Writer

__all__ = ["TrainingConfig", "train_writer"]

logger = logging.getLogger(__name__)

CHECKPOINT = "training.safetensors"
_SORTED = 16  # batches that are drawn and sorted by length together, so that little is padded
_TIMED = (20, 60)  # a run of so many minutes knows its number of updates by the time that these took
_HELD_OUT = 512
_LOGGED = 20  # updates between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class TrainingConfig:
    """Holds the settings of a training run.

    Args:
        steps: updates; None where ``minutes`` says how long.
        minutes: length of the run; the number of updates is set by the time that the first ones take, and kept when
            an interrupted run resumes.
        batch_size: edits an update.
        learning_rate: highest, after a warm-up of ``warmup`` of the run, before a cosine to 0.
        weight_decay, clip: of AdamW, and the greatest norm of a gradient.
        copy, neighbour: shares of the kinds of drafts; the rest is corrupted.
        noise: the points' noise is uniform in [0, noise], see :meth:`EditData.edits`.
        checkpoint_every: updates between two checkpoints.
        seed: of everything random.
    """

    steps: int | None = 2000
    minutes: float | None = None
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    copy: float = 0.25
    neighbour: float = 0.4
    noise: float = 0.5
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"give either steps or minutes: got steps={self.steps} and minutes={self.minutes}")
        for name in ("steps", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            check_whole(name, value, 1, also=(None,))
        for name in ("minutes", "learning_rate", "clip"):
            value = getattr(self, name)
            check_number(name, value, above=0, also=(None,))
        if not (min(self.copy, self.neighbour) >= 0 and self.copy + self.neighbour <= 1):
            raise ValueError(
                f"copy and neighbour must be shares of at most 1 in all: got {self.copy} and {self.neighbour}"
            )
        for name in ("warmup", "weight_decay", "noise"):
            value = getattr(self, name)
            check_number(name, value, least=0)


class _Batches:
    """Draws batches as a function of the seed and of the update's number alone, so that a run can be resumed."""

    def __init__(self, data: EditData, config: TrainingConfig, held_out: int) -> None:
        self.data, self.config = data, config
        self.targets = np.arange(held_out, len(data))
        self._pool = -1
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def get(self, step: int) -> tuple[Any, list[np.ndarray]]:
        """Return the edits and targets of an update."""
        pool, place = divmod(step, _SORTED)
        if pool != self._pool:
            self._pool, self._rows = pool, self._draw(pool)
        targets, drafts = self._rows[place]
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        noise = torch.rand(len(targets), 1, generator=generator) * self.config.noise
        return self.data.edits(targets.tolist(), drafts.tolist(), noise, generator)

    def _draw(self, pool: int) -> list[tuple[np.ndarray, np.ndarray]]:
        config, data = self.config, self.data
        rng = np.random.default_rng((config.seed, pool))
        targets = rng.choice(self.targets, config.batch_size * _SORTED)
        u = rng.random(len(targets))
        kinds = np.where(u < config.copy, COPY, np.where(u < config.copy + config.neighbour, NEIGHBOUR, CORRUPTED))
        drafts = np.array([data.draft(t, k, rng) for t, k in zip(targets.tolist(), kinds.tolist(), strict=True)])
        lengths = np.array([len(data.tokens[d]) + len(data.tokens[t]) for d, t in zip(drafts, targets, strict=True)])
        rows = np.argsort(lengths, kind="stable").reshape(_SORTED, -1)
        return [(targets[row], drafts[row]) for row in rows[rng.permutation(_SORTED)]]


def train_writer(
    writer: Writer,
    data: EditData,
    config: TrainingConfig | None = None,
    *,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a writer to say each sentence from its draft and its embedding.

    The loss is the mean negative log-likelihood of the targets' tokens. An interrupted run resumes from the
    last checkpoint in ``folder``, and ends with the same weights as one that was not.

    Args:
        writer: the network, on the device to train on; its ``trained()`` parameters are changed in place.
        data: drafts and targets; up to 512 targets, a tenth at most, are held out to measure the loss.
        config: settings.
        folder: of checkpoints, or None for none.
        progress: show a bar with the loss.

    Returns:
        What the run found, in JSON values: ``steps``, ``seconds``, ``tokens_per_second`` (drafts and targets),
        ``losses`` [[step, loss], ...], and ``held_out``, nats a token for each kind of draft.

    Raises:
        ValueError: the folder holds the checkpoint of another run, or the writer has another dimension.
        FloatingPointError: the loss is no longer finite.
    """
    config = config or TrainingConfig()
    if data.vectors.shape[1] != writer.dimension:
        raise ValueError(
            f"the writer takes vectors of dimension {writer.dimension}, and the data has {data.vectors.shape[1]}"
        )
    parameters = writer.trained()
    cuda = writer.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters.values(), config.learning_rate, weight_decay=config.weight_decay, fused=cuda or None
    )
    held_out = min(_HELD_OUT, len(data) // 10)
    batches = _Batches(data, config, held_out)
    run = {"config": asdict(config), "data": data.fingerprint(), "writer": [writer.kind, writer.settings()]}
    state: dict[str, Any] = {"step": 0, "steps": config.steps, "seconds": 0.0, "tokens": 0, "losses": []}
    path = None if folder is None else folder / CHECKPOINT
    if path is not None and path.is_file():
        state = _resume(path, run, parameters, optimizer)
        logger.info("going on from update %d", state["step"])
    began = mark = time.perf_counter() - state["seconds"]
    writer.train()
    bar = tqdm(total=state["steps"], initial=state["step"], desc="training", disable=not progress, unit="step")
    try:
        while state["steps"] is None or state["step"] < state["steps"]:
            step = state["step"]
            edits, targets = batches.get(step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, state["steps"], config.warmup)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda and writer.autocast):
                loss = -writer.log_probabilities(edits, targets).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip)
            optimizer.step()
            state["step"] = step + 1
            state["tokens"] += sum(map(len, edits.drafts)) + sum(map(len, targets))
            bar.update()
            saving = path is not None and state["step"] % config.checkpoint_every == 0
            if saving or state["step"] % _LOGGED == 0 or state["step"] == state["steps"]:
                _look(state, float(loss.detach()), began, bar)
            if state["steps"] is None and state["step"] == _TIMED[0]:
                mark = time.perf_counter()
            if state["steps"] is None and state["step"] == _TIMED[1]:
                state["steps"] = _planned(config, time.perf_counter() - began, time.perf_counter() - mark)
                bar.total = state["steps"]
            if path is not None and saving:  # looked at first: a loss that is not finite is never saved
                state["seconds"] = time.perf_counter() - began
                _save(path, run, state, parameters, optimizer)
    finally:
        bar.close()
        writer.eval()
    seconds = state["seconds"] = time.perf_counter() - began
    if path is not None:
        _save(path, run, state, parameters, optimizer)
    return {
        "steps": state["steps"],
        "seconds": round(seconds, 1),
        "tokens_per_second": round(state["tokens"] / seconds, 1),
        "losses": state["losses"],
        "held_out": held_out_losses(writer, data, held_out, config),
        "sentences": len(data),
        "dropped": data.dropped,
        "config": asdict(config),
    }


@torch.no_grad()
def held_out_losses(writer: Writer, data: EditData, count: int, config: TrainingConfig) -> dict[str, float]:
    """Return the mean negative log-likelihood a token of the first ``count`` targets, for each kind of draft."""
    found: dict[str, float] = {}
    cuda = writer.device.type == "cuda"
    for kind, name in enumerate(KINDS):
        rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        parts: list[Tensor] = []
        for start in range(0, count, config.batch_size):
            targets = list(range(start, min(count, start + config.batch_size)))
            drafts = [data.draft(target, kind, rng) for target in targets]
            edits, wanted = data.edits(targets, drafts, torch.full((len(targets), 1), config.noise / 2), generator)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda and writer.autocast):
                parts.append(-writer.log_probabilities(edits, wanted).float())
        if parts:
            found[name] = round(float(torch.cat(parts).mean()), 5)
    return found


def _schedule(step: int, steps: int | None, warmup: float) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine to 0."""
    if steps is None:  # the first updates of a run by minutes are its warm-up
        return min(1.0, (step + 1) / _TIMED[1])
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def _planned(config: TrainingConfig, elapsed: float, timed: float) -> int:
    """Return how many updates fit into the minutes; the very first ones are slow and are not timed."""
    assert config.minutes is not None
    each = timed / (_TIMED[1] - _TIMED[0])
    return _TIMED[1] + max(1, int((config.minutes * 60 - elapsed) / max(each, 1e-6)))


def _look(state: dict[str, Any], loss: float, began: float, bar: Any) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at update {state['step']}: lower the learning rate; the last checkpoint is sound"
        )
    state["losses"].append([state["step"], round(loss, 5)])
    rate = state["tokens"] / (time.perf_counter() - began)
    bar.set_postfix(loss=f"{loss:.3f}", tokens=f"{rate:,.0f}/s")


def _save(path: Path, run: dict[str, Any], state: dict[str, Any], parameters: dict[str, Any], optimizer: Any) -> None:
    from safetensors.torch import save_file

    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, part in optimizer.state[value].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(part).detach()
    whole = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
    described = {"run": json.dumps(run, sort_keys=True), "state": json.dumps(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda partial: save_file(whole, partial, metadata=described))


def _resume(path: Path, run: dict[str, Any], parameters: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            theirs, state = json.loads(described["run"]), json.loads(described["state"])
            ours = json.loads(json.dumps(run))
            for key, value in ours.items():
                if theirs.get(key) != value:
                    raise ValueError(
                        f"{path} belongs to another run: its {key} differs; give another folder, or remove it"
                    )
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(file.get_tensor(f"weight.{name}"))
                    keys = [key for key in file.keys() if key.endswith(f".{name}") and key.startswith("optimizer.")]  # noqa: SIM118
                    for key in keys:
                        field = key[len("optimizer.") : -len(name) - 1]
                        if "." not in field:
                            part = file.get_tensor(key)
                            optimizer.state[value][field] = part.to(
                                value.device if part.ndim or value.is_cuda else "cpu"
                            )
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start again") from error
    return state

"""The training loop of the residual field: batches, averaging, early stopping, checkpoints.

Conditional flow matching (Lipman et al. 2210.02747; on preferences, 2405.19806): minimise
E | v(t, y_t | x) - dy_t/dt |^2 with y_t = (1 - t) y_0 + t y_1 + sigma sin(pi t) eps, t uniform on [0, 1]. The noise
of this bridge (Albergo et al. 2303.08797) is zero at both ends: the flow carries the source distribution itself to the
target distribution itself, where noise of constant size would carry one blurred distribution to another. The linear
part of the field is fixed beforehand; the network learns what it leaves.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfm._internal.files import replace_file
from pfm._internal.optimizers import optimizer_state, optimizer_tensors
from pfm._internal.significance import confirmed, halves
from pfm.devices import new_generator
from pfm.flow.config import FlowConfig
from pfm.flow.couplings import Coupled, Coupling
from pfm.flow.cuda_graphs import Repeated
from pfm.flow.distributed import Processes, Share
from pfm.flow.fields import SMALL
from pfm.flow.problem import STRATA, FlowProblem, flow_matching_loss
from pfm.flow.streaming import streamed

__all__ = ["TrainingLog", "remove_checkpoint", "train_residual"]

CHECKPOINT = "training.safetensors"
VALIDATIONS = 40
VALIDATION_ROWS = 4096
BUDGET = 1e12  # multiply-adds of a run with epochs="auto"
TIMES_KEPT = 8  # updates at the same times there: interpolating the matrices costs as much as using them
FINGERPRINT_ROWS = 1024  # of the training data that a checkpoint knows them by
EMA_EVERY = 4  # updates between two steps of the average


@dataclass
class TrainingLog:
    """Holds the results of training; losses are mean squares in units of the displacement.

    ``plain_loss`` is the validation loss of the linear part alone, ``loss`` with the residual at its best.
    ``gain`` is the share of the residual that held-out prompts confirm (0: it was dropped) and ``z`` the z-score of its
    improvement over prompts (:func:`pfm._internal.significance.confirmed`).
    """

    updates: int = 0
    planned_updates: int = 0
    best_update: int = 0
    plain_loss: float = math.nan
    loss: float = math.nan
    gain: float = 0.0
    z: float = 0.0
    validation: list[tuple[int, float]] = field(default_factory=list)


def planned_updates(problem: FlowProblem, coupling: Coupling, config: FlowConfig) -> tuple[int, int]:
    """Return (updates, pairs an update) for the run."""
    items = max(1, min(config.batch_size // coupling.rows_per_item, len(coupling)))
    if problem.stratified:
        items = max(STRATA, items // STRATA * STRATA)
    an_epoch = math.ceil(len(coupling) / items)
    if config.epochs != "auto":
        return config.epochs * an_epoch, items
    assert problem.model.residual is not None
    affordable = int(BUDGET / (3 * problem.model.residual.multiply_adds * items * coupling.rows_per_item))
    # Two passes over many pairs may cost more, but not any price: a million pairs need not all be seen.
    return min(max(affordable, min(2 * an_epoch, 4 * affordable)), 400 * an_epoch), items


def train_residual(
    problem: FlowProblem,
    coupling: Coupling,
    validation: Coupling,
    config: FlowConfig,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
    on_validation: Callable[[int, float], object] | None = None,
    processes: Processes | None = None,
) -> TrainingLog:
    """Train the residual, keep the averaged weights that validated best, and set its gain.

    A run with a ``checkpoint`` folder saves its state at every validation and, started again with the same data
    and configuration, resumes there and gives the same result. The file remains: :func:`remove_checkpoint` removes it
    when what comes after the training is safe too.

    With ``processes`` each computes its share of every batch; the first validates, reads and writes the checkpoint, and
    calls ``on_validation``.
    """
    from tqdm.auto import tqdm

    model = problem.model
    network = model.residual
    if network is None:
        raise ValueError("the field has no residual to train")
    device = model.unit.device
    generator = torch.Generator().manual_seed(config.seed)
    updates, items = planned_updates(problem, coupling, config)
    processes = processes or Processes()
    share = Share(processes, items, problem.strata(items))
    held = _ValidationRows(problem, validation, config.seed)
    log = TrainingLog(planned_updates=updates)
    log.plain_loss = log.loss = held.loss(None)
    averaged = _Average(network, config.ema)
    small = problem.model.linear.matrices.shape[2] <= SMALL
    highest = (4e-3 if small else 2e-3) if config.learning_rate == "auto" else config.learning_rate
    # Elsewhere than on the CPU the rate is a tensor: a recorded update reads it, and Python numbers would be recorded.
    on_cpu = device.type == "cpu"
    rate: Any = highest if on_cpu else torch.full((), highest, dtype=torch.float32, device=device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, weight_decay=config.weight_decay, fused=True, capturable=not on_cpu
    )
    state = _State(network, averaged, optimizer, generator, log)
    state.keep_best()
    store = None
    if checkpoint is not None or processes.several:
        fingerprint = _fingerprint(problem, coupling, config, updates)
        processes.check_same("pairs and settings", fingerprint)
        store = None if checkpoint is None or not processes.first else _Checkpoint(checkpoint, fingerprint)
    if store is not None:
        store.load(state)
    if processes.several:
        state.restore(*processes.from_first(lambda: (state.tensors(), log)))
    every = max(1, updates // VALIDATIONS)
    order = _Order(len(coupling), items, config.seed, coupling.device)
    stale = _stale(log)
    network.train()
    called: Callable[..., Tensor] = torch.compile(network) if config.compile else network
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    kept = TIMES_KEPT if problem.stratified else 1

    def set_times() -> None:
        problem.at(problem.times(items, _generator(config.seed, ~(log.updates // kept)), device)[share.times])

    # On a device the noise is drawn there, afresh from every validation on: a resumed run draws the same.
    noise = generator if on_cpu else new_generator(device)
    if not on_cpu:
        noise.manual_seed(config.seed + log.updates)
    set_times()
    repeats = 0

    def update(source: Tensor, target: Tensor, context: Tensor | None, weight: Tensor, noise: Tensor | None):
        rows = problem.rows(Coupled(source, target, context, weight, repeats), noise)
        with half:
            predicted = called(rows.times, rows.y, rows.context, rows.repeats)
        loss = flow_matching_loss(predicted.float(), rows.target, weight)
        optimizer.zero_grad(set_to_none=True)
        if processes.several:
            (loss * share.of_all).backward()
            processes.add([each.grad for each in network.parameters() if each.grad is not None])
        else:
            loss.backward()
        optimizer.step()
        return ()

    if coupling.device == device:
        drawn = (coupling.draw(order.at(number), generator) for number in range(log.updates, updates))
    else:
        drawn = streamed(
            lambda number: coupling.draw(order.at(number), _generator(config.seed, number)),
            log.updates, updates, device,
        )  # fmt: skip
    repeated = update if processes.several else Repeated(update, device)  # messages are not recorded
    bar = tqdm(total=updates, initial=log.updates, desc="fit", unit="update", disable=not progress, leave=False)
    with contextlib.closing(drawn), bar, torch.enable_grad():
        while log.updates < updates and stale < config.patience:
            set_rate(optimizer, highest * _schedule(log.updates, updates))
            if log.updates % kept == 0:
                set_times()
            batch = next(drawn)
            repeats = batch.repeats
            batch, noises = share.of(batch, problem.noise(batch, noise))
            repeated(batch.source, batch.target, batch.context, batch.weight, noises)
            if log.updates % EMA_EVERY == 0:
                averaged.update(network)
            log.updates += 1
            bar.update()
            if log.updates % every == 0 or log.updates == updates:
                if not on_cpu:
                    noise.manual_seed(config.seed + log.updates)
                value, products = processes.from_first(lambda: held.judge(averaged.network))
                log.validation.append((log.updates, value))
                state.products.append(products)
                if value < log.loss:
                    log.loss, log.best_update = value, log.updates
                    state.keep_best()
                stale = _stale(log)
                bar.set_postfix(validation=f"{value:.4f}", linear=f"{log.plain_loss:.4f}")
                if store is not None:
                    store.save(state)
                if on_validation is not None and processes.first:
                    on_validation(log.updates, value)
    network.load_state_dict(processes.from_first(lambda: state.best))
    network.eval()
    log.gain, log.z = processes.from_first(lambda: held.confirmed_gain(network, state.products))
    if log.best_update == 0:  # never better than nothing: what is left is the start, which need not be zero
        log.gain = 0.0
    model.gain.fill_(log.gain)
    return log


def remove_checkpoint(folder: Path) -> None:
    """Remove the training state from ``folder``, and the folder if nothing else is in it."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _schedule(update: int, updates: int) -> float:
    warm = max(1, min(100, updates // 20))
    if update < warm:
        return (update + 1) / warm
    return (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm))) / 2


def _stale(log: TrainingLog) -> int:
    return sum(update > log.best_update for update, _ in log.validation)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update; called once before each, also of those that are replayed."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _Average:
    """Keeps an exponential moving average of a network's parameters, counted on the host."""

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self, network: torch.nn.Module) -> None:
        # Young averages forget the start faster: the first updates are far from where training ends.
        young = EMA_EVERY * self.count
        share = 1 - min(self.decay, (1 + young) / (10 + young)) ** EMA_EVERY if self.count else 1.0
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs, share)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):  # of a user's field
            mine.copy_(theirs)
        self.count += 1


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of one stretch of a run, the same when the run is taken up again."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class _Order:
    """Gives the pairs of each update: a fresh permutation an epoch, the same for the same seed and update.

    It is copied once an epoch to ``device``, where the pairs are.
    """

    def __init__(self, count: int, items: int, seed: int, device: torch.device) -> None:
        self.count, self.items, self.seed, self.device = count, items, seed, device
        self.an_epoch = max(1, math.ceil(count / items))
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long, device="cpu")

    def at(self, update: int) -> Tensor:
        epoch, place = divmod(update, self.an_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.count, generator=_generator(self.seed, epoch), device="cpu")
            self._permutation = order.to(self.device)
            self._epoch = epoch
        index = self._permutation[place * self.items : (place + 1) * self.items]
        if len(index) < self.items:  # the last batch is filled up from the epoch's beginning: equal shapes throughout
            index = torch.cat([index, self._permutation.repeat(1 + self.items // self.count)])[: self.items]
        return index


class _ValidationRows:
    """Holds fixed validation rows, times and noise, so that losses of different moments compare."""

    @torch.no_grad()
    def __init__(self, problem: FlowProblem, coupling: Coupling, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed + 1)
        device = problem.model.unit.device
        wanted = max(1, VALIDATION_ROWS // coupling.rows_per_item // STRATA) * STRATA
        order = torch.randperm(len(coupling), generator=generator, device="cpu")
        # Few pairs are looked at several times, at different times and noises.
        index = order.repeat(-(-wanted // len(order)))[:wanted]
        batch = coupling.draw(index, generator).to(device)
        problem.at(problem.times(len(index), generator, device))
        rows = problem.rows(batch, problem.noise(batch, generator))
        self.y, self.target, self.weight = rows.y, rows.target, batch.weight
        self.t, self.context = rows.each()
        self.group = coupling.group_of(index).repeat(batch.repeats)
        self.item = index.repeat(batch.repeats)

    @torch.no_grad()
    def loss(self, network: torch.nn.Module | None) -> float:
        """Return the loss of a network, or of predicting zero."""
        if network is not None:
            return self.judge(network)[0]
        return float(flow_matching_loss(torch.zeros_like(self.target), self.target, self.weight))

    @torch.no_grad()
    def judge(self, network: torch.nn.Module) -> tuple[float, Tensor]:
        """Return the loss of a network, and each row's mean of prediction * target and of prediction ** 2, (N, 2).

        From the latter follows what any multiple g of the prediction improves: g (2 p t - g p^2).
        """
        predicted = self._predict(network)
        products = torch.stack([(predicted * self.target).mean(1), predicted.square().mean(1)], dim=1)
        return float(flow_matching_loss(predicted, self.target, self.weight)), products.cpu()

    @torch.no_grad()
    def confirmed_gain(self, network: torch.nn.Module, products: Sequence[Tensor]) -> tuple[float, float]:
        """Return the best multiple in [0, 1] of the network's output and the z-score of its improvement.

        Which moment of the training is best, and its multiple, are chosen on one half of the prompts and judged on the
        other, from the ``products`` (N, 2) of every moment; the multiple is 0 if that is not an improvement.
        """
        weight = self.weight.double().cpu()
        none = torch.zeros(len(weight), 2, dtype=torch.float32, device="cpu")
        moments = torch.stack([none, *products]).double()  # before any update it predicts 0
        half = halves(self.group, self.item)
        improvement = torch.zeros_like(weight)
        for part in (half, ~half):
            sums = (moments[:, ~part] * weight[~part, None]).sum(1)
            best = int((2 * sums[:, 0] - sums[:, 1]).argmax())
            gain = _best_multiple(sums[best])
            improvement[part] = gain * (2 * moments[best, part, 0] - gain * moments[best, part, 1])
        found = confirmed(improvement, self.group, weight, unit=self.item)
        if not found:
            return 0.0, found.z
        return _best_multiple((self.judge(network)[1].double() * weight[:, None]).sum(0)), found.z

    def _predict(self, network: torch.nn.Module) -> Tensor:
        pieces = zip(self.t.split(1024), self.y.split(1024), _split(self.context, 1024, len(self.t)), strict=True)
        return torch.cat([network(t, y, context) for t, y, context in pieces])


def _split(context: Tensor | None, size: int, rows: int) -> list[Tensor | None]:
    if context is None:
        return [None] * -(-rows // size)
    return list(context.split(size))


def _best_multiple(sums: Tensor) -> float:
    """Return the multiple in [0, 1] that improves most, from the sums of prediction * target and of prediction ** 2."""
    product, square = sums.tolist()
    return min(max(product / square, 0.0), 1.0) if square > 0 else 0.0


@dataclass
class _State:
    """Holds all that a resumed run needs."""

    network: torch.nn.Module
    averaged: _Average
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    log: TrainingLog
    best: dict[str, Tensor] = field(default_factory=dict)
    products: list[Tensor] = field(default_factory=list)  # one a validation, see _ValidationRows.judge

    def keep_best(self) -> None:
        self.best = {name: value.detach().clone() for name, value in self.averaged.network.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        found |= {f"averaged.{name}": value for name, value in self.averaged.network.state_dict().items()}
        found["averages"] = torch.tensor(self.averaged.count)
        found |= {f"best.{name}": value for name, value in self.best.items()}
        found |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        found["generator"] = self.generator.get_state()
        if self.products:
            found["products"] = torch.stack(self.products)
        return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}

    def restore(self, tensors: dict[str, Tensor], log: TrainingLog) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.averaged.network.load_state_dict(part("averaged."))
        self.averaged.count = int(tensors["averages"])
        self.best = part("best.")
        self.optimizer.load_state_dict(optimizer_state(self.optimizer, part("optimizer.")))
        self.generator.set_state(tensors["generator"])
        self.products = list(tensors["products"]) if "products" in tensors else []
        self.log.__dict__.update(asdict(log))
        self.log.validation = [(int(update), float(loss)) for update, loss in log.validation]


class _Checkpoint:
    """Saves and loads the training state: one safetensors file, replaced atomically."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / CHECKPOINT
        self.fingerprint = fingerprint

    def save(self, state: _State) -> None:
        from safetensors.torch import save_file

        notes = {"fingerprint": self.fingerprint, "log": json.dumps(asdict(state.log))}
        replace_file(self.path, lambda path: save_file(state.tensors(), path, metadata=notes))

    def load(self, state: _State) -> None:
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = file.metadata() or {}
                if notes.get("fingerprint") != self.fingerprint:
                    raise ValueError(
                        f"checkpoint {self.path} belongs to other data or another configuration: "
                        "remove it, or give another folder"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"checkpoint {self.path} is damaged ({error}): remove it to start again") from error
        state.restore(tensors, TrainingLog(**json.loads(notes["log"])))


def _fingerprint(problem: FlowProblem, coupling: Coupling, config: FlowConfig, updates: int) -> str:
    # Values that are the same on every device: sums, as in the normaliser, are not to the last bit. Weights may be made
    # of sums, and are rounded.
    every = max(1, len(coupling) // FINGERPRINT_ROWS)
    some = coupling.draw(torch.arange(0, len(coupling), every, device="cpu"), torch.Generator().manual_seed(0))
    settings = {name: value for name, value in config.to_dict().items() if name != "device"}
    found = hashlib.sha256(json.dumps([settings, updates, len(coupling)]).encode())
    for tensor in (some.source, some.target, some.context, some.weight.half()):
        if tensor is not None:
            found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()

"""Speed: what the library's training and transport cost, held to the targets of :mod:`benchmarks.speed.targets`.

One thread, processor time, all sides of a comparison in one process. It needs no data; the comparison with torchcfm
needs the environment that ``make peers`` makes: ``.venv-peers/bin/python -m benchmarks experiment=speed``.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.config import SpeedConfig
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.speed.clock import Contestant, Race, device_clock, race
from benchmarks.speed.pairs import draw_pairs
from benchmarks.speed.response import refining
from benchmarks.speed.storage import feeding, peaks, stored_pairs
from benchmarks.speed.targets import TARGETS
from benchmarks.speed.training import PausedFit, bare_products, plain_loop, products_of_a_row
from benchmarks.speed.transport import Exact, adaptive, alone, repeated
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.statistics import Estimate

__all__ = ["SpeedTask", "load"]

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def load(config: SpeedConfig, seed: int) -> SpeedTask:
    """Make the task; the seed draws the pairs."""
    unknown = set(config.parts) - set(SpeedTask.parts())
    if unknown:
        raise ValueError(f"task.parts must be among {', '.join(SpeedTask.parts())}: got {', '.join(sorted(unknown))}")
    return SpeedTask(config, seed)


@dataclass
class SpeedTask:
    """Measures a preference flow's speed, part by part; its score is the share of the targets measured that are met."""

    config: SpeedConfig
    seed: int
    figures: dict[str, Estimate | None] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    flows: dict[str, PreferenceFlow] = field(default_factory=dict)

    @staticmethod
    def parts() -> tuple[str, ...]:
        """Name the parts there are."""
        return ("training", "transport", "feeding", "memory", "response", "cuda")

    def run(self, method: object, bench: Bench) -> Outcome:
        """Measure the flow that a method's configuration describes, at the sizes that the task's names.

        Raises:
            TypeError: the method is no preference flow.
        """
        settings = getattr(getattr(method, "config", None), "flow", None)
        if settings is None:
            raise UnsuitableMethodError(
                f"task=speed measures preference flows, which {type(method).__name__} is not: method=pfm"
            )
        torch.set_num_threads(1)
        self._base = FlowConfig.from_dict(dict(settings)).replace(
            hidden=self.config.hidden, layers=self.config.layers, device="cpu", dtype="float32"
        )
        self._progress = bench.progress
        self._pairs = draw_pairs(self.config.pairs, self.config.dimension, self.seed)
        self._held = draw_pairs(max(100, self.config.pairs // 10), self.config.dimension, self.seed + 1)
        took = {}
        for part in self.config.parts:
            began, before = time.perf_counter(), set(self.figures)
            getattr(self, f"_measure_{part}")()
            took[part] = round(time.perf_counter() - began, 1)
            found = {name: figure for name, figure in self.figures.items() if figure and name not in before}
            logger.info("%s: %s", part, ", ".join(f"{name} {figure.text()}" for name, figure in found.items()))
        figures = {name: None if figure is None else asdict(figure) for name, figure in self.figures.items()}
        verdicts = {target.name: target.verdict(figures) for target in TARGETS}
        judged = [verdict for verdict in verdicts.values() if verdict in ("met", "missed")]
        return Outcome(
            kind="speed",
            score=judged.count("met") / max(1, len(judged)),
            figures=self.figures,
            seconds=took,
            about={
                "processor": _processor(),
                "reduced_precision": _reduced_precision(),
                "torchcfm": _has_torchcfm(),
                "readings": self.config.readings,
                "rounds": self.config.rounds,
                "large": self.config.large,
                "verdicts": verdicts,
            },
            notes=self.notes,
            save=self._save,
        )

    # -- parts --------------------------------------------------------------------------------------------------

    def _measure_training(self) -> None:
        for batch in self.config.batches:
            found = self._training_race(f"training.{batch}", batch, self._base)
            self.notes[f"training.{batch}"] = _said(found)
        if _reduced_precision():
            for batch in self.config.batches:
                self._training_race(f"training.{batch}.reduced", batch, self._base, reduced=True)
            losses = [
                PreferenceFlow.fit(self._pairs, self._base.replace(dtype=dtype), self._held, self._progress)
                .metadata["training"]["loss"]
                for dtype in ("medium", "float32")
            ]  # fmt: skip
            self._add("training.reduced.loss", losses[0] / losses[1])

    def _training_race(self, name: str, batch: int, config: FlowConfig, *, reduced: bool = False) -> Race:
        sizes = (self.config.dimension, self.config.dimension, self.config.hidden, self.config.layers)
        precision = "medium" if reduced else "highest"
        with ExitStack() as stack:
            contestants: dict[str, Contestant] = {"products": bare_products(batch, *sizes, CPU)}
            for source in ("reference", "rejected"):
                fit = PausedFit(self._pairs, self._held, config.replace(batch_size=batch, source=source))
                contestants[source] = _at(precision, stack.enter_context(fit))
            if _has_torchcfm():
                contestants["torchcfm"] = plain_loop(self._pairs, batch, *sizes[2:], CPU)
            found = self._race(name, contestants, twin="torchcfm" if _has_torchcfm() else "products")
        ours = config.source
        other = "rejected" if ours == "reference" else "reference"
        if _has_torchcfm():
            self.figures[f"{name}.ratio"] = found.ratio("torchcfm", ours)
            self.figures[f"{name}.ratio_{other}"] = found.ratio("torchcfm", other)
            self.figures[f"{name}.share_torchcfm"] = found.ratio("products", "torchcfm")
        if not reduced:
            self.figures[f"{name}.share"] = found.ratio("products", ours)
        return found

    def _measure_transport(self) -> None:
        flow, (y, context) = self._flow(), self._fresh(1024)
        exact, public = Exact.of(flow, y, context), adaptive(flow, y, context)
        steps = flow.steps
        while exact.error(flow.transport(y, context, steps=steps)) > 7e-3 and steps < 128:
            steps += 1  # the tolerance was kept on other rows
        began = time.perf_counter()
        student = flow.distill(self._pairs, progress=self._progress)
        distilling = time.perf_counter() - began

        def ours() -> Tensor:
            return flow.transport(y, context, steps=steps)

        def one_step() -> Tensor:
            return student.transport(y, context)

        contestants = {"dopri5": repeated(public), "pfm": repeated(ours), "one step": repeated(one_step)}
        found = self._race("transport", contestants, twin="dopri5")
        self.figures["transport.ratio"] = found.ratio("dopri5", "pfm")
        self.figures["distilled.ratio"] = found.ratio("dopri5", "one step")
        self._add("transport.error", exact.error(ours()))
        self._add("transport.error_dopri5", exact.error(public()))
        self._add("distilled.error", exact.error(one_step()))
        self._add("alone.difference", alone(flow, y, context))
        self.notes["transport"] = _said(found) | {
            "steps": steps,
            "residual_kept": flow.metadata["residual_kept"],
            "relative_errors": {  # to the results' own size
                "dopri5": exact.relative_error(public()),
                "pfm": exact.relative_error(ours()),
                "one step": exact.relative_error(one_step()),
            },
            "distilling_seconds": round(distilling, 1),
        }
        if _reduced_precision():
            quick = {"dopri5": contestants["dopri5"], "pfm": _at("medium", repeated(ours))}
            reduced = self._race("transport.reduced", quick, twin="dopri5")
            self.figures["transport.reduced.ratio"] = reduced.ratio("dopri5", "pfm")
            torch.set_float32_matmul_precision("medium")
            self._add("transport.reduced.error", exact.error(ours()))
            torch.set_float32_matmul_precision("highest")

    def _measure_feeding(self) -> None:
        batch = 256
        with ExitStack() as stack:
            small, large = (
                EncodedPairs.load(stack.enter_context(stored_pairs(count, self.config.dimension, self.seed)))
                for count in (10_000, self.config.large)
            )
            step = stack.enter_context(PausedFit(self._pairs, self._held, self._base.replace(batch_size=batch)))
            contestants = {
                "small": feeding(small, batch, self._base.source),
                "large": feeding(large, batch, self._base.source),
                "step": step,
            }
            found = self._race("feeding", contestants, twin="small")
            for name in ("small", "large"):
                self.figures[f"feeding.{name}.share"] = found.ratio(name, "step")
            self.figures["feeding.growth"] = found.ratio("large", "small")
            self.notes["feeding"] = _said(found) | {"batch": batch}
            del small, large

    def _measure_memory(self) -> None:
        with stored_pairs(self.config.large, self.config.dimension, self.seed) as folder:
            found = peaks(folder, self._base.replace(epochs=1, batch_size=1024), rows=100_000)
        for stage in ("start", "fit", "refine"):
            for kind in ("anonymous", "resident"):
                self._add(f"memory.{stage}.{kind}", found[stage][kind])
        self.notes["memory"] = found

    def _measure_response(self) -> None:
        prompts = 64
        work = refining(self._flow(), prompts)
        found = self._race("response", {"refine": repeated(work)}, twin="refine")
        once = found.seconds["refine"] * 1000 / prompts
        readings = np.median(once, axis=1)
        self.figures["response.milliseconds"] = Estimate(
            float(np.median(readings)), float(readings.min()), float(readings.max())
        )

    def _measure_cuda(self) -> None:
        """Measure training and transport on CUDA: samples a second, and the share of the bare products' rate."""
        if not torch.cuda.is_available():
            self.notes["cuda"] = "no CUDA device"
            return
        device = torch.device("cuda")
        for batch in self.config.batches:
            self._cuda_training(batch, device)
        for dtype in ("auto", "bfloat16"):
            self._cuda_transport("tf32" if dtype == "auto" else dtype, dtype, device)
        self._cuda_fits()

    def _cuda_training(self, batch: int, device: torch.device) -> None:
        sizes = (self.config.dimension, self.config.dimension, self.config.hidden, self.config.layers)
        settings = self._base.replace(batch_size=batch, device="cuda", dtype="auto")
        torch.set_float32_matmul_precision("medium")
        with PausedFit(self._pairs, self._held, settings) as fit:
            contestants = {"pfm": fit, "products": bare_products(batch, *sizes, device)}
            if _has_torchcfm():
                contestants["torchcfm"] = plain_loop(self._pairs, batch, *sizes[2:], device)
            name = f"cuda.training.{batch}"
            found = self._race(name, contestants, twin="products", device=device)
        self.figures[f"{name}.share"] = found.ratio("products", "pfm")
        self.figures[f"{name}.samples"] = _times(found.units_a_second("pfm"), batch)
        self.figures[f"{name}.products_tflops"] = _times(
            found.units_a_second("products"), 2 * batch * products_of_a_row(*sizes) / 1e12
        )
        if _has_torchcfm():
            self.figures[f"{name}.ratio"] = found.ratio("torchcfm", "pfm")
        torch.set_float32_matmul_precision("highest")

    def _cuda_transport(self, name: str, dtype: str, device: torch.device) -> None:
        flow = copy.deepcopy(self._flow("cuda"))
        flow.config = flow.config.replace(dtype=dtype)
        y, context = (part.to(device) for part in self._fresh(262_144))
        exact = Exact.of(flow, y[:4096], context[:4096])
        self._add(f"cuda.transport.{name}.error", exact.error(flow.transport(y[:4096], context[:4096])))
        pinned = tuple(part.cpu().pin_memory() for part in (y, context))
        found = self._race(
            f"cuda.transport.{name}",
            {
                "resident": repeated(lambda: flow.transport(y, context)),
                "pinned": repeated(lambda: flow.transport(*pinned)),
            },
            twin="resident", device=device,
        )  # fmt: skip
        self.figures[f"cuda.transport.{name}.samples"] = _times(found.units_a_second("resident"), len(y))
        self.figures[f"cuda.transport.{name}.pinned_share"] = found.ratio("resident", "pinned")
        few = self._race(
            f"cuda.transport.{name}.few", {"pfm": repeated(lambda: flow.transport(y[:64], context[:64]))},
            twin="pfm", device=device,
        )  # fmt: skip
        calls = np.median(few.seconds["pfm"] * 1000, axis=1)
        self.figures[f"cuda.transport.{name}.milliseconds_64"] = Estimate(
            float(np.median(calls)), float(calls.min()), float(calls.max())
        )

    def _cuda_fits(self) -> None:
        """Time whole fits after one that warms up; few readings, for each is seconds long."""
        settings = self._base.replace(device="cuda", dtype="auto")
        PreferenceFlow.fit(self._pairs, settings, self._held, False)
        for count in (20_000, 200_000):
            pairs, seconds = draw_pairs(count, self.config.dimension, self.seed), []
            for _ in range(3):
                torch.cuda.synchronize()
                began = time.perf_counter()
                PreferenceFlow.fit(pairs, settings, self._held, False)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            self.figures[f"cuda.fit.{count}.seconds"] = Estimate(float(np.median(seconds)), min(seconds), max(seconds))

    # -- what they share ----------------------------------------------------------------------------------------

    def _race(self, name: str, contestants: Mapping[str, Contestant], *, twin: str, device: torch.device = CPU) -> Race:
        found = race(
            contestants, twin=twin, block=self.config.block, rounds=self.config.rounds,
            readings=self.config.readings, clock=device_clock(device),
        )  # fmt: skip
        self.figures[f"{name}.itself"] = found.itself
        self.seconds |= {f"{name}.{runner}": values for runner, values in found.seconds.items()}
        return found

    def _flow(self, device: str = "cpu") -> PreferenceFlow:
        if device not in self.flows:
            config = self._base.replace(tolerance=7e-3, device=device)
            self.flows[device] = PreferenceFlow.fit(self._pairs, config, self._held, self._progress)
        return self.flows[device]

    def _fresh(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw (y, context) of the reference: one member of each of so many pairs, by turns."""
        pairs = draw_pairs(count, self.config.dimension, self.seed + 2)
        assert pairs.context is not None
        first = torch.arange(count)[:, None] % 2 == 0
        return torch.where(first, pairs.chosen, pairs.rejected), pairs.context

    def _add(self, name: str, value: float) -> None:
        self.figures[name] = Estimate(value, value, value)

    def _save(self, path: Path) -> None:
        np.savez_compressed(path, **self.seconds)  # pyright: ignore[reportArgumentType]


def _at(precision: str, work: Contestant) -> Contestant:
    """Run a contestant at a precision of matrix products, and the others at the highest."""

    def at(units: int) -> None:
        torch.set_float32_matmul_precision(precision)
        work(units)
        torch.set_float32_matmul_precision("highest")

    return at


def _said(found: Race) -> dict[str, float]:
    """Return the units a second of every contestant, for the reader: what is compared are ratios."""
    return {name: round(found.units_a_second(name).value, 3) for name in found.seconds if " again" not in name}


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor)


def _has_torchcfm() -> bool:
    return find_spec("torchcfm") is not None


def _reduced_precision() -> bool:
    """Tell whether the processor multiplies bfloat16 matrices by instructions of its own."""
    asked: Iterator[Callable[[], bool] | None] = (
        getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(ask is not None and ask() for ask in asked)


def _processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"

"""The training step: this library's own loop, torchcfm's matcher in a plain loop, and the step's bare products."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from benchmarks.speed.clock import Contestant
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow import training
from pfm.flow.fields import FOURIER_FEATURES, ResidualField

__all__ = ["PausedFit", "bare_products", "plain_loop", "products_of_a_row"]


class _Stop(BaseException):
    """Ends a fit from within; no error."""


class PausedFit:
    """Runs ``PreferenceFlow.fit`` a number of updates at a time.

    What is measured is the library's own loop and no copy of it: the fit runs on a thread of its own that stands
    still, between two updates, until it is called for more. Use it as a context manager: leaving ends the fit.
    An optimiser's hooks would not do: replayed updates do not call them.
    """

    def __init__(self, pairs: EncodedPairs, validation: EncodedPairs, config: FlowConfig) -> None:
        self._arguments = (pairs, config.replace(epochs=1_000_000), validation, False)
        self._asked = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._left = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._fit, name="paused fit", daemon=True)

    def __enter__(self) -> PausedFit:
        self._set_rate = training.set_rate
        training.set_rate = self._between_updates
        self._thread.start()
        self._wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping = True
        self._asked.release()
        self._thread.join()
        training.set_rate = self._set_rate

    def __call__(self, updates: int) -> None:
        """Let the loop make some updates."""
        self._left = updates
        self._asked.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("the fit ended before it was stopped") from self._error

    def _fit(self) -> None:
        torch.set_num_threads(self._threads)  # each thread has its own number
        try:
            PreferenceFlow.fit(*self._arguments)
            raise AssertionError("a fit of a million epochs came to its end")
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _between_updates(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        self._set_rate(optimizer, rate)
        if threading.current_thread() is not self._thread:
            return
        self._left -= 1
        if self._left <= 0:
            self._done.release()
            self._asked.acquire()
            if self._stopping:
                raise _Stop


def plain_loop(pairs: EncodedPairs, batch: int, hidden: int, layers: int, device: torch.device) -> Contestant:
    """Make torchcfm's matcher in the plain loop of its examples, on the same network and resident tensors.

    Raises:
        ImportError: torchcfm is not in this environment; ``make peers`` makes one.
    """
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher  # pyright: ignore[reportMissingImports]

    matcher = ConditionalFlowMatcher(sigma=0.05)
    network = ResidualField(pairs.dimension, pairs.context_dimension, hidden, layers).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    chosen, rejected = (part.flatten(1).to(device) for part in (pairs.chosen, pairs.rejected))
    context = None if pairs.context is None else pairs.context.to(device)

    def work(updates: int) -> None:
        for _ in range(updates):
            index = torch.randint(len(chosen), (batch,), device=device)
            t, y, velocity = matcher.sample_location_and_conditional_flow(rejected[index], chosen[index])
            predicted = network(t, y, None if context is None else context[index])
            loss = torch.mean((predicted - velocity) ** 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return work


def _layers(dimension: int, context: int, hidden: int, layers: int) -> list[tuple[int, int, bool]]:
    """Return (inputs, outputs, whether the gradient of the inputs is needed) of every matrix of the network."""
    first = [(size, hidden, False) for size in (dimension, 1 + 2 * FOURIER_FEATURES, context) if size]
    return [*first, *[(hidden, hidden, True)] * (layers - 1), (hidden, dimension, True)]


def products_of_a_row(dimension: int, context: int, hidden: int, layers: int) -> int:
    """Return the multiply-adds that one row of a batch costs in the network, there and back."""
    return sum(a * b * (3 if back else 2) for a, b, back in _layers(dimension, context, hidden, layers))


def bare_products(
    batch: int, dimension: int, context: int, hidden: int, layers: int, device: torch.device
) -> Contestant:
    """Make a step's matrix products of the network and nothing else: what no loop on this machine can undercut.

    The linear part's products are left out: they are this library's, not the step's.
    """
    steps: list[Callable[[], Tensor]] = []
    for inputs, outputs, back in _layers(dimension, context, hidden, layers):
        x, weight = torch.randn(batch, inputs, device=device), torch.randn(outputs, inputs, device=device)
        y, slope, gradient = torch.empty(batch, outputs, device=device), torch.empty_like(weight), torch.empty_like(x)
        steps.append(lambda x=x, weight=weight, y=y: torch.mm(x, weight.T, out=y))
        steps.append(lambda x=x, y=y, slope=slope: torch.mm(y.T, x, out=slope))
        if back:
            steps.append(lambda weight=weight, y=y, gradient=gradient: torch.mm(y, weight, out=gradient))

    def work(updates: int) -> None:
        for _ in range(updates):
            for step in steps:
                step()

    return work

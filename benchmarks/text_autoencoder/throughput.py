"""Tokens a second of the text autoencoder, beside the rate that its bare matrix products would allow.

python -m benchmarks.text_autoencoder.throughput --folder runs/autoencoder   # a minute on one core
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.core.tables import markdown_table
from benchmarks.text_autoencoder.autoencoder import SentenceAutoencoder, padded
from benchmarks.text_autoencoder.network import Network
from benchmarks.text_autoencoder.search import draw, search
from pfm._internal.smollm2 import has_bfloat16

__all__ = ["Product", "main", "products", "seconds_of_products"]

Product = tuple[int, int, int]  # rows, inputs, outputs of a linear map


@contextmanager
def products(network: Network) -> Iterator[list[Product]]:
    """Collect the products of a network's linear maps, and of its logits, while it computes."""
    found: list[Product] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        found.append((given[0].numel() // module.in_features, module.in_features, module.out_features))

    hooks = [part.register_forward_hook(note) for part in network.modules() if isinstance(part, nn.Linear)]
    logits = network.logits

    def noted(states: Tensor) -> Tensor:
        found.append((states.numel() // states.shape[-1], states.shape[-1], network.settings.vocabulary))
        return logits(states)

    network.logits = noted
    try:
        yield found
    finally:
        del network.logits
        for hook in hooks:
            hook.remove()


def seconds_of_products(shapes: list[Product], backward: bool, kind: torch.dtype, repeats: int = 5) -> float:
    """Return the processor time of products of these shapes alone; backward, those of both gradients too."""
    total = 0.0
    for rows, inputs, outputs in set(shapes):
        x, weight = torch.randn(rows, inputs, dtype=kind), torch.randn(outputs, inputs, dtype=kind)
        gradient = torch.randn(rows, outputs, dtype=kind)

        def work(x: Tensor = x, weight: Tensor = weight, gradient: Tensor = gradient) -> None:
            torch.mm(x, weight.T)
            if backward:
                torch.mm(gradient, weight)
                torch.mm(gradient.T, x)

        total += shapes.count((rows, inputs, outputs)) * _seconds(work, repeats)
    return total


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call, after one to warm up."""
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main() -> None:
    """Print training and decoding of sentences, 128 a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/autoencoder"), help="default: runs/autoencoder")
    parser.add_argument("--repeats", type=int, default=9, help="measurements, whose median counts; default: 9")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SentenceAutoencoder.from_pretrained(options.folder)
    network, kind = model.network, torch.bfloat16 if has_bfloat16() else torch.float32
    sentence = "i really can't wait until the next show, something i haven't felt for any show."
    ids, mask = padded(model.tokenize([sentence] * 128))
    latents = network.encode(ids, mask)
    tokens = int(mask.sum())

    def update() -> None:
        network.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
            logits = network.logits(network.states(network.encode(ids, mask), ids)[mask])
        cross_entropy(logits.float(), ids[mask]).backward()
        network.zero_grad()
        network.requires_grad_(False)

    works: list[tuple[str, Callable[[], object], bool, torch.dtype]] = [
        ("training, forwards and backwards", update, True, kind),
        ("writing, the likeliest token each time", lambda: draw(network, latents), False, torch.float32),
        ("search, 4 texts", lambda: search(network, latents, 0.0, 4), False, torch.float32),
    ]
    if model.is_language_model:
        works.append(("search, 4 texts, with fluency", lambda: search(network, latents, 1.0, 4), False, torch.float32))
    rows = [["work", "tokens a second", "bare products alone", "share"]]
    for label, work, backward, precision in works:
        with products(network) as shapes:
            work()
        took = _seconds(work, options.repeats)
        bare = seconds_of_products(list(shapes), backward, precision, options.repeats)
        rows.append([label, f"{tokens / took:,.0f}", f"{tokens / bare:,.0f}", f"{bare / took:.0%}"])
    print("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()

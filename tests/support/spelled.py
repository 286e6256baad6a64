"""An encoder whose texts are their vectors: "1.5 0" is (1.5, 0)."""

from typing import Any

import torch


class Spelled:
    """Encodes a text as the numbers that it spells."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: list[str], *, progress: bool = False) -> torch.Tensor:
        return torch.tensor([[float(number) for number in text.split()] for text in texts])

    def describe(self) -> dict[str, Any]:
        return {"kind": "spelled"}

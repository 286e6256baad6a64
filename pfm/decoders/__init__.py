"""Decoders: from vectors and their win probabilities back to one output."""

from pfm.decoders.bottleneck import BottleneckT5
from pfm.decoders.editor import Editor
from pfm.decoders.exemplars import ExemplarBank
from pfm.decoders.latent import Latent, TextAutoencoder
from pfm.decoders.rewrite import Rewrite
from pfm.decoders.select import Decoder, Judged, Select, Selection

__all__ = [
    "BottleneckT5",
    "Decoder",
    "Editor",
    "ExemplarBank",
    "Judged",
    "Latent",
    "Rewrite",
    "Select",
    "Selection",
    "TextAutoencoder",
]

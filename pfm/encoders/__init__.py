"""Text to vectors: encoders, and the cache that keeps what they have encoded."""

from pfm.encoders.adapted import AdaptedEncoder
from pfm.encoders.base import CachedEncoder, Encoder
from pfm.encoders.cache import EmbeddingCache
from pfm.encoders.concat import ConcatEncoder
from pfm.encoders.named import encoder_from_description, encoder_from_name
from pfm.encoders.openai import OpenAIEncoder
from pfm.encoders.sentence import SentenceEncoder, as_encoder
from pfm.encoders.split import SplitEncoder
from pfm.encoders.static import StaticEncoder
from pfm.encoders.surface import SurfaceEncoder

__all__ = [
    "AdaptedEncoder",
    "CachedEncoder",
    "ConcatEncoder",
    "EmbeddingCache",
    "Encoder",
    "OpenAIEncoder",
    "SentenceEncoder",
    "SplitEncoder",
    "StaticEncoder",
    "SurfaceEncoder",
    "as_encoder",
    "encoder_from_description",
    "encoder_from_name",
]

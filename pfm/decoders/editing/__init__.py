"""Networks that rewrite a draft towards a point of the embedding space, their training data and their training."""

from pfm.decoders.editing.drafts import EditData
from pfm.decoders.editing.folder import load_writer, save_writer
from pfm.decoders.editing.language_model import LanguageModelWriter
from pfm.decoders.editing.pointer import PointerWriter
from pfm.decoders.editing.training import TrainingConfig, train_writer
from pfm.decoders.editing.writer import Edits, Writer, sample_edits

__all__ = [
    "EditData",
    "Edits",
    "LanguageModelWriter",
    "PointerWriter",
    "TrainingConfig",
    "Writer",
    "load_writer",
    "sample_edits",
    "save_writer",
    "train_writer",
]

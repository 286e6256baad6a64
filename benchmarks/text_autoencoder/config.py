"""The settings of ``task=imdb``."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.core.config import TaskConfig

__all__ = ["METHODS", "TASKS", "TextAutoencoderConfig"]


@dataclass
class TextAutoencoderConfig(TaskConfig):
    """Move sentences of IMDB's reviews in an autoencoder's latent by preferences of sentiment, and decode them.

    The autoencoder
        autoencoder: folder that ``python -m benchmarks.text_autoencoder`` has written; or a bottleneck-T5 model, a
        folder or a name on the hub, whose own code runs only with ``trust_remote_code``. revision: of one on the hub.

    How vectors are decoded
        fluency: weight of a text's own log-probability beside that of the text given the vector; 0 for an autoencoder
        whose decoder is no language model. beams: of the search for the likeliest text.

    What is measured
        labelled: sentences that the labelling judge is fitted on. reference: sentences that preferences are drawn from.
        validation, drafts: sentences on which settings are chosen and on which they are measured, others every seed.
        draws: sentences that an output is compared with. perplexity: outputs of each setting that SmolLM2 rates; 0 for
        none. least_cosines: of output and draft; for each, every family's setting with the best labelling judgement is
        chosen among those that keep so much content.

    How draws of one sentence are made, which best of n chooses among
        temperature: of the decoder's tokens. noise: added to the unit latent, as a share of its length.
    """

    autoencoder: str = "runs/autoencoder"
    trust_remote_code: bool = False
    revision: str | None = None
    fluency: float = 1.2
    beams: int = 4
    labelled: int = 6000
    reference: int = 12000
    validation: int = 40
    drafts: int = 80
    draws: int = 1000
    perplexity: int = 16
    least_cosines: list[float] = field(default_factory=lambda: [0.7, 0.55])
    temperature: float = 0.7
    noise: float = 0.3


TASKS = {"text_autoencoder": TextAutoencoderConfig}
METHODS: dict[str, type] = {}

"""The model card of a trained autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.text_autoencoder.autoencoder import SentenceAutoencoder

__all__ = ["model_card"]


def model_card(model: SentenceAutoencoder) -> str:
    """Return the text of README.md."""
    found, sizes = model.training, model.network.settings
    return f"""---
library_name: pfm
tags: [text-autoencoder, preference-flow]
language: en
---

# Sentence autoencoder

Encodes an English sentence of {found["settings"]["shortest"]} to {sizes.window} tokens as one vector of {sizes.width}
values, and writes the sentence of a vector. A flow that is fitted on such vectors moves them; see
`docs/studies/text_autoencoder.md`.

```python
from benchmarks.text_autoencoder import SentenceAutoencoder

model = SentenceAutoencoder.from_pretrained("this folder")
vectors = model.encode(["a wonderful film, from the first scene to the last."])
print(model.decode(vectors))
```

- **Size.** {found["parameters"]:,} parameters, {sizes.vocabulary:,} lower-cased byte-pair tokens.
- **Training.** {found["updates"]:,} updates of {found["settings"]["batch"]} sentences ({found["epochs"]:g} epochs of
  {found["sentences"]:,}), {found["cpu_seconds"]:,} CPU-seconds on one core. Noise of {found["settings"]["noise"]:g} on
  each value of the latent, {found["settings"]["replaced"]:.0%} of the tokens that are read replaced. A linear head
  predicts an attribute from the latent.
{_writer(found)}- **On held-out sentences.** Token accuracy {found["token_accuracy"]:.3f} given the preceding tokens,
  {found["written_accuracy"]:.3f} when it writes by itself, {found["exact"]:.1%} of the sentences without a fault;
  the attribute is predicted with {found["attribute_accuracy"]:.1%} accuracy.
- **Limits.** Lower-cased text of one kind; longer texts are refused. It says what the sentences that it was trained on
  say, good or bad.
"""


def _writer(found: dict[str, Any]) -> str:
    """Return the line on the decoder's second training, if there was one."""
    if (writer := found.get("writer")) is None:
        return ""
    own = writer["settings"]
    return f"""- **The decoder again.** {writer["updates"]:,} updates with the encoder as it is,
  {own["writers"]} layers, {writer["cpu_seconds"]:,} CPU-seconds; noise of
  {own["least_noise"]:g} to {own["most_noise"]:g}, and {own["without"]:.0%} of the sentences
  without a latent, so that it is a language model as well (`decode(fluency=)`).
"""

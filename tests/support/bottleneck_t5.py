"""A small bottleneck-T5 model, as a checkpoint of the family brings its own code along.

From the family's model cards: a T5 whose encoder is pooled by attention to one vector of length 1, to which the
decoder's cross-attention is gated; ``encode_only=True`` gives that vector, ``perturb_vector`` is added to it.
"""

from typing import Any

import torch
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention


class GatedCrossAttention(T5LayerCrossAttention):
    """Scales what the latent adds, value by value, by a gate between 0 and 2 that looks at state and latent."""

    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(2 * config.d_model, config.d_model, bias=False)

    def forward(self, hidden_states, key_value_states, **options):
        output, *rest = super().forward(hidden_states, key_value_states, **options)
        latent = key_value_states[:, :1].expand_as(hidden_states)
        gate = 2 * torch.sigmoid(self.gate(torch.cat([hidden_states, latent], dim=-1)))
        return hidden_states + gate * (output - hidden_states), *rest


class BottleneckT5LMWithPerturb(T5ForConditionalGeneration):
    """Writes what one vector says."""

    def __init__(self, config):
        super().__init__(config)
        self.pool = nn.Linear(config.d_model, 1, bias=False)
        blocks: Any = self.decoder.block
        for number, block in enumerate(blocks):
            block.layer[1] = GatedCrossAttention(self.decoder.config, layer_idx=number)
        self.perturb_vector: torch.Tensor | None = None
        self.post_init()

    def latents(self, states, mask):
        """Pool states (B, T, D) to unit vectors (B, D), shifted by ``perturb_vector``."""
        weights = self.pool(states)[..., 0].masked_fill(mask == 0, -torch.inf).softmax(1)
        found = nn.functional.normalize((weights[..., None] * states).sum(1), dim=1)
        if self.perturb_vector is not None:
            found = nn.functional.normalize(found + self.perturb_vector, dim=1)
        return found

    def forward(self, input_ids=None, attention_mask=None, encoder_outputs=None, encode_only=False, **options):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = encoder_outputs[0]
        mask = torch.ones(states.shape[:2], device=states.device) if attention_mask is None else attention_mask
        latents = self.latents(states, mask)
        if encode_only:
            return latents
        one: Any = BaseModelOutput(latents[:, None])
        return super().forward(encoder_outputs=one, **options)

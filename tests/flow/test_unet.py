"""A small U-Net as the field of a flow on images: 8 x 8 digits of scikit-learn, (1, 8, 8)."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import silu

import pfm
from pfm.preferences import MeanShift


@pfm.register_field("small-unet")
class UNet(nn.Module):
    """Convolves at two scales; time and context are added at the coarse one."""

    def __init__(self, event_shape, context_dimension, *, width=16):
        super().__init__()
        channels = event_shape[0]
        self.given = nn.Linear(1 + context_dimension, 2 * width)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, channels, 3, padding=1)

    def forward(self, t, y, context):
        given = self.given(t[:, None] if context is None else torch.cat([t[:, None], context], 1))
        fine = silu(self.enter(y))
        coarse = silu(self.down(fine) + given[:, :, None, None])
        coarse = silu(self.up(silu(self.middle(coarse))))
        return self.leave(torch.cat([fine, coarse], 1))


IMAGES = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32).view(-1, 1, 8, 8) / 16
CONFIG = pfm.FlowConfig(
    field="small-unet", field_options={"width": 8}, linear=False, epochs=12, batch_size=128, steps=2, learning_rate=8e-3
)


def asymmetry(images):
    """Return the mean square difference (B,) of images (B, 1, 8, 8) and their mirror images: the less, the better."""
    return (images - images.flip(-1)).square().flatten(1).mean(1)


def digit_pairs(shuffled: bool) -> pfm.EncodedPairs:
    generator = torch.Generator().manual_seed(0)
    one, other = IMAGES[torch.randint(1200, (2, 1200), generator=generator)]
    first = asymmetry(one) < asymmetry(other)
    if shuffled:
        first = torch.rand(1200, generator=generator) < 0.5
    first = first[:, None, None, None]
    return pfm.EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), group=torch.arange(1200))


def moved_by(shuffled: bool):
    """Fit a flow on labels, or on coin flips in their place; return it, with fresh digits before and after a pass."""
    flow = pfm.PreferenceFlow.fit(digit_pairs(shuffled), CONFIG, preference=MeanShift(), progress=False)
    fresh = IMAGES[1200:]
    return flow, fresh, flow.transport(fresh)


def test_labels_make_fresh_images_more_symmetric():
    flow, fresh, moved = moved_by(shuffled=False)
    assert moved.shape == fresh.shape == (597, 1, 8, 8)
    assert flow.metadata["training"]["gain"] > 0.5
    assert (asymmetry(moved) / asymmetry(fresh)).mean() < 0.92


def test_coin_flips_do_not():
    _, fresh, moved = moved_by(shuffled=True)
    assert (asymmetry(moved) / asymmetry(fresh)).mean() > 0.98
    # The reference is carried to itself, by less than the labels move it.
    assert (moved - fresh).square().mean().sqrt() < 0.05

"""The page on parts of a user's own, run as it stands; and outputs that are not text."""

import json
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.places import ROOT

import pfm
from pfm.data.outputs import same_output
from pfm.decoders import Select
from pfm.encoders import AdaptedEncoder, as_encoder
from pfm.preferences import MeanShift

PAGE = ROOT / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """Run the page's snippets one after the other, and return what they have defined."""
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 6
    names = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


def test_the_field_of_the_page_moves_images_towards_more_ink(page):
    fresh = page.digits[1000:]
    assert page.moved.shape == fresh.shape == (797, 1, 8, 8)
    assert page.moved.sum() > 1.05 * fresh.sum()
    assert page.flow.config.field == "unet"


def test_the_generator_and_the_encoder_of_the_page_handle_arrays(page):
    result = page.result
    assert result.error is None
    assert len(result.candidates) == 4
    assert isinstance(result.text, np.ndarray)
    assert result.text.shape == (8, 8)
    assert result.index == int(np.argmax(result.probabilities)) or not result.changed
    assert page.album.generate(["a digit, please"], 1)[0][0].shape == (8, 8)
    again = page.refiner("a digit, please")
    assert np.array_equal(again.text, result.text)


def test_the_decoder_of_the_page_returns_a_transported_image(page):
    inked = page.inked
    assert inked.changed
    assert inked.reason.startswith("transported: b ")
    assert inked.text.sum() > inked.original.sum()
    assert inked.candidates[-1] is inked.text


def test_the_judge_of_the_page_labels_and_evaluates(page):
    (row,) = page.rows
    assert row["chosen"] == "Because."
    # sigmoid((-1 + 6) / 5): one word against six
    assert row["probability"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert len(page.labelled) == 1
    assert page.FewerWords()("Why?", ["a b", "a"]) == [-2.0, -1.0]


# -- outputs that are not text --------------------------------------------------------------------------------------


class Points:
    """Encodes points of the plane as they are."""

    def accepts(self, output):
        return isinstance(output, np.ndarray | torch.Tensor) and tuple(output.shape) == (2,)

    def encode(self, points):
        return torch.stack([torch.as_tensor(point) for point in points])


@pytest.fixture(scope="module")
def flow():
    rejected = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    pairs = pfm.EncodedPairs(rejected + 1, rejected, group=torch.arange(100))
    return pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), preference=MeanShift(), progress=False)


def test_arrays_are_chosen_by_b(flow):
    far, near = np.array([2.0, 2.0], dtype=np.float32), np.array([-2.0, -2.0], dtype=np.float32)
    refiner = pfm.wrap(lambda prompt, n=1: [near, far, near][:n], flow, encoder=Points(), decoder=Select(margin=0), n=3)
    result = refiner("go")
    assert result.changed
    assert result.text is far
    assert result.index == 1
    assert json.loads(json.dumps(result.to_dict()))["candidates"] == [near.tolist(), far.tolist(), near.tolist()]


def test_equal_arrays_are_one_candidate(flow):
    same = [np.ones(2, dtype=np.float32) for _ in range(3)]
    result = pfm.wrap(lambda prompt: same, flow, encoder=Points(), decoder=Select(margin=-1), n=3)("go")
    assert not result.changed
    assert result.reason == "kept the original: all candidates are the same text"


def test_outputs_that_the_encoder_does_not_accept_are_dropped_and_counted(flow):
    given = [np.zeros(3), "text", np.zeros(2, dtype=np.float32)]
    result = pfm.wrap(lambda prompt: given, flow, encoder=Points(), n=1)("go")
    assert len(result.candidates) == 1
    assert "2 outputs dropped: not what the encoder accepts" in result.reason
    result = pfm.wrap(lambda prompt: given[:2], flow, encoder=Points(), n=1).batch(["go"], progress=False)[0]
    assert result.error is not None
    assert "no usable output" in result.error


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_outputs_made_elsewhere_are_refined(flow, kind):
    refiner = pfm.wrap(None, flow, encoder=Points(), decoder=Select(margin=0))
    rows = [kind(torch.tensor([[-1.0, -1.0], [1.0, 1.0]])), [kind(torch.tensor([3.0, 3.0]))]]
    first, second = refiner.refine(rows, ["a", "b"])
    assert first.changed
    assert same_output(first.text, rows[0][1])
    assert not second.changed


async def _aone(refiner):
    return await refiner.abatch(["go"], progress=False)


def test_async_generators_and_batches_take_them_too(flow):
    import asyncio

    async def draw(prompt):
        return np.ones(2, dtype=np.float32)

    class Batch:
        def generate(self, prompts, n):
            return [[torch.ones(2)] * n for _ in prompts]

    (result,) = asyncio.run(_aone(pfm.wrap(draw, flow, encoder=Points(), n=2)))
    assert len(result.candidates) == 2
    (result,) = pfm.wrap(Batch(), flow, encoder=Points(), n=2).batch(["go"], progress=False)
    assert len(result.candidates) == 2


def test_texts_stay_texts_where_the_encoder_says_nothing(flow):
    class Lengths:
        def encode(self, texts):
            return [[float(len(text)), 0.0] for text in texts]

    result = pfm.wrap(lambda prompt: ["a", np.ones(2), "bb"], flow, encoder=Lengths(), n=2)("go")
    assert result.candidates == ["a", "bb"]
    assert "1 output dropped: empty or not text" in result.reason


# -- what an encoder needs ------------------------------------------------------------------------------------------


class Bare:
    """Encodes texts and says nothing of itself."""

    def encode(self, texts):
        return np.array([[len(text), text.count(" ")] for text in texts], dtype=np.float64)


def test_encode_is_all_that_an_encoder_needs(flow):
    pairs = pfm.PreferencePairs.from_rows([{"prompt": "p", "chosen": "a b c", "rejected": "a"}])
    encoded = pairs.encode(Bare(), progress=False)
    assert encoded.encoder is None
    assert encoded.chosen.tolist() == [[5.0, 2.0]]
    assert encoded.context is not None
    refiner = pfm.wrap(lambda prompt: ["a", "b c d"], flow, encoder=Bare(), decoder=Select(margin=0), n=2)
    assert refiner.encoder.dimension == 2
    assert refiner("p").text == "b c d"
    assert pickle.loads(pickle.dumps(refiner.encoder)).encode(["a b"]).tolist() == [[3.0, 1.0]]


def test_what_an_encoder_says_is_checked(flow):
    class Wide(Bare):
        dimension = 3

    class Other(Bare):
        def describe(self):
            return {"name": "other"}

    with pytest.raises(ValueError, match="encoder has dimension 3"):
        pfm.wrap(None, flow, encoder=Wide())
    with pytest.raises(TypeError, match=r"encoder must have \.encode"):
        pfm.wrap(None, flow, encoder=object())
    with pytest.raises(TypeError, match=r"encoder must have \.encode"):
        pfm.wrap(None, flow, encoder=Bare)
    assert as_encoder(Other()).describe() == {"name": "other"}
    assert isinstance(as_encoder(Other()), AdaptedEncoder)

    class Ragged:
        def encode(self, texts):
            return np.zeros((len(texts), 5))

    with pytest.raises(ValueError, match=r"must return shape \(1, 2\)"):
        pfm.wrap(lambda prompt: "a", flow, encoder=Ragged(), n=1)("p")


def test_progress_is_passed_to_encoders_that_take_it():
    class Noting(Bare):
        def encode(self, texts, progress=True):
            seen.append(progress)
            return super().encode(texts)

    seen = []
    as_encoder(Noting()).encode(["a"], progress=False)
    assert seen == [False]
    as_encoder(Bare()).encode(["a"], progress=False)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("a", "a", True),
        ("a", np.array("a"), False),
        (np.zeros(2), np.zeros(2), True),
        (np.zeros(2), np.zeros((1, 2)), False),
        (np.zeros(2), np.zeros(3), False),
        (torch.zeros(2), torch.ones(2), False),
        (torch.zeros(1), torch.zeros(1), True),
        (b"x", b"x", True),
        (np.zeros(0), np.zeros(0), True),
    ],
)
def test_equality_of_outputs(one, other, equal):
    assert same_output(one, other) is equal

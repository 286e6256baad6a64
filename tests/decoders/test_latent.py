"""Latent: transport in an autoencoder's space, and decode what arrives."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import bottleneck_t5
from support.said import SAID, word_tokenizer
from support.text_autoencoder import fresh, mood, mood_pairs, things, trained

import pfm
from pfm.decoders import BottleneckT5, Latent, TextAutoencoder
from pfm.statistics import Bootstrap

TEXTS = fresh(120, seed=1)
FRONTIER = (1.0, 2.0, 4.0, 8.0)


@pytest.fixture(scope="module")
def space():
    return TextAutoencoder(trained(300))


def fitted(space, pairs):
    config = pfm.FlowConfig(seed=0, residual=False)
    return pfm.PreferenceFlow.fit(pairs.encode(space, progress=False), config, progress=False)


@pytest.fixture(scope="module")
def flow(space):
    return fitted(space, mood_pairs(1200))


def moved(flow: Any, space: Any, **options: Any):
    """Refine the texts; give the results and the change of mood, judged by words alone."""
    refiner = pfm.wrap(None, flow, encoder=space, decoder="latent", **options)
    results = refiner.refine(TEXTS, [""] * len(TEXTS))
    rise = [mood("", result.text) - mood("", result.original) for result in results]
    return results, Bootstrap(len(TEXTS)).mean(rise)


# --- what it gains, and what it must not ----------------------------------------------------------------------


def test_the_autoencoder_gives_its_texts_back(space):
    assert np.mean([text == again for text, again in zip(TEXTS, space.decode(space.encode(TEXTS)), strict=True)]) > 0.95


def test_strength_moves_the_mood_and_keeps_the_content(flow, space):
    results, rise = moved(flow, space, strength=FRONTIER)
    assert rise.low > 0.8
    assert np.mean([len(things(r.text) & things(r.original)) / 2 for r in results]) > 0.8
    for result in results:
        assert result.win_probability >= result.probabilities[0]
        assert result.changed == (result.text != result.original)
        if result.changed:
            assert result.win_probability - result.probabilities[0] >= flow.guard_margin


def test_a_single_pass_is_absorbed_and_a_stronger_one_is_not(flow, space):
    _, weak = moved(flow, space, strength=1.0)
    _, strong = moved(flow, space, strength=4.0)
    _, further = moved(flow, space, strength=2.0, rounds=4)
    assert weak.value < 0.3 < strong.low
    assert further.value > weak.value


def test_the_gradient_of_b_moves_it_too(flow, space):
    _, plain = moved(flow, space, strength=1.0)
    _, steered = moved(flow, space, strength=1.0, win_gradient=(2.0, 8.0))
    assert steered.low > plain.high


def test_shuffled_labels_move_nothing(space):
    shuffled = fitted(space, mood_pairs(1200).shuffle_labels(0))
    results, rise = moved(shuffled, space, strength=FRONTIER)
    assert rise.value == 0
    assert not any(result.changed for result in results)
    assert "no held-out gain was confirmed" in results[0].reason
    _, unguarded = moved(shuffled, space, strength=FRONTIER, margin=-1.0)
    assert abs(unguarded.value) < 0.3


def test_swapped_labels_move_the_other_way(space):
    _, fall = moved(fitted(space, mood_pairs(1200).swap()), space, strength=FRONTIER)
    assert fall.high < -0.8


def test_every_move_is_in_the_trace(flow, space):
    results, _ = moved(flow, space, strength=(1.0, 4.0), win_gradient=(0.0, 2.0), rounds=2)
    for result in results:
        assert result.trace is not None
        assert [entry["round"] for entry in result.trace] == [1, 2]
        for entry in result.trace:
            assert [(move["strength"], move["win_gradient"]) for move in entry["moves"]] == [
                (1.0, 0.0), (1.0, 2.0), (4.0, 0.0), (4.0, 2.0),
            ]  # fmt: skip
            assert set(entry["texts"]) <= {move["text"] for move in entry["moves"]}
        assert result.candidates[0] == result.original
        assert result.candidates[result.index] == result.text
        assert result.calls == 0
    json.dumps([result.to_dict() for result in results])


def test_texts_that_leave_the_content_can_be_refused(flow, space):
    results, _ = moved(flow, space, strength=(4.0, 64.0), least_similarity=0.7)
    vectors = space.encode([result.text for result in results])
    close = torch.cosine_similarity(vectors, space.encode(TEXTS))
    assert float(close.min()) >= 0.7
    assert any(result.changed for result in results)


# --- any autoencoder ------------------------------------------------------------------------------------------


class Crooked:
    def __init__(self, vectors=None, texts=None):
        self.vectors, self.texts = vectors, texts

    def encode(self, texts):
        return torch.ones(len(texts), 2) if self.vectors is None else self.vectors

    def decode(self, vectors):
        return ["x"] * len(vectors) if self.texts is None else self.texts


def test_what_is_no_autoencoder_is_refused(flow, space):
    with pytest.raises(TypeError, match=r"without \.decode"):
        TextAutoencoder(pfm.encoders.SurfaceEncoder())
    with pytest.raises(TypeError, match=r"pass Crooked\(\.\.\.\)"):
        TextAutoencoder(Crooked)
    with pytest.raises(ValueError, match=r"encode must return \(2, D\)"):
        TextAutoencoder(Crooked(vectors=torch.ones(3, 2))).encode(["a", "b"])
    with pytest.raises(ValueError, match="decode must return 2 texts"):
        TextAutoencoder(Crooked(texts=["a"])).decode(torch.ones(2, 2))
    with pytest.raises(ValueError, match="dimension 2, and the flow's encoder has 24"):
        pfm.wrap(None, flow, encoder=space, decoder=Latent(Crooked()))
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0"):
        Latent(strength=(1.0, -1.0))
    with pytest.raises(ValueError, match="least_similarity"):
        Latent(least_similarity=2.0)
    surface = pfm.encoders.SurfaceEncoder()
    plain = fitted(surface, mood_pairs(60))
    with pytest.raises(TypeError, match=r"without \.decode; pass encoder=TextAutoencoder"):
        pfm.wrap(None, plain, encoder=surface, decoder="latent")


def test_the_flow_knows_its_autoencoder_again(flow, space):
    assert flow.metadata["encoder"]["name"] == "sentences"
    assert flow.metadata["encoder"]["revision"].startswith("sha256:")
    with pytest.warns(UserWarning, match="another encoder than the one given: revision"):
        pfm.wrap(None, flow, encoder=TextAutoencoder(trained(1, seed=5)), decoder="latent")
    assert repr(Latent()) in repr(pfm.wrap(None, flow, encoder=space, decoder=Latent())).replace(repr(space), "None")


# --- bottleneck T5 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Make a folder as the hub has it: weights, tokenizer, and the model's own code; trained to repeat six texts."""
    from transformers import T5Config

    folder = tmp_path_factory.mktemp("hub") / "tiny-bottleneck"
    tokenizer = word_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1,
        "num_heads": 4, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    config = T5Config(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = bottleneck_t5.BottleneckT5LMWithPerturb(config)
        batch = tokenizer([*SAID, "."], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        for _ in range(150):
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.config.auto_map = {"AutoModelForCausalLM": "bottleneck_t5.BottleneckT5LMWithPerturb"}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(bottleneck_t5.__file__, folder / "bottleneck_t5.py")
    return folder


@pytest.fixture
def bottleneck(checkpoint, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return BottleneckT5(checkpoint, trust_remote_code=True, device="cpu", max_length=32)


def test_bottleneck_runs_a_models_own_code_only_when_told_to(checkpoint):
    with pytest.raises(ValueError, match="runs code of its own: look at it, then pass trust_remote_code=True"):
        BottleneckT5(checkpoint)


def test_bottleneck_loads_a_folder_and_says_its_texts_again(bottleneck, checkpoint):
    vectors = bottleneck.encode(SAID)
    assert vectors.shape == (len(SAID), 32)
    assert bottleneck.dimension == 32
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * len(SAID), abs=1e-5)
    assert bottleneck.decode(vectors) == SAID
    assert bottleneck.decode(3 * vectors) == SAID  # only the direction counts
    assert bottleneck.decode(vectors[:0]) == []
    one_by_one = torch.cat([bottleneck.encode([text]) for text in SAID])
    torch.testing.assert_close(vectors, one_by_one, atol=1e-5, rtol=1e-5)
    between = bottleneck.decode((vectors[:1] + vectors[1:2]) / 2)
    assert between[0].startswith("the film was")
    described = bottleneck.describe()
    assert described["revision"].startswith("sha256:")
    assert described["dimension"] == 32
    json.dumps(described)
    again = pickle.loads(pickle.dumps(bottleneck))
    torch.testing.assert_close(again.encode(SAID[:2]), vectors[:2])


def test_bottleneck_takes_a_loaded_model_and_leaves_it_as_it_was(bottleneck):
    model = bottleneck_t5.BottleneckT5LMWithPerturb.from_pretrained(bottleneck.name)
    shift = torch.zeros(32)
    model.perturb_vector = shift
    loaded = BottleneckT5(model, word_tokenizer(), max_length=32)
    torch.testing.assert_close(loaded.encode(SAID), bottleneck.encode(SAID))
    assert loaded.decode(loaded.encode(SAID[:2])) == SAID[:2]
    assert model.perturb_vector is shift
    with pytest.raises(TypeError, match="needs its tokenizer"):
        BottleneckT5(model)
    with pytest.raises(TypeError, match="tokenizer goes with a loaded model"):
        BottleneckT5("some/model", word_tokenizer(), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"vectors must be \(N, 32\)"):
        loaded.decode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="finite"):
        loaded.decode(torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="is no bottleneck-T5 model: Linear has no perturb_vector"):
        BottleneckT5(torch.nn.Linear(2, 2), word_tokenizer())


def test_bottleneck_names_what_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot load .* as a bottleneck-T5 model"):
        BottleneckT5(tmp_path, trust_remote_code=True).encode(["x"])
    with pytest.raises(ValueError, match="there is no folder"):
        BottleneckT5("./nowhere", trust_remote_code=True)


def test_a_flow_in_the_bottleneck_only_takes_what_is_better(bottleneck):
    source = random.Random(0)
    rows = []
    for number in range(120):
        one, two = source.choices(["film", "meal", "room", "song", "walk"], k=2)
        good, bad = source.choice(["lovely", "bright", "warm"]), source.choice(["dull", "late", "cold"])
        tail = source.choice(["", " and late", " but nobody was there", " in the room"])
        rows.append(
            {
                "prompt": "",
                "chosen": f"the {one} was {good}{tail}",
                "rejected": f"a {two} was {bad}{tail}",
                "group": number,
            }
        )
    flow = fitted(bottleneck, pfm.PreferencePairs.from_rows(rows))
    assert flow.metadata["encoder"]["type"] == "BottleneckT5"
    refiner = pfm.wrap(None, flow, encoder=bottleneck, decoder="latent", strength=FRONTIER, margin=0.05)
    results = refiner.refine(SAID, [""] * len(SAID))
    assert any(result.changed for result in results)
    for result in results:
        rise = result.win_probability - result.probabilities[0]
        assert rise >= 0.05 if result.changed else result.text == result.original
        b = flow.win_probability(bottleneck.encode([result.text])).item()
        assert result.win_probability == pytest.approx(b, abs=1e-4)

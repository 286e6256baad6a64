"""The text autoencoder: its network against closed forms, resumable training, folders, moves, and the whole task."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.text_autoencoder import GOOD, fresh, mood, mood_pairs, sentence
from torch.nn.functional import normalize

import pfm
from benchmarks.core.bench import Bench
from benchmarks.core.data import MissingDataError
from benchmarks.core.runs import Run
from benchmarks.core.schemas import composed
from benchmarks.methods import make_method
from benchmarks.paper import page as paper
from benchmarks.tasks import load_task
from benchmarks.text_autoencoder import SentenceAutoencoder, __main__, report, training
from benchmarks.text_autoencoder.autoencoder import padded
from benchmarks.text_autoencoder.frontier import at_cosine, equal_content
from benchmarks.text_autoencoder.moves import FAMILIES, Moves, encode_decode, family_of, preferred_subspace
from benchmarks.text_autoencoder.network import END, Network, NetworkSettings
from benchmarks.text_autoencoder.search import draw, search
from benchmarks.text_autoencoder.spaces import Space, load_space
from benchmarks.text_autoencoder.task import choose
from benchmarks.text_autoencoder.throughput import products, seconds_of_products
from benchmarks.text_autoencoder.training import Corpus, TrainingSettings, token_vectors, train
from benchmarks.text_autoencoder.writer import WriterSettings, is_trained, nats_alone, train_writer
from benchmarks.text_editing.moves import preference_pairs
from pfm.decoders import Latent, TextAutoencoder
from pfm.preferences import BradleyTerry

SIZES = NetworkSettings(vocabulary=360, width=64, hidden=64, readers=1, writers=1, heads=2, window=10)
SETTINGS = TrainingSettings(batch=64, warm_up=10, learning_rate=3e-3, shortest=7)
WRITER = WriterSettings(writers=2, batch=64, warm_up=10, learning_rate=3e-3, shortest=7)


def corpus(count: int = 900) -> Corpus:
    source = random.Random(5)
    texts = list(dict.fromkeys(sentence(source) for _ in range(count)))
    held_out = [text for text in fresh(200, seed=9) if text not in texts]
    told = [int(mood("", text) > 0) for text in texts]
    return Corpus(texts, told, held_out, [int(mood("", text) > 0) for text in held_out])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("autoencoder") / "model"
    train(place, corpus(), SIZES, SETTINGS, updates=120, progress=False)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceAutoencoder:
    return SentenceAutoencoder.from_pretrained(folder)


@pytest.fixture(scope="module")
def writer(model: SentenceAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> SentenceAutoencoder:
    place = tmp_path_factory.mktemp("autoencoder") / "writer"
    return train_writer(place, model, corpus(), WRITER, updates=100, progress=False)


def test_the_untrained_network_reads_single_tokens_exactly() -> None:
    """With one token and END in the sum, the codes' closed form leaves less noise than signal."""
    torch.manual_seed(0)
    network = Network(NetworkSettings(vocabulary=300, width=256, hidden=32, readers=1, writers=1)).eval()
    rows = [[token] for token in range(1, 300)]
    ids, mask = padded(rows)
    with torch.no_grad():
        latents = network.encode(ids, mask)
        found = network.logits(network.states(latents, ids)).argmax(2)
    assert latents.norm(dim=1).tolist() == pytest.approx([16.0] * 299, rel=1e-5)
    assert float((found == ids).float().mean()) > 0.99
    long = torch.randint(1, 300, (64, 24), generator=torch.Generator().manual_seed(1)).tolist()
    ids, mask = padded(long)
    with torch.no_grad():
        found = network.logits(network.states(network.encode(ids, mask), ids)).argmax(2)
    assert 0.3 < float((found == ids).float().mean()) < 0.99  # the sum of 25 tokens interferes


def test_padding_does_not_change_a_latent_nor_the_batch_a_text(model: SentenceAutoencoder) -> None:
    texts = [*fresh(6, seed=2), "the film was long"]
    together = model.encode(texts)
    alone = torch.cat([model.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    assert model.decode(together) == [model.decode(row[None])[0] for row in together]
    assert model.decode(together[:0]) == []
    assert model.encode([]).shape == (0, 64)


def test_writing_step_by_step_is_what_teacher_forcing_gives(model: SentenceAutoencoder) -> None:
    latents = model.encode(fresh(8, seed=3))
    written = draw(model.network, latents)
    rows = [row[: row.index(END)] if END in row else row for row in written.tolist()]
    ids, mask = padded(rows)
    with torch.no_grad():
        forced = model.network.logits(model.network.states(latents, ids)).argmax(2)
    full = torch.tensor([len(row) < SIZES.window for row in rows])
    assert bool((forced == ids)[mask & full[:, None]].all())
    torch.testing.assert_close(written, draw(model.network, 7 * latents))  # only the direction counts


def test_training_learns_the_sentences_and_their_mood(model: SentenceAutoencoder) -> None:
    found = model.training
    assert found["token_accuracy"] > 0.9
    assert found["written_accuracy"] > 0.85
    assert found["attribute_accuracy"] > 0.8
    assert 0 < found["parameters"] < 200_000
    untrained = SentenceAutoencoder(Network(SIZES), model.tokenizer)
    assert training.measure(untrained, corpus(), 7)["written_accuracy"] < 0.5


def test_the_search_finds_the_best_of_all_texts() -> None:
    """Against an enumeration of all texts of up to three of five tokens, with and without the language model."""
    torch.manual_seed(0)
    network = Network(
        NetworkSettings(vocabulary=6, width=16, hidden=16, readers=1, writers=2, heads=2, window=3)
    ).eval()
    for part in network.writers.parameters():
        torch.nn.init.normal_(part, std=0.5)
    latents = torch.randn(7, 16)
    texts = [[*row, END] for n in (1, 2) for row in itertools.product(range(1, 6), repeat=n)]
    texts += [list(row) for row in itertools.product(range(1, 6), repeat=3)]

    @torch.no_grad()
    def total(latent: torch.Tensor, row: list[int]) -> float:
        logits = network.logits(network.states(latent[None], torch.tensor([row])))[0]
        return sum(float(own.log_softmax(0)[token]) for own, token in zip(logits, row, strict=True))

    for fluency, nats in ((0.0, 0.0), (0.7, 0.0), (0.7, 1.5)):
        found = search(network, latents, fluency, beams=6 * 6, nats=nats)
        for latent, ids in zip(7 * latents, found.tolist(), strict=True):
            latent = network.on_sphere(latent[None])[0]
            scores = [total(latent, row) + fluency * (total(torch.zeros(16), row) + nats * len(row)) for row in texts]
            best = texts[max(range(len(texts)), key=scores.__getitem__)]
            assert ids == best + [END] * (3 - len(best))
    torch.testing.assert_close(search(network, latents, 0.7, beams=1), draw(network, latents, fluency=0.7))


def test_the_decoder_trained_again_is_a_language_model_and_leaves_the_latents(
    model: SentenceAutoencoder, writer: SentenceAutoencoder
) -> None:
    texts = fresh(40, seed=13)
    torch.testing.assert_close(writer.encode(texts), model.encode(texts), atol=0, rtol=0)
    assert writer.network.settings == dataclasses.replace(SIZES, writers=2)
    assert writer.training["written_accuracy"] > 0.85
    assert not model.is_language_model
    with pytest.raises(ValueError, match=r"fluency=0\.5 needs a decoder that is a language model"):
        model.decode(model.encode(texts), fluency=0.5)
    with pytest.raises(ValueError, match=r"task\.fluency=0\.5 needs an autoencoder whose decoder is a language model"):
        Space(model, 0.5)
    with pytest.raises(ValueError, match="beams must be 1 where texts are drawn"):
        writer.decode(writer.encode(texts), temperature=1.0, beams=2)

    words = random.Random(3)
    scrambled = [" ".join(words.sample(own.split(), len(own.split()))) for own in texts]
    assert nats_alone(writer, texts) < 0.75 * nats_alone(model, texts)
    assert nats_alone(writer, texts) < 0.6 * nats_alone(writer, scrambled)
    far = normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(5)), dim=1)  # no text has such a latent
    plain, fluent = (writer.decode(far, fluency=weight, beams=4) for weight in (0.0, 1.0))
    assert nats_alone(writer, fluent) < 0.9 * nats_alone(writer, plain)


def test_the_decoders_training_goes_on_and_takes_the_autoencoders_place(
    model: SentenceAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = corpus()
    whole = train_writer(tmp_path / "whole", model, data, WRITER, updates=30, progress=False)
    place = tmp_path / "cut"
    model.save_pretrained(place, "first")
    saved = training.Training.save

    def stop(self: Any) -> None:
        saved(self)
        if self.done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train_writer(place, model, data, WRITER, updates=30, progress=False)
    assert SentenceAutoencoder.from_pretrained(place).training == model.training  # usable meanwhile
    assert not is_trained(place)
    other = dataclasses.replace(WRITER, without=0.1)
    with pytest.raises(ValueError, match=r"holds a decoder with writer=.* use another folder"):
        train_writer(place, model, data, other, updates=30, progress=False)
    again = train_writer(place, SentenceAutoencoder.from_pretrained(place), data, WRITER, updates=30, progress=False)
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, atol=0, rtol=0)
    assert sorted(path.name for path in place.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "language model" in (place / "README.md").read_text(encoding="utf-8")
    loaded = SentenceAutoencoder.from_pretrained(place)
    assert loaded.is_language_model
    assert is_trained(place)
    assert not is_trained(tmp_path)
    assert train_writer(place, loaded, data, other, updates=30, progress=False) is loaded


def test_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus()
    whole = train(tmp_path / "whole", data, SIZES, SETTINGS, updates=30, progress=False)
    saved = training.Training.save
    calls: list[int] = []

    def stop(self: Any) -> None:
        saved(self)
        calls.append(self.done)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", data, SIZES, SETTINGS, updates=30, progress=False)
    with pytest.raises(ValueError, match="use another folder"):
        train(tmp_path / "cut", data, dataclasses.replace(SIZES, width=32), SETTINGS, updates=30, progress=False)
    again = train(tmp_path / "cut", data, SIZES, SETTINGS, updates=30, progress=False)
    assert calls == [1, 2]
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, atol=0, rtol=0)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert train(tmp_path / "cut", data, SIZES, SETTINGS, updates=30, progress=False).training == again.training


def test_a_saved_folder_has_a_card_and_gives_the_same_vectors(model: SentenceAutoencoder, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md",
    }  # fmt: skip
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{model.training['parameters']:,} parameters" in card
    texts = fresh(4, seed=4)
    torch.testing.assert_close(SentenceAutoencoder.from_pretrained(folder).encode(texts), model.encode(texts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the film was long and " * 9, "tokens, and the autoencoder's window 10: split it"),
        ("", "empty"),
        (7, "str"),
    ],
)
def test_texts_that_do_not_fit_are_refused(model: SentenceAutoencoder, text: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model.encode(["the film was long", text])


def test_odd_texts_and_vectors(model: SentenceAutoencoder) -> None:
    vectors = model.encode(["🎬 é\u0000", "ＴＨＥ film", "\u202eabc"])
    assert bool(vectors.isfinite().all())
    torch.testing.assert_close(vectors[1], model.encode(["the film"])[0])  # normalised: NFKC, lower case
    for bad, message in ((torch.zeros(2, 3), "vectors"), (torch.full((1, 64), torch.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            model.decode(bad)
    assert len(model.decode(torch.zeros(1, 64))) == 1  # no direction; some text
    with pytest.raises(ValueError, match="temperature"):
        model.decode(vectors, temperature=-1.0)
    draws = [model.decode(vectors, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_strangers_folder_is_checked_before_anything_is_allocated(folder: Path, tmp_path: Path) -> None:
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def stranger(name: str, text: str | None) -> Path:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        (place / name).unlink()
        if text is not None:
            (place / name).write_text(text, encoding="utf-8")
        return place

    for name, text, message in (
        ("config.json", json.dumps({**described, "width": 4096}), "does not fit its config.json"),
        ("config.json", json.dumps({**described, "width": 10**12}), "width"),
        ("config.json", json.dumps({**described, "vocabulary": "many"}), "vocabulary"),
        ("config.json", json.dumps({**described, "model_type": "t5"}), "model_type"),
        ("config.json", "[]", "no JSON object"),
        ("model.safetensors", "cut", "damaged"),
        ("tokenizer.json", "{}", "damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            SentenceAutoencoder.from_pretrained(stranger(name, text))
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.text_autoencoder"):
        SentenceAutoencoder.from_pretrained(stranger("model.safetensors", None))


def test_token_vectors_put_words_of_like_use_together() -> None:
    rows = [[1, 2, 3], [1, 4, 3], [5, 6, 7], [5, 8, 7]] * 50
    vectors, counts = token_vectors(rows, 9, 8)
    assert counts.tolist() == [200, 100, 50, 100, 50, 100, 50, 100, 50]
    assert float(vectors[2] @ vectors[4]) > 0.9 > float(vectors[2] @ vectors[6])


def test_a_refiner_moves_texts_through_the_autoencoder(model: SentenceAutoencoder) -> None:
    space = TextAutoencoder(model)
    pairs = mood_pairs(600)
    encoded = pairs.encode(space, progress=False)
    texts = [text for text in fresh(60, seed=7) if mood("", text) <= 0][:24]

    def gain(pairs: pfm.EncodedPairs) -> float:
        config = pfm.FlowConfig(residual=False)
        flow = pfm.PreferenceFlow.fit(pairs, config, progress=False, preference=BradleyTerry())
        refiner = pfm.wrap(None, flow, encoder=space, decoder=Latent(strength=(8.0, 16.0), margin=0.0), n=1)
        refined = refiner.refine([[text] for text in texts], [""] * len(texts))
        return sum(mood("", own.text) - mood("", text) for own, text in zip(refined, texts, strict=True)) / len(texts)

    assert gain(encoded) > 0.4
    assert gain(encoded.shuffle_labels(0)) < 0.3


def test_the_subspace_holds_what_tells_winners_from_losers() -> None:
    random = torch.Generator().manual_seed(0)
    y = torch.randn(4000, 12, generator=random)
    scores = y[:, 0] + y[:, 1].square()  # a mean and a variance
    basis = preferred_subspace(preference_pairs(y, scores, 0, sets=False), 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    assert basis[:2].square().sum().item() > 1.9
    chance = preferred_subspace(preference_pairs(y, scores[torch.randperm(4000, generator=random)], 0, sets=False), 2)
    assert chance[:2].square().sum().item() < 1.5


def test_moves_gain_by_the_score_and_controls_do_not() -> None:
    y = normalize(torch.randn(800, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = 4 * y[:, 0]
    moves = Moves(y, scores, pfm.FlowConfig(residual=False), 0)
    points = moves(y[:200])
    assert {family_of(name) for name in points} >= {*FAMILIES[:-1], encode_decode}
    assert all(own.norm(dim=1).tolist() == pytest.approx([1.0] * 200, abs=1e-4) for own in points.values())
    before = y[:200, 0].mean()
    gained = {name: float(own[:, 0].mean() - before) for name, own in points.items()}
    assert gained[encode_decode] == pytest.approx(0, abs=1e-6)
    for family in FAMILIES[:-1]:
        assert max(value for name, value in gained.items() if family_of(name) == family) > 0.15, family
    assert abs(gained["shuffled labels: x2"]) < 0.5 * gained["flow best of 8: x2"]
    assert gained["swapped labels: x2"] == pytest.approx(-gained["flow best of 8: x2"], abs=0.1)


def test_a_setting_is_chosen_by_the_labelling_judge_among_those_that_keep_the_content() -> None:
    validation = {
        "mean shift: x2": {"cosine": 0.9, "labelled": 0.1},
        "mean shift: x4": {"cosine": 0.75, "labelled": 0.5},
        "mean shift: x8": {"cosine": 0.5, "labelled": 2.0},
        "flow best of 8: x1": {"cosine": 0.8, "labelled": 9.0},
    }
    assert choose(validation, "mean shift", 0.7) == "mean shift: x4"
    assert choose(validation, "mean shift", 0.5) == "mean shift: x8"
    assert choose(validation, "mean shift", 0.95) is None


def test_a_missing_autoencoder_is_named_with_the_way_to_one(tmp_path: Path) -> None:
    config = composed("task=imdb", "method=pfm", f"task.autoencoder={tmp_path}")
    with pytest.raises(MissingDataError, match=r"python -m benchmarks\.text_autoencoder --out"):
        load_task(config.task, 0).run(make_method(config.method), Bench("minilm", "chunk", 0, False))
    with pytest.raises(TypeError, match="method=pfm"):
        load_task(config.task, 0).run(object(), Bench("minilm", "chunk", 0, False))
    empty = composed("task=imdb", "method=pfm", "task.least_cosines=[]")
    with pytest.raises(ValueError, match=r"task\.least_cosines must be numbers from -1 to 1"):
        load_task(empty.task, 0).run(make_method(empty.method), Bench("minilm", "chunk", 0, False))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        load_space(config.task)


def test_a_bottleneck_model_runs_its_own_code_only_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}), encoding="utf-8")
    config = composed("task=imdb", f"task.autoencoder={tmp_path}").task
    with pytest.raises(ValueError, match="runs code of its own"):
        load_space(config)


def test_a_space_draws_around_a_latent(model: SentenceAutoencoder) -> None:
    space = Space(model)
    texts = fresh(40, seed=11)
    z = space.encode(texts)
    assert z.norm(dim=1).tolist() == pytest.approx([1.0] * 40, abs=1e-5)
    near, far = (space.draw(z, noise, 0.0, 1) for noise in (0.05, 2.0))
    kept, lost = (sum(a == b for a, b in zip(own, space.decode(z), strict=True)) for own in (near, far))
    assert kept > 30 > lost
    assert space.fits(["the film was long and the trip late", "the film"]) == [True, False]


def test_the_products_of_an_update_are_those_of_its_linear_maps() -> None:
    torch.manual_seed(0)
    network = Network(NetworkSettings(vocabulary=50, width=8, hidden=12, readers=1, writers=2, heads=2, window=6))
    ids, mask = padded([[1, 2, 3], [4, 5]])
    with products(network) as found:
        network.logits(network.states(network.encode(ids, mask), ids)[mask])
    layer = [(8, 8, 24), (8, 8, 8), (8, 8, 12), (8, 12, 8)]  # two rows of four places
    maps = [(8, 8, 8), (2, 8, 8), (2, 8, 8), (8, 8, 8), (8, 8, 8)]  # of positions, of latents, of the tokens before
    assert sorted(found) == sorted([*layer * 3, *maps, (7, 8, 50)])
    assert "logits" not in vars(network)
    assert seconds_of_products(found, True, torch.float32, 1) > 0


def test_the_command_refuses_bad_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["--updates", "0", "--out", str(tmp_path)])
    assert "--updates must be at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no sentence has 8 to 24 tokens"):
        train(tmp_path / "short", Corpus(["a b"] * 9, [0] * 9, ["a"], [0]), NetworkSettings(vocabulary=258),
              progress=False)  # fmt: skip


def test_a_damaged_tokenizer_stops_a_training_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("cut", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        train(tmp_path, Corpus(["a b"] * 9, [0] * 9, ["a"], [0]), SIZES, progress=False)


def test_families_are_compared_where_their_curves_have_equal_content(tmp_path: Path) -> None:
    def run(seed: int, lead: float) -> Run:
        points = {
            encode_decode: (0.9, 0.5, 200.0),
            "mean shift: x2": (0.7, 0.6, 300.0),
            "mean shift: x4": (0.3, 0.8, 500.0),
        }
        points |= {"flow in a subspace: x2": (0.6, 0.6 + lead, 200.0), "flow in a subspace: x4": (0.5, 0.9, 250.0)}
        points |= {"flow best of 2: x1": (0.92, 0.51, 210.0), "flow best of 2: x2": (0.7, 0.5, 300.0)}
        figures = {
            f"{name}.{figure}": {"value": value, "low": value, "high": value}
            for name, own in points.items()
            for figure, value in zip(("cosine", "win", "perplexity"), own, strict=True)
        }
        described = {"task": {"name": "imdb"}, "method": {"name": "pfm"}, "seed": seed}
        return Run(tmp_path, {"kind": "text_autoencoder", "figures": figures, "settings": described})

    one = run(0, 0.2)
    assert at_cosine(one, "mean shift", "win", 0.8) == pytest.approx(0.55)
    assert at_cosine(one, "mean shift", "win", 0.5) == pytest.approx(0.7)
    assert at_cosine(one, "mean shift", "perplexity", 0.5) == pytest.approx(400)
    assert at_cosine(one, "flow in a subspace", "win", 0.8) == pytest.approx(0.6)  # a third of the way
    assert at_cosine(one, "flow in a subspace", "win", 0.4) is None
    assert at_cosine(one, "flow best of 2", "win", 0.8) == pytest.approx(0.51 - 0.01 * 12 / 22)  # rises first
    text = "\n".join(equal_content([one, run(1, 0.2), run(2, 0.2)]))
    assert "| 0.6 | 0.800 ± 0.000 | – | – | – | – | – | 0.150 ± 0.000 |" in text
    assert "| 0.6 | 200 ± 0 | – | – | – | – | – | 0.571 ± 0.000 |" in text
    told = "\n".join(equal_content([one, run(1, 0.1), run(2, 0.3)]))
    assert "| 0.6 | 0.800 ± 0.248 | – | – | – | – | – | 0.150 ± 0.248 |" in told


def test_the_tables_join_seeds_and_show_sentences(tmp_path: Path) -> None:
    def run(seed: int, win: float) -> Run:
        def figure(value: float) -> dict[str, float]:
            return {"value": value, "low": value - 0.1, "high": value + 0.1}

        names = {encode_decode: 0.9} | {f"{family}: x{n}": 0.9 - n / 10 for family in FAMILIES for n in (1, 2)}
        names |= {"chosen mean shift at 0.7": 0.8, "chosen mean shift at 0.55": 0.7}
        figures = {f"{name}.win": figure(win) for name in names}
        figures |= {f"{name}.cosine": figure(cosine) for name, cosine in names.items()}
        figures |= {f"best of {n} other sentences.win": figure(0.6) for n in (2, 8)}
        about = {
            "drafts": 2, "rated": 2, "accuracy_independent": 0.7, "accuracy_labelling": 0.6,
            "transport_milliseconds": 0.1, "decode_milliseconds": 1.0,
            "chosen": {"chosen mean shift at 0.7": "mean shift: x1", "chosen flow best of 8 at 0.7": None},
        }  # fmt: skip
        notes = {"drafts": ["a | b", "c"], "examples": {name: [GOOD[0], GOOD[1]] for name in names}}
        described = {"task": {"name": "imdb"}, "method": {"name": "pfm"}, "seed": seed}
        metrics = {"kind": "text_autoencoder", "figures": figures, "about": about, "settings": described,
                   "notes": notes, "environment": {"code": "x"}}  # fmt: skip
        return Run(tmp_path, metrics)

    runs = [run(0, 0.5), run(1, 0.6), run(2, 0.7)]
    of_paper = paper.page(runs)
    assert "| mean shift | 3 | 0.600 ± 0.248 |" in of_paper
    assert of_paper.count("**missing**") == 2
    assert paper.page([]).count("**missing**") == 3
    text = report.markdown(runs)
    assert "| mean shift: x1 | 0.600 ± 0.248 |" in text
    assert "| mean shift | 0.7 | x1 | 0.600 ± 0.248 |" in text
    assert "none keeps so much" in text
    assert r"a \| b" in text
    report.save_plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

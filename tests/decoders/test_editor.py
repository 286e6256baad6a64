"""The editor: networks against their closed forms, training, folders of strangers, and the read-out."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pfm
from pfm.data import EncodedPairs
from pfm.decoders import Editor
from pfm.decoders.editing import (
    EditData,
    Edits,
    LanguageModelWriter,
    PointerWriter,
    TrainingConfig,
    Writer,
    load_writer,
    save_writer,
    train_writer,
)
from pfm.decoders.editing.drafts import corrupted, nearest_neighbours
from pfm.decoders.editing.language_model import LoraLinear
from pfm.decoders.editing.writer import draw_tokens
from pfm.decoders.editor import sentences

WORDS = (
    ("the", "a"),
    ("old", "new", "small", "dull"),
    ("film", "song", "house", "garden", "meal"),
    ("was", "felt"),
    ("good", "bad", "bright", "slow", "warm", "cold"),
)
LIKED = ("good", "bright", "warm")
D = 32


class Bag:
    """Encodes a text as the direction of the sum of its words' fixed random vectors."""

    dimension = D

    def __init__(self, name: str = "bag") -> None:
        self.name = name
        words = sorted({word for group in WORDS for word in group})
        table = np.random.default_rng(0).standard_normal((len(words), D))
        self.table = {word: torch.from_numpy(row).float() for word, row in zip(words, table, strict=True)}

    def encode(self, texts: list[str], *, progress: bool = False) -> torch.Tensor:
        rows = [
            sum(
                (self.table[word] for word in text.replace(".", "").split() if word in self.table),
                torch.full((D,), 1e-3),
            )
            for text in texts
        ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, D)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def describe(self) -> dict[str, Any]:
        return {"type": "Bag", "name": self.name, "dimension": D}


def corpus() -> list[str]:
    texts = [" ".join(words) for words in itertools.product(*WORDS)]
    random.Random(0).shuffle(texts)
    return texts


def pointer(texts: list[str], window: int = 16) -> PointerWriter:
    torch.manual_seed(0)
    return PointerWriter(PointerWriter.train_tokenizer(texts, 320), D, width=32, hidden=64, window=window)


def language_model(*, dtype: torch.dtype = torch.float32, **settings: Any) -> LanguageModelWriter:
    """Make a writer on a random Llama of two layers with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<|im_start|>", "<|im_end|>", "<unknown>", *sorted({word for group in WORDS for word in group})]
    of_words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unknown>"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_words, eos_token="<|im_end|>", unk_token="<unknown>")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )
    )  # fmt: skip
    defaults: dict[str, Any] = {"rank": 4, "prefix": 3, "prefix_hidden": 16, "window": 16}
    return LanguageModelWriter(model.to(dtype), tokenizer, D, **(defaults | settings))


def stirred(writer: Writer) -> Writer:
    """Move every trained weight, so that adapters that start at zero count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in writer.trained().values():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return writer.eval()


@pytest.fixture(params=["pointer", "language_model"])
def writer(request: pytest.FixtureRequest) -> Writer:
    return stirred(pointer(corpus()[:200]) if request.param == "pointer" else language_model())


@pytest.fixture(scope="module")
def trained() -> tuple[Writer, EditData, dict[str, Any]]:
    texts, encoder = corpus(), Bag()
    writer = pointer(texts)
    data = EditData.from_texts(texts, encoder.encode, writer.tokenize, window=writer.window)
    config = TrainingConfig(steps=200, batch_size=64, learning_rate=4e-3, noise=0.3)
    return writer, data, train_writer(writer, data, config, progress=False)


def some_edits(writer: Writer, count: int = 6) -> tuple[Edits, list[np.ndarray]]:
    texts, encoder = corpus()[: 2 * count], Bag()
    texts[0] = "film"  # of another length
    rows = writer.tokenize(texts)
    return Edits(rows[:count], encoder.encode(texts[:count]), encoder.encode(texts[count:])), rows[count:]


# -- the networks ----------------------------------------------------------------------------------------------------


def test_an_adapter_adds_its_product_and_starts_at_zero() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 7)
    lora = LoraLinear(base, 2, 6.0)
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(lora(x), base(x))
    with torch.no_grad():
        lora.lora_B.normal_()
    expected = base(x) + 3.0 * x @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(lora(x), expected)
    assert sorted(name for name, value in lora.named_parameters() if value.requires_grad) == ["lora_A", "lora_B"]


def test_log_probabilities_are_those_of_writing_token_by_token(writer: Writer) -> None:
    edits, targets = some_edits(writer)
    with torch.no_grad():
        whole = writer.log_probabilities(edits, targets)
        state, logp = writer.begin(edits, 1)
        width = max(map(len, targets)) + 1
        wanted = torch.tensor([[*row, *[writer.end] * (width - len(row))] for row in targets])
        steps = []
        for place in range(width):
            torch.testing.assert_close(logp.exp().sum(1), torch.ones(len(edits)), atol=1e-4, rtol=0)
            steps.append(logp.gather(1, wanted[:, place : place + 1])[:, 0])
            state, logp = writer.step(state, wanted[:, place])
    by_step = torch.stack(steps, dim=1)
    expected = torch.cat([row[: len(target) + 1] for row, target in zip(by_step, targets, strict=True)])
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=1e-4)


def test_a_text_does_not_depend_on_the_rest_of_its_batch(writer: Writer) -> None:
    texts = corpus()[:8]
    texts[3] = "film"
    vectors = Bag().encode(texts)
    editor = Editor(writer, samples=3, temperature=1.0)
    together, tokens = editor.edit(texts, vectors, vectors.flip(0))
    assert tokens > 0
    alone = [
        editor.edit([text], vectors[place][None], vectors[7 - place][None])[0][0] for place, text in enumerate(texts)
    ]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1


def test_the_point_reaches_what_is_written(writer: Writer) -> None:
    edits, targets = some_edits(writer)
    moved = Edits(edits.drafts, edits.vectors, edits.points.flip(0))
    with torch.no_grad():
        one, other = writer.log_probabilities(edits, targets), writer.log_probabilities(moved, targets)
    assert float((one - other).abs().max()) > 1e-3


def test_draws_have_the_truncated_softmax_frequencies() -> None:
    logp = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]]), dim=1)
    n = 4000
    uniform = (torch.arange(n) + 0.5) / n
    drawn = draw_tokens(logp.expand(n, -1), uniform, temperature=0.5, top_k=4, top_p=0.98)
    p = torch.softmax(torch.tensor([3.0, 2.0, 1.0, 0.0]) / 0.5, dim=0)  # tokens 4, 0, 1, 2
    kept = p * (p.cumsum(0) - p < 0.98)
    kept = kept / kept.sum()
    found = torch.tensor([(drawn == token).float().mean() for token in (4, 0, 1, 2)])
    torch.testing.assert_close(found, kept, atol=1e-3, rtol=0)
    assert int(kept.count_nonzero()) == 2
    assert draw_tokens(logp, torch.zeros(1), 5.0, 5, 1.0).tolist() == [4]


def test_guidance_copies_at_the_draft_s_own_point_and_makes_more_of_a_move(
    trained: tuple[Writer, EditData, dict[str, Any]],
) -> None:
    texts, encoder = trained[1].texts[:40], Bag()
    z = encoder.encode(texts)
    goals = encoder.encode(texts[::-1])
    part = torch.nn.functional.normalize(z + 0.35 * (goals - z), dim=1)  # not half of the way to another text

    def moved(guidance: float, points: torch.Tensor) -> tuple[list[str], float]:
        edits, _ = Editor(trained[0], samples=1, guidance=guidance).edit(texts, z, points)
        written = [row[0] for row in edits]
        distance = (encoder.encode([text or "the" for text in written]) - z).norm(dim=1)
        return written, float(distance.mean())

    assert moved(3.0, z)[0] == moved(1.0, z)[0]
    assert moved(3.0, part)[1] > 1.2 * moved(1.0, part)[1]


# -- data ------------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_the_full_matrix() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    found = nearest_neighbours(vectors, 4, (0.3, 0.9))
    cosine = vectors @ vectors.T
    for row, near in enumerate(found.tolist()):
        within = [(-float(c), place) for place, c in enumerate(cosine[row].tolist()) if 0.3 <= c <= 0.9]
        expected = [place for _, place in sorted(within)[:4]]
        assert [place for place in near if place >= 0] == expected


def test_corruption_changes_a_quarter_of_the_words_at_most() -> None:
    words = [f"w{place}" for place in range(16)]
    rng = random.Random(0)
    for _ in range(200):
        broken = corrupted(words, ["near"], ["far"], rng).split()
        assert set(broken) <= {*words, "near", "far"}
        assert sum(word in ("near", "far") for word in broken) <= 4
        assert len(set(words) - set(broken)) <= 12


def test_texts_that_cannot_be_used_are_left_out_and_counted() -> None:
    writer = pointer(corpus()[:100], window=8)
    long = " ".join(corpus()[:4])
    data = EditData.from_texts(
        ["the old film", " ", long, "the old film", "a new song"], Bag().encode, writer.tokenize, window=8
    )
    assert data.texts[:2] == ["the old film", "a new song"]
    assert data.dropped == 3
    with pytest.raises(ValueError, match="at least two different sentences"):
        EditData.from_texts(["film", "film"], Bag().encode, writer.tokenize, window=8)


# -- training --------------------------------------------------------------------------------------------------------


def said(writer: Writer, drafts: list[str], points: torch.Tensor) -> list[str]:
    edits, _ = Editor(writer, samples=1).edit(drafts, Bag().encode(drafts), points)
    return [row[0] for row in edits]


def test_a_trained_writer_copies_reaches_and_fails_at_points_of_others(
    trained: tuple[Writer, EditData, dict[str, Any]],
) -> None:
    writer, data, found = trained
    drafts, encoder = data.texts[:48], Bag()  # the held-out targets
    points = encoder.encode(drafts)
    assert np.mean([one == other for one, other in zip(said(writer, drafts, points), drafts, strict=True)]) >= 0.95
    goals = drafts[::-1]
    reached = said(writer, drafts, encoder.encode(goals))
    right = np.mean([one == other for one, other in zip(reached, goals, strict=True)])
    permuted = said(writer, drafts, encoder.encode(goals).roll(7, 0))
    wrong = np.mean([one == other for one, other in zip(permuted, goals, strict=True)])
    assert right >= 0.6
    assert wrong <= 0.05
    assert found["held_out"]["copy"] < found["held_out"]["corrupted"] < 1.0
    assert found["steps"] == 200
    assert found["losses"][0][1] > found["losses"][-1][1]


@pytest.mark.parametrize("kind", ["pointer", "language_model"])
def test_training_that_was_interrupted_ends_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    texts, encoder = corpus()[:80], Bag()

    def fresh() -> Writer:
        return pointer(texts) if kind == "pointer" else language_model()

    class Stopped(EditData):
        calls = 0

        def edits(self, *arguments: Any) -> Any:
            type(self).calls += 1
            if self.calls == 10:
                raise KeyboardInterrupt
            return super().edits(*arguments)

    config = TrainingConfig(steps=14, batch_size=8, checkpoint_every=4)
    whole = fresh()
    data = EditData.from_texts(texts, encoder.encode, whole.tokenize, window=16)
    train_writer(whole, data, config, progress=False)

    first = fresh()
    with pytest.raises(KeyboardInterrupt):
        train_writer(first, Stopped(**vars(data)), config, folder=tmp_path, progress=False)
    with safe_open(tmp_path / "training.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["step"] == 8  # the last checkpoint before the tenth update
    assert state["seconds"] > 0
    resumed = fresh()
    train_writer(resumed, data, config, folder=tmp_path, progress=False)
    for name, value in whole.trained().items():
        torch.testing.assert_close(resumed.trained()[name], value, atol=0, rtol=0)
    assert any((value != fresh().trained()[name]).any() for name, value in whole.trained().items())
    other = TrainingConfig(steps=14, batch_size=8, checkpoint_every=4, seed=1)
    with pytest.raises(ValueError, match="another run: its config differs"):
        train_writer(fresh(), data, other, folder=tmp_path, progress=False)


def test_a_base_in_bfloat16_trains_adapters_in_float32() -> None:
    texts = corpus()[:60]
    writer = language_model(dtype=torch.bfloat16)
    data = EditData.from_texts(texts, Bag().encode, writer.tokenize, window=16)
    found = train_writer(writer, data, TrainingConfig(steps=60, batch_size=16, learning_rate=2e-2), progress=False)
    assert {value.dtype for value in writer.trained().values()} == {torch.float32}
    assert writer.model.dtype == torch.bfloat16
    assert found["losses"][-1][1] < 0.8 * found["losses"][0][1]


def test_a_run_by_minutes_sets_its_number_of_updates(tmp_path: Path) -> None:
    texts, writer = corpus()[:40], language_model()
    data = EditData.from_texts(texts, Bag().encode, writer.tokenize, window=16)
    config = TrainingConfig(steps=None, minutes=1e-6, batch_size=2)
    found = train_writer(writer, data, config, folder=tmp_path, progress=False)
    assert found["steps"] == 61  # the time was up when it was known how long an update takes
    assert train_writer(writer, data, config, folder=tmp_path, progress=False)["steps"] == 61


def test_settings_out_of_range_are_refused() -> None:
    for wrong, said_of in (
        ({"steps": None}, "either steps or minutes"),
        ({"minutes": 3.0}, "either steps or minutes"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"copy": 0.7, "neighbour": 0.5}, "at most 1 in all"),
        ({"noise": float("nan")}, "noise must be a number of at least 0: got nan"),
    ):
        with pytest.raises(ValueError, match=said_of):
            TrainingConfig(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="dimension 32, and the data has 3"):
        train_writer(
            language_model(), EditData(["a"], [np.array([1])], torch.zeros(1, 3), np.zeros((1, 1)), np.zeros(1))
        )


# -- folders ---------------------------------------------------------------------------------------------------------


def saved(writer: Writer, folder: Path) -> Path:
    save_writer(writer, folder, encoder=Bag().describe())
    return folder


def test_a_saved_writer_writes_the_same(writer: Writer, tmp_path: Path) -> None:
    base = language_model(base_name="tiny") if isinstance(writer, LanguageModelWriter) else None
    if isinstance(writer, LanguageModelWriter):
        with torch.no_grad():
            for value in writer.trained().values():
                value.copy_(value.bfloat16())  # as the adapters are saved
    folder = saved(writer, tmp_path)
    given = None if base is None else (_untouched(base), base.tokenizer)
    editor = Editor.from_pretrained(folder, base=given, samples=2, device="cpu")
    texts = corpus()[:5]
    vectors = Bag().encode(texts)
    assert editor.edit(texts, vectors, vectors.flip(0)) == Editor(writer, samples=2).edit(
        texts, vectors, vectors.flip(0)
    )
    assert editor.trained_on == Bag().describe()


def _untouched(writer: LanguageModelWriter) -> Any:
    """Return the base model of a fresh writer without its adapters."""
    for module in list(writer.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                setattr(module, name, child.base)
    return writer.model


@pytest.mark.parametrize(
    ("change", "said_of"),
    [
        ({"hidden": 4096, "width": 4096}, "do not belong together"),
        ({"hidden": 10**9}, "hidden must be a whole number from 1 to"),
        ({"hidden": "64"}, "hidden must be a whole number"),
        ({"command": "rm"}, "damaged"),
    ],
)
def test_a_description_of_another_network_is_refused(change: dict[str, Any], said_of: str, tmp_path: Path) -> None:
    folder = saved(pointer(corpus()[:100]), tmp_path)
    described = json.loads((folder / "editor.json").read_text())
    described["settings"] |= change
    (folder / "editor.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=said_of):
        load_writer(folder)


def test_folders_of_strangers_are_refused(tmp_path: Path) -> None:
    folder = saved(pointer(corpus()[:100]), tmp_path / "pointer")
    weights = load_file(folder / "editor.safetensors")
    save_file({**weights, "more": torch.zeros(2)}, folder / "editor.safetensors")
    with pytest.raises(ValueError, match=r"more is .* in the file, and not expected"):
        load_writer(folder)
    (folder / "editor.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle
    with pytest.raises(ValueError, match="damaged"):
        load_writer(folder)
    (folder / "tokenizer.json").write_text("{}")
    save_file(weights, folder / "editor.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_writer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_writer(folder)

    other = saved(language_model(base_name="/home/stranger/model"), tmp_path / "adapters")
    with pytest.raises(ValueError, match="pass base="):
        load_writer(other)
    described = json.loads((other / "editor.json").read_text())
    described["settings"]["prefix_hidden"] = 16_000
    described["settings"]["prefix"] = 256
    (other / "editor.json").write_text(json.dumps(described))
    fresh = language_model()
    with pytest.raises(ValueError, match=r"describes at least .* numbers"):
        load_writer(other, base=(_untouched(fresh), fresh.tokenizer))


# -- the decoder -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted(shuffled=False)


def fitted(shuffled: bool) -> pfm.PreferenceFlow:
    """Fit a flow on pairs in which texts that end in a liked word win."""
    texts, encoder = corpus(), Bag()
    vectors, liked = encoder.encode(texts), torch.tensor([text.split()[-1] in LIKED for text in texts])
    if shuffled:
        liked = liked[torch.randperm(len(liked), generator=torch.Generator().manual_seed(3))]
    good, bad = vectors[liked], vectors[~liked]
    size = min(len(good), len(bad), 600)
    pairs = EncodedPairs(good[:size], bad[:size], encoder=encoder.describe())
    return pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False), progress=False)


def test_an_edit_wins_and_the_trace_tells_its_cost(
    trained: tuple[Writer, EditData, dict[str, Any]], flow: pfm.PreferenceFlow
) -> None:
    editor = Editor(trained[0], samples=4, rounds=2, strength=3.0, encoder=Bag().describe())
    refiner = pfm.wrap(None, flow, encoder=Bag(), decoder=editor)
    drafts = [text for text in trained[1].texts[:60] if text.split()[-1] not in LIKED]
    results = refiner.refine(drafts, ["?"] * len(drafts))
    liked = np.mean([result.text.split()[-1] in LIKED for result in results])
    assert liked >= 0.6
    kept = torch.cosine_similarity(Bag().encode([r.text for r in results]), Bag().encode(drafts)).mean()
    assert float(kept) >= 0.5
    for result in results:
        assert result.win_probability >= flow.win_probability(Bag().encode([result.original]))[0] - 1e-6
        assert result.calls == 0
        assert result.trace is not None
        (first, *_) = result.trace
        assert first["texts_written"] == 4
        assert first["tokens_written_together"] > 0
        accepted = [entry for entry in result.trace if entry["accepted"] is not None]
        assert result.changed == bool(accepted)
        assert all("nearest to the point" in entry["reason"] for entry in accepted)


def test_the_nearest_of_the_allowed_edits_is_taken(
    trained: tuple[Writer, EditData, dict[str, Any]], flow: pfm.PreferenceFlow
) -> None:
    editor = Editor(trained[0], samples=6, strength=3.0, temperature=2.0, margin=0.02)
    refiner = pfm.wrap(None, flow, encoder=Bag(), decoder=editor)
    drafts = [text for text in trained[1].texts[:40] if text.split()[-1] not in LIKED]
    z = Bag().encode(drafts)
    points = flow.transport(z, strength=3.0)
    before = flow.win_probability(z)
    for place, result in enumerate(refiner.refine(drafts, ["?"] * len(drafts))):
        vectors = Bag().encode(result.candidates)
        distance = (vectors - points[place]).norm(dim=1)
        allowed = flow.win_probability(vectors) >= before[place] + 0.02 - 1e-6
        allowed[0] = True
        assert result.index == int(torch.where(allowed, distance, torch.inf).argmin())


def test_shuffled_labels_move_nothing(trained: tuple[Writer, EditData, dict[str, Any]]) -> None:
    flow = fitted(shuffled=True)
    refiner = pfm.wrap(None, flow, encoder=Bag(), decoder=Editor(trained[0], samples=2, strength=3.0))
    drafts = trained[1].texts[:20]
    results = refiner.refine(drafts, ["?"] * len(drafts))
    assert [result.text for result in results] == drafts


def test_a_latent_of_another_encoder_is_refused(
    trained: tuple[Writer, EditData, dict[str, Any]], flow: pfm.PreferenceFlow
) -> None:
    editor = Editor(trained[0], encoder=Bag("other").describe())
    with pytest.raises(ValueError, match="another encoder: name 'other' against 'bag'"):
        pfm.wrap(None, flow, encoder=Bag(), decoder=editor)

    class Wide(Bag):
        dimension = 2 * D

    with pytest.raises(ValueError, match="vectors of dimension 32, and the encoder gives 64"):
        editor.bind(None, flow, Wide())
    with pytest.raises(ValueError, match=r"points must be finite and of shape \(1, 32\)"):
        editor.edit(["a film"], torch.zeros(1, D), torch.zeros(1, 3))


def test_a_long_text_is_split_into_sentences_or_refused(
    trained: tuple[Writer, EditData, dict[str, Any]], flow: pfm.PreferenceFlow
) -> None:
    parts = [text for text in trained[1].texts[:60] if text.split()[-1] == "bad"][:3]
    long = ".  ".join(part.capitalize() for part in parts) + "."
    options = {"samples": 4, "strength": 3.0, "margin": 0.0}
    writer = trained[0]
    assert len(writer.tokenize([long])[0]) > writer.window
    (split,) = pfm.wrap(None, flow, encoder=Bag(), decoder=Editor(writer, **options)).refine([long], ["?"])
    assert split.trace is not None
    assert "split into 3 sentences" in split.trace[0]["split"]
    assert split.trace[0]["texts_written"] == 12
    assert split.text.count("  ") == 2  # what stood between them stays
    refusing = Editor(writer, long_texts="refuse", **options)
    (refused,) = pfm.wrap(None, flow, encoder=Bag(), decoder=refusing).refine([long], ["?"])
    assert refused.text == long
    assert "the editor's window is 16" in refused.reason
    with pytest.raises(ValueError, match="split it into sentences"):
        refusing.edit([long], torch.zeros(1, D), torch.zeros(1, D))


@pytest.mark.parametrize("text", ["One. Two! Three?", "A\n\nB", 'He said "no." Then left.  So', "", " x", "e.g. this"])
def test_sentences_join_to_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text
    assert sentences("One. Two! Three?")[::2] == ["One.", "Two!", "Three?"]


def test_settings_of_the_editor_are_checked(trained: tuple[Writer, EditData, dict[str, Any]]) -> None:
    for wrong, said_of in (
        ({"samples": 0}, "samples must be a whole number"),
        ({"strength": -1.0}, "strength must be a number of at least 0"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"long_texts": "cut"}, "long_texts must be one of split, refuse: got 'cut'"),
    ):
        with pytest.raises(ValueError, match=said_of):
            Editor(trained[0], **wrong)  # pyright: ignore[reportArgumentType]


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_a_decoder(tmp_path: Path) -> None:
    from pfm.cli import app

    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"said": text}) + "\n" for text in [*corpus()[:60], corpus()[0]]))
    out = tmp_path / "decoder"
    command = ["train-decoder", str(rows), "--out", str(out), "--text-key", "said", "--encoder", "surface"]
    command += ["--steps", "3", "--batch-size", "8", "--device", "cpu", "--no-progress"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "3 updates" in result.output
    assert not (out / ".checkpoint").exists()
    editor = Editor.from_pretrained(out, device="cpu")
    assert editor.trained_on is not None
    assert editor.trained_on["type"] == "SurfaceEncoder"
    wrong = CliRunner().invoke(app, ["train-decoder", str(rows), "--out", str(out)])
    assert wrong.exit_code == 2
    assert "--text-key" in wrong.output


def test_texts_one_a_line_are_read_in_the_encoding_that_their_mark_says(tmp_path: Path) -> None:
    from pfm.cli.train_decoder import _read

    path = tmp_path / "texts.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("First one.\nÜber uns.\n", encoding=encoding)
        assert _read(path, "text") == ["First one.", "Über uns."]
    path = tmp_path / "texts.TXT"
    path.write_bytes("One\u2028text\x0bof two\x85 lines.\r\nAnother.\rA third.".encode())
    assert _read(path, "text") == ["One\u2028text\x0bof two\x85 lines.", "Another.", "A third."]
    path = tmp_path / "texts.txt"
    path.write_bytes("Über uns.\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts\.txt, line 1"):
        _read(path, "text")

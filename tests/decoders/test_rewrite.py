"""Rewrite: a model revises its drafts towards the point that the flow carries them to."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import run, write_rows
from support.injections import INJECTIONS, skeleton
from support.style_corpus import Writer, blocks, preferences, quality, request

import pfm
from pfm._internal.templates import Template, fence_mark
from pfm.decoders import ExemplarBank, Rewrite
from pfm.encoders import SurfaceEncoder
from pfm.generators import OpenAIGenerator
from pfm.judges import ScriptedJudge
from pfm.refiner import Refinement
from pfm.statistics import Bootstrap

ENCODER = SurfaceEncoder()
ASKED = [request(1000 + number) for number in range(40)]


def fitted(seed: int, *, shuffled: bool = False):
    pairs = preferences(600, seed)
    if shuffled:
        pairs = pairs.shuffle_labels(seed)
    encoded = pairs.encode(ENCODER, progress=False)
    return pfm.PreferenceFlow.fit(encoded, pfm.FlowConfig(residual=False, seed=seed), progress=False)


def bank_of(seed: int) -> ExemplarBank:
    return ExemplarBank.from_pairs(preferences(600, seed), ENCODER, progress=False)


@pytest.fixture(scope="module")
def flow():
    return fitted(0)


@pytest.fixture(scope="module")
def bank():
    return bank_of(0)


def rewriting(writer: Any, flow: Any, bank: ExemplarBank, *, n: int = 1, **options: Any) -> Any:
    return pfm.wrap(writer, flow, encoder=ENCODER, decoder="rewrite", exemplars=bank, n=n, **options)


# --- what it gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_that_can_revise_beats_select_at_equal_calls(seed, flow, bank):
    flow, bank = (flow, bank) if seed == 0 else (fitted(seed), bank_of(seed))
    reviser, selector = Writer("able", seed), Writer("able", seed)
    revised = rewriting(reviser, flow, bank, n=2, rounds=2, rewrites=4, strength=4.0).batch(ASKED, progress=False)
    selected = pfm.wrap(selector, flow, encoder=ENCODER, n=10).batch(ASKED, progress=False)
    assert reviser.calls <= selector.calls == 10 * len(ASKED)
    assert sum(result.calls for result in revised) == reviser.calls
    rise = Bootstrap(len(ASKED)).mean(
        [one.win_probability - other.win_probability for one, other in zip(revised, selected, strict=True)]
    )
    judge = ScriptedJudge(quality, name="flaws")
    won = Bootstrap(len(ASKED)).mean(
        [
            judge.judge(one.prompt, one.text, other.text).probability
            for one, other in zip(revised, selected, strict=True)
        ]
    )
    assert rise.low > 0
    assert won.low > 0.5
    for result in revised:
        assert result.win_probability >= result.probabilities[0]
        assert result.candidates[result.index] == result.text


def test_shuffled_labels_confirm_nothing_and_cost_no_call(bank):
    writer = Writer("able")
    results = rewriting(writer, fitted(0, shuffled=True), bank).batch(ASKED[:10], progress=False)
    assert writer.calls == 10  # the drafts
    assert not any(result.changed for result in results)
    assert all("no held-out gain was confirmed" in result.reason for result in results)


def failing(prompt):
    if "BEGIN draft" in prompt:
        raise ConnectionError("refused")
    return Writer()(prompt)


def blank(prompt):
    return " \n" if "BEGIN draft" in prompt else Writer()(prompt)


@pytest.mark.parametrize("generator", [Writer("echo"), Writer("copy"), failing, blank])
def test_a_model_that_cannot_leaves_every_original_and_says_so(generator, flow, bank):
    results = rewriting(generator, flow, bank).batch(ASKED[:10], progress=False)
    for result in results:
        assert (result.changed, result.text, result.index) == (False, result.original, 0)
        assert result.reason.startswith("kept the original: ")
        assert result.trace
        assert all(entry["accepted"] is None for entry in result.trace)
    if isinstance(generator, Writer):
        assert all(result.error is None for result in results)
        assert "no new rewrite came" in results[0].reason
    else:
        assert all(result.error for result in results)


def test_a_clumsy_model_gains_nothing(flow, bank):
    results = rewriting(Writer("clumsy"), flow, bank).batch(ASKED, progress=False)
    kept = [result for result in results if not result.changed]
    assert len(kept) >= 0.85 * len(results)
    assert any("none of" in result.reason and "with a guard margin of" in result.reason for result in kept)
    assert np.mean([quality("", r.text) - quality("", r.original) for r in results]) > -0.25


# --- rounds, budgets, guard, trace ----------------------------------------------------------------------------


def test_the_trace_tells_every_round_and_survives_json(flow, bank):
    results = rewriting(Writer("able"), flow, bank, rounds=3, rewrites=2).batch(ASKED[:8], progress=False)
    for result in results:
        again = Refinement.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again == result
        assert result.trace
        assert [entry["round"] for entry in result.trace] == [1, 2, 3]
        best = 0
        for entry in result.trace:
            assert entry["draft"] == best
            assert len(entry["prompt_hash"]) == 16
            assert [result.candidates[place] for place in entry["candidates"]] == entry["rewrites"]
            assert [result.probabilities[place] for place in entry["candidates"]] == entry["win_probability"]
            assert len(entry["alignment"]) == len(entry["rewrites"])
            if entry["accepted"] is not None:
                rise = result.probabilities[entry["accepted"]] - result.probabilities[best]
                assert rise >= flow.guard_margin
                best = entry["accepted"]
            else:
                assert entry["reason"].startswith("kept the draft: ")
        assert result.index == best
        hashes = {entry["prompt_hash"] for entry in result.trace}
        assert len(hashes) == 3  # another draft or other examples each time


def test_margin_and_budget_are_kept(flow, bank):
    writer = Writer("able")
    (result,) = rewriting(writer, flow, bank, margin=0.99).batch(ASKED[:1], progress=False)
    assert not result.changed
    assert "with a guard margin of 0.990" in result.reason
    writer = Writer("able")
    (result,) = rewriting(writer, flow, bank, rounds=9, rewrites=4, max_calls=6).batch(ASKED[:1], progress=False)
    assert writer.calls == 1 + 6 == result.calls
    assert [entry["calls"] for entry in result.trace] == [4, 2, 0]
    assert result.reason.endswith("the budget of 6 calls is spent")


def test_a_prompt_alone_is_revised_as_in_a_batch(flow, bank):
    together = rewriting(Writer("able"), flow, bank).batch(ASKED[:6], progress=False)
    for prompt, result in zip(ASKED[:6], together, strict=True):
        (alone,) = rewriting(Writer("able"), flow, bank).batch([prompt], progress=False)
        assert alone.text == result.text
        assert alone.probabilities == pytest.approx(result.probabilities, abs=1e-5)


def test_refiner_refines_given_outputs_pickles_and_runs_async(flow, bank):
    refiner = pickle.loads(pickle.dumps(rewriting(Writer("able"), flow, bank)))
    assert isinstance(refiner.decoder, Rewrite)
    draft = "slow trains and nobody remembers who built the 32 first one, says page 930 lol!!!"
    result = refiner.refine([draft], [ASKED[0]])[0]
    assert result.changed
    assert quality("", result.text) > quality("", result.original)
    (later,) = asyncio.run(refiner.abatch([ASKED[1]], progress=False))
    assert later.trace


def test_a_conversation_is_asked_for_as_a_conversation(flow, bank):
    seen = []

    def chat(messages):
        seen.append(messages)
        return Writer()(messages[-1]["content"])

    prompt = [{"role": "system", "content": "kind"}, {"role": "user", "content": ASKED[0]}]
    result = rewriting(chat, flow, bank, rounds=1, rewrites=1)(prompt)
    assert seen[0] == prompt
    assert [message["role"] for message in seen[1]] == ["user"]
    assert blocks(seen[1][0]["content"])["request"] == f"system: kind\nuser: {ASKED[0]}"
    assert result.calls == 2


def test_a_pool_tags_what_each_of_its_generators_wrote(flow, bank):
    pool = pfm.generators.GeneratorPool({"able": Writer("able", 1), "other": Writer("able", 2)}, seed=0)
    results = rewriting(pool, flow, bank, n=2, rounds=1, rewrites=4, strength=4.0).batch(ASKED[:10], progress=False)
    for result in results:
        assert len(result.generators) == len(result.candidates)
        assert set(result.generators) <= {"able", "other"}
        assert result.generator == result.generators[result.index]
    assert {tag for result in results for tag in result.generators[2:]} == {"able", "other"}


def test_the_command_line_rewrites_with_the_pairs_as_exemplars(flow, tmp_path, monkeypatch):
    (tmp_path / "my_writer.py").write_text("from support.style_corpus import Writer\n\nreply = Writer('able')\n")
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained(tmp_path / "flow")
    preferences(200, 0).to_jsonl(tmp_path / "pairs.jsonl")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in ASKED[:12]])
    given = ["refine", prompts, "--flow", tmp_path / "flow", "--no-progress", "--generator", "my_writer:reply", "-n", 2]
    rewrite = ["--decoder", "rewrite", "--exemplars", tmp_path / "pairs.jsonl", "--set", "rounds=1"]
    run(*given, "--out", tmp_path / "out.jsonl", *rewrite)
    rows = [Refinement.from_dict(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.prompt for row in rows] == ASKED[:12]
    assert all(len(row.trace or ()) == 1 and row.error is None for row in rows)
    assert any(row.index >= 2 for row in rows)  # a revision was taken
    told = run(*given, "--out", tmp_path / "out.jsonl", *rewrite, "--set", "rewrites=2", code=2).stderr
    assert "another flow, generator or decoder" in told
    for more, why in [
        (rewrite[:2], "--decoder rewrite needs --exemplars"),
        ([*rewrite[:4], "--set", "shot=1"], "--decoder rewrite has no shot; it has rounds"),
        (["--exemplars", tmp_path / "pairs.jsonl"], "--exemplars belongs to --decoder rewrite"),
    ]:
        assert why in " ".join(run(*given, "--out", tmp_path / "no.jsonl", *more, code=2).stderr.split())
    assert not (tmp_path / "no.jsonl").exists()


def test_settings_are_checked_before_any_work(flow, bank, tmp_path):
    with pytest.raises(TypeError, match="decoder='rewrite' needs exemplars"):
        pfm.wrap(Writer(), flow, encoder=ENCODER, decoder="rewrite")
    with pytest.raises(ValueError, match="seed are no settings of decoder='rewrite', which has exemplars"):
        rewriting(Writer(), flow, bank, seed=1)
    with pytest.raises(ValueError, match="needs a generator"):
        rewriting(None, flow, bank)
    with pytest.raises(TypeError, match="from_pairs"):
        rewriting(Writer(), flow, ["text"])  # pyright: ignore[reportArgumentType]
    wrong: list[dict[str, Any]] = [{"rounds": 0}, {"rewrites": 1.5}, {"shots": True}, {"max_calls": 0}]
    for option in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be a whole number"):
            rewriting(Writer(), flow, bank, **option)
    with pytest.raises(ValueError, match="by='sample'"):
        rewriting(Writer(), flow, bank, by="sample")
    with pytest.raises(ValueError, match="vectors of 2 numbers, and the encoder's have 28"):
        rewriting(Writer(), flow, ExemplarBank(["x"], torch.zeros(1, 2)))
    with pytest.warns(UserWarning, match="another encoder than the one given: name 'other'"):
        rewriting(Writer(), flow, ExemplarBank(bank.texts, bank.vectors, {"name": "other"}))
    with pytest.raises(ValueError, match="not bound"):
        Rewrite(bank).decode(flow, ["x"], torch.zeros(1, 28), None, np.array([0.5]), "p")


# --- exemplars ------------------------------------------------------------------------------------------------


def test_bank_is_saved_without_pickle_and_read_back(bank, tmp_path):
    bank.save(tmp_path / "bank")
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == ["exemplars.jsonl", "exemplars.safetensors"]
    again = ExemplarBank.load(tmp_path / "bank")
    assert again.texts == bank.texts
    assert torch.equal(again.vectors, bank.vectors)
    assert again.encoder == ENCODER.describe()
    lines = (tmp_path / "bank" / "exemplars.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bank" / "exemplars.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="do not belong together"):
        ExemplarBank.load(tmp_path / "bank")
    (tmp_path / "bank" / "exemplars.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="damaged"):
        ExemplarBank.load(tmp_path / "bank")
    with pytest.raises(FileNotFoundError, match=r"holds no exemplars\.jsonl"):
        ExemplarBank.load(tmp_path)


def test_bank_finds_the_nearest_in_units_of_spread():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1000.0], [3.0, 0.0]])
    bank = ExemplarBank(["a", "b", "c", "d"], vectors)
    assert bank.nearest(torch.tensor([0.0, 10.0]), 2) == [0, 1]
    assert bank.nearest(torch.tensor([0.0, 1000.0]), 9) == [2, 0, 1, 3]
    assert bank.nearest(torch.tensor([0.0, 0.0]), 2, without={"a"}, among=torch.tensor([True, False, True, True])) == [
        2,
        3,
    ]
    with pytest.raises(ValueError, match=r"point must be \(2,\)"):
        bank.nearest(torch.zeros(3), 1)


def test_bank_holds_what_was_chosen_once():
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "probability": 0.9},
        {"prompt": "q", "chosen": "good", "rejected": "worse", "probability": 1.0},
        {"prompt": "r", "chosen": "tied", "rejected": "even", "probability": 0.5},
        {"prompt": "s", "chosen": "fine", "rejected": "bad", "probability": 0.8},
    ]
    pairs = pfm.PreferencePairs.from_rows(rows)
    assert ExemplarBank.from_pairs(pairs, ENCODER, progress=False).texts == ["good", "fine"]
    assert len(ExemplarBank.from_pairs(pairs, ENCODER, limit=1, progress=False)) == 1
    with pytest.raises(ValueError, match="at least one preferred output"):
        ExemplarBank([], torch.zeros(0, 3))
    with pytest.raises(ValueError, match="finite"):
        ExemplarBank(["x"], torch.tensor([[math.nan]]))


# --- templates ------------------------------------------------------------------------------------------------


def test_users_bring_their_own_template(flow, bank, tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text("Besser: {draft}\nwie {exemplars}\nzu {prompt} {{so}}", encoding="utf-8")
    writer = Writer("able")
    (result,) = rewriting(writer, flow, bank, rounds=1, template=own).batch(ASKED[:1], progress=False)
    assert writer.asked[1].startswith("Besser: [BEGIN draft ")
    assert writer.asked[1].endswith("{so}")
    assert result.trace[0]["template"] == str(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{draft} {prompt}", r"lacks the place \{exemplars\}"),
        ("{exemplars} {draft}", r"lacks the place \{prompt\}"),
        ("{draft} {prompt} {exemplars} {api_key}", r"unknown place \{api_key\}; it may have \{prompt\}, \{draft\}"),
        ("{draft!r} {prompt} {exemplars}", r"unknown place \{draft!r\}"),
        ("{draft.__class__} {prompt} {exemplars}", r"unknown place \{draft.__class__\}"),
        ("{draft:>9} {prompt} {exemplars}", r"unknown place \{draft:>9\}"),
        ("{} {draft} {prompt} {exemplars}", "unknown place"),
        ("{draft} {prompt} {exemplars", "write a brace that is meant twice"),
    ],
)
def test_a_template_with_a_wrong_place_is_refused(text, message, tmp_path, flow, bank):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        rewriting(Writer(), flow, bank, template=tmp_path / "t.txt")


def test_a_template_that_is_not_there_is_named(flow, bank):
    with pytest.raises(ValueError, match="there is no template 'rewrit': pass the path of a file, or one of judge, "):
        rewriting(Writer(), flow, bank, template="rewrit")


def test_a_mark_is_held_by_no_text_and_the_same_for_the_same_texts():
    texts = ["one", "two"]
    mark = fence_mark(texts)
    assert mark == fence_mark(texts)
    assert mark != fence_mark(["onet", "wo"])
    guessed = [*texts, mark, fence_mark([*texts, mark])]
    assert not any(fence_mark(guessed) in text for text in guessed)
    filled = Template.load("rewrite", needed=("prompt", "draft", "exemplars"), optional=("mark",)).fill(
        prompt="{draft}", draft="{mark}", exemplars="{prompt}", mark="m"
    )
    assert "{draft}" in filled  # one pass: a value is never filled again
    assert "{mark}" in filled


# --- texts that try to instruct -------------------------------------------------------------------------------

KEY = "sk-test-" + "k" * 40


class Upstream(BaseHTTPRequestHandler):
    """Speaks chat completions: drafts are given back as they were sent, requests get a draft."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))  # pyright: ignore
        text = self.server.reply(body["messages"][-1]["content"])  # pyright: ignore
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            }
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.encode())))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream():
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.seen = []
    server.reply = Writer("echo")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def chat_with(server: Any) -> OpenAIGenerator:
    """Return a frozen generator: the official client against the server."""
    return OpenAIGenerator("m", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key=KEY, max_retries=0)


@pytest.mark.parametrize("place", ["draft", "example", "request", "reply"])
def test_texts_that_instruct_stay_data(place, flow, bank, upstream, tmp_path, monkeypatch):
    assert len(INJECTIONS) >= 20
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    texts = [text.replace("PATH", str(tmp_path)) for text in INJECTIONS]
    plain = "the harbour and they are quiet, says page 117"
    held = bank
    if place == "example":  # every example that can be shown is such a text
        held = ExemplarBank(texts, ENCODER.encode(texts))
    if place == "reply":
        replies = iter(texts * 4)
        upstream.reply = lambda prompt: next(replies)
    refiner = rewriting(chat_with(upstream), flow, held, rounds=2, rewrites=1)
    decoder, template, generator = refiner.decoder, refiner.decoder.template, refiner.generator
    described = generator.describe()
    drafts = texts if place == "draft" else [plain] * len(texts)
    prompts = texts if place == "request" else ASKED[: len(texts)]
    results = refiner.refine(drafts, prompts)
    assert refiner.decoder is decoder
    assert decoder.template is template
    assert decoder.generator is refiner.generator is generator
    assert generator.describe() == described
    assert {(path, key) for path, key, _ in upstream.seen} == {("/v1/chat/completions", f"Bearer {KEY}")}
    assert {(body["model"], tuple(sorted(body))) for _, _, body in upstream.seen} == {("m", ("messages", "model"))}
    asked = [body["messages"][0]["content"] for _, _, body in upstream.seen]
    assert len({skeleton(prompt) for prompt in asked}) == 1
    for prompt in asked:
        parts = blocks(prompt)
        assert sorted(parts) == ["draft", "example 1", "example 2", "example 3", "request"]
        assert parts["request"] in prompts
        assert parts["draft"] in {*drafts, *(c for result in results for c in result.candidates)}
        assert {parts[f"example {n}"] for n in (1, 2, 3)} <= set(held.texts)
    for result in results:
        assert result.usage["total_tokens"] == 9 * result.calls == 9 * len(result.trace)
        assert all(entry["template"] == "rewrite" for entry in result.trace)
        assert all(text in {*texts, plain} or text.strip() in {t.strip() for t in texts} for text in result.candidates)
        assert KEY not in json.dumps(result.to_dict())
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
    assert not Path("owned").exists()
